"""An environment for each version of ultralytics, beside our own and made only for tests.

    python -m tests.integrations.environment 8.4.190      # makes it, prints its Python

It reads torch and all else from the environment that runs this, through a .pth file, and has of
its own only what that lacks, with torchvision stood in for (`torchvision_stub/`): no recipe here
needs a GPU. The folder is `.venv-ultralytics-VERSION` at the repository's root.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUB = Path(__file__).with_name("torchvision_stub")
VERSIONS = ("8.2.50", "8.3.253", "8.4.190")

_ALL = ("opencv-python-headless==4.12.0.88", "ultralytics-thop==2.2.3")
_NEEDS = {
    "8.2.50": (
        "numpy==1.26.4",
        "pandas==2.2.3",
        "tqdm==4.70.1",
        "py-cpuinfo==9.0.0",
        "seaborn==0.13.2",
        "hub-sdk==0.0.25",
    ),
    "8.3.253": ("polars==2.1.0", "polars-runtime-32==2.1.0", "hub-sdk==0.0.25"),
    "8.4.190": (
        "polars==2.1.0",
        "polars-runtime-32==2.1.0",
        "ultralytics-platform==0.1.99",
        *("httpx==0.28.1", "httpcore==1.0.9", "h11==0.16.0", "anyio==4.16.0", "sniffio==1.3.1"),
    ),
}
_RECIPE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def python_of(version: str) -> Path:
    """The Python of a version's environment, which is made when it is not there yet (a minute).

    Raises CalledProcessError with pip's words on stderr when a package cannot be had.
    """
    folder = ROOT / f".venv-ultralytics-{version}"
    with (ROOT / f".venv-ultralytics-{version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = folder / ".ready"
        if not (stamp.exists() and stamp.read_text() == _RECIPE):
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder, version)
            stamp.write_text(_RECIPE)
    return folder / "bin" / "python"


def _make(folder: Path, version: str) -> None:
    venv.create(folder, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    ours = sysconfig.get_paths()["purelib"]
    (site / "ours.pth").write_text(f"{ours}\n{ROOT}\n")
    words = (f"ultralytics=={version}", *_ALL, *_NEEDS[version])
    pip = (sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"))
    subprocess.run(
        (*pip, "install", "--quiet", "--no-deps", "--disable-pip-version-check", *words),
        check=True,
        stdout=sys.stderr,
    )
    shutil.copytree(STUB, site / "torchvision", ignore=shutil.ignore_patterns("__pycache__"))
    info = site / "torchvision-0.28.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")


def training_environ(environ: dict[str, str], config: Path) -> dict[str, str]:
    """What a training subprocess needs: nothing of pytest, no download, settings of its own."""
    config.mkdir(parents=True, exist_ok=True)
    kept = {k: v for k, v in environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    return {
        **kept,
        "YOLO_CONFIG_DIR": str(config),
        "YOLO_OFFLINE": "True",
        "YOLO_AUTOINSTALL": "False",
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
    }


if __name__ == "__main__":
    for wanted in sys.argv[1:] or VERSIONS:
        sys.stdout.write(f"{python_of(wanted)}{os.linesep}")
