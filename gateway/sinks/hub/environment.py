"""Parameters that tell what code ran where: Platform shows them apart from the training's own."""

from __future__ import annotations

from contextlib import suppress

from rank_client.wire import source

#: Our parameter → the field of Platform's `environment`.
FIELDS = {
    source.REPOSITORY: "gitRepository",
    source.BRANCH: "gitBranch",
    source.COMMIT: "gitCommit",
    source.COMMIT_MESSAGE: "gitCommitMessage",
    source.PYTHON: "pythonVersion",
    source.COMMAND: "command",
    source.OS: "os",
    source.PYTHON_EXECUTABLE: "pythonExecutable",
    source.CPU: "cpu",
    source.CPU_COUNT: "cpuCount",
    source.MEMORY_GIB: "totalRamGb",
    source.DISK_GIB: "totalDiskGb",
    source.GPU: "gpuType",
    source.GPU_COUNT: "gpuCount",
    source.ULTRALYTICS: "ultralyticsVersion",
    source.ENVIRONMENT: "environment",
}
NUMBERS = {"cpuCount": int, "gpuCount": int, "totalRamGb": float, "totalDiskGb": float}
NO_BRANCH = "HEAD"  #: what git calls the branch where a commit is checked out and none is
COMMIT_CHARACTERS = 12  #: of a commit's hash, as many as Platform shows


def apart(args: dict[str, str]) -> tuple[dict[str, str | int | float], dict[str, str]]:
    """(environment, training arguments) of all parameters so far; of what code ran, what Platform
    has no field for (a list of packages of many pages) is left out."""
    environment = {field: _shown(field, args[key]) for key, field in FIELDS.items() if key in args}
    if environment.get("gitBranch") == NO_BRANCH:
        del environment["gitBranch"]
    return environment, {k: v for k, v in args.items() if k not in source.SOURCE_KEYS}


def _shown(field: str, text: str) -> str | int | float:
    if field == "gitCommit":
        return text[:COMMIT_CHARACTERS]
    with suppress(ValueError):  # somebody may have logged a text of that name
        return NUMBERS[field](text) if field in NUMBERS else text
    return text
