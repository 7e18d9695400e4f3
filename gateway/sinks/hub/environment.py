"""Parameters that tell what code ran where: Platform shows them apart from the training's own."""

from __future__ import annotations

from rank_client.wire import source

#: Our parameter → the field of Platform's `environment`.
FIELDS = {
    source.REPOSITORY: "gitRepository",
    source.BRANCH: "gitBranch",
    source.COMMIT: "gitCommit",
    source.PYTHON: "pythonVersion",
    source.COMMAND: "command",
    source.OS: "os",
    source.PYTHON_EXECUTABLE: "pythonExecutable",
    source.CPU_COUNT: "cpuCount",
    source.MEMORY_GIB: "totalRamGb",
}


def apart(args: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """(environment, training arguments) of all parameters so far; of what code ran, what Platform
    has no field for (a list of packages of many pages) is left out."""
    environment = {FIELDS[key]: value for key, value in args.items() if key in FIELDS}
    return environment, {k: v for k, v in args.items() if k not in source.SOURCE_KEYS}
