"""The names under which a run tells what code it came from; sinks give them their own places."""

from __future__ import annotations

REPOSITORY = "source/repository"
BRANCH = "source/branch"
COMMIT = "source/commit"
COMMIT_MESSAGE = "source/commit_message"
DIRTY = "source/dirty"
ENTRY_POINT = "source/entry_point"
WORKING_DIR = "source/working_dir"
PYTHON = "source/python"
PYTHON_EXECUTABLE = "source/python_executable"
COMMAND = "source/command"
PACKAGES = "source/packages"
OS = "source/os"
CPU = "source/cpu"
CPU_COUNT = "source/cpu_count"
MEMORY_GIB = "source/memory_gib"
DISK_GIB = "source/disk_gib"
GPU = "source/gpu"
GPU_COUNT = "source/gpu_count"
ULTRALYTICS = "source/ultralytics"
ENVIRONMENT = "source/environment"

#: parameters of these names, and of no others below `source/`, are rankgate's own
SOURCE_KEYS = frozenset(
    (
        REPOSITORY, BRANCH, COMMIT, COMMIT_MESSAGE, DIRTY, ENTRY_POINT, WORKING_DIR, PYTHON,
        PYTHON_EXECUTABLE, COMMAND, PACKAGES, OS, CPU, CPU_COUNT, MEMORY_GIB, DISK_GIB, GPU,
        GPU_COUNT, ULTRALYTICS, ENVIRONMENT,
    )
)  # fmt: skip
DIFF_FILE = "source.diff"  #: key and name of the file that holds the uncommitted changes
