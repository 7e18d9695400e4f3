"""The hook's own manners, and what is decided without a trainer: no Ultralytics is needed here."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from rank_client.integrations.ultralytics import CALLBACKS, attach, only_starts_workers
from rank_client.integrations.ultralytics_hook import FOLDER, hooked
from rank_client.integrations.ultralytics_training import arguments


def run(code: str, environ: dict[str, str]) -> str:
    words = (sys.executable, "-c", code)
    return subprocess.run(words, env=environ, check=True, text=True, capture_output=True).stdout


def test_the_hooks_python_imports_nothing_of_ours() -> None:
    """Every Python of a job starts with it, so it must cost nothing until Ultralytics is there."""
    seen = run("import sys; print(*sys.modules)", hooked(os.environ)).split()
    assert "sitecustomize" in seen
    assert not {"zmq", "rank_client.integrations.ultralytics", "ultralytics"} & set(seen)


def test_the_users_own_sitecustomize_runs_too(tmp_path: Path) -> None:
    """The one that would have run without the hook runs after it."""
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.theirs = 'ran'")
    environ = hooked({**os.environ, "PYTHONPATH": str(tmp_path)})
    assert environ["PYTHONPATH"] == f"{FOLDER}:{tmp_path}"
    assert run("print(theirs)", environ).strip() == "ran"


def test_other_imports_are_left_alone(tmp_path: Path) -> None:
    """A package called as Ultralytics' module, without its callbacks, is imported as ever; a broken
    one raises what it would have raised."""
    package = tmp_path / "ultralytics" / "utils" / "callbacks"
    package.mkdir(parents=True)
    (package / "base.py").write_text("default_callbacks = None")
    environ = hooked({**os.environ, "PYTHONPATH": str(tmp_path)})
    code = "import ultralytics.utils.callbacks.base as b; print(b.default_callbacks)"
    assert run(code, environ).strip() == "None"
    (package / "base.py").write_text("raise KeyError('theirs')")
    with pytest.raises(subprocess.CalledProcessError) as failure:
        run("import ultralytics.utils.callbacks.base", environ)
    assert "KeyError: 'theirs'" in failure.value.stderr


class Model:
    """As `YOLO(…)`: callbacks by event, and a way to add one."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[object]] = {}

    def add_callback(self, event: str, callback: object) -> None:
        self.callbacks.setdefault(event, []).append(callback)


def test_attaching_twice_is_attaching_once() -> None:
    """Each event calls us once."""
    model = Model()
    attach(model)
    attach(model)
    assert model.callbacks == {event: [callback] for event, callback in CALLBACKS.items()}


@pytest.mark.parametrize(
    ("given", "told"),
    [("yolo11n.pt", "str"), (None, "NoneType"), (Model, "the class Model"), (Namespace(), "Name")],
)
def test_what_is_no_model_is_refused_as_init_refuses(given: object, told: str) -> None:
    """Before the training begins, as a ValueError that says what is expected."""
    with pytest.raises(ValueError, match=rf"YOLO\(\.\.\.\) gives it, or a trainer, not {told}"):
        attach(given)


def trainer(device: object, **more: object) -> Namespace:
    return Namespace(args=Namespace(device=device), **more)


def test_a_process_that_starts_workers_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what newer trainers say, else by the devices; a worker has a local rank."""
    assert only_starts_workers(trainer("0,1", ddp=True))
    assert not only_starts_workers(trainer("0", ddp=False))
    assert only_starts_workers(trainer("0,1"))
    assert only_starts_workers(trainer([0, 1]))
    assert not only_starts_workers(trainer("cpu"))
    assert not only_starts_workers(trainer(None))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not only_starts_workers(trainer("0,1"))


def test_signatures_of_urls_are_no_parameters() -> None:
    """What follows the `?` of a URL stays behind, in lists and maps too; all else is as it was."""
    given = Namespace(
        data="https://bucket.example/d.zip?X-Amz-Signature=abc&X-Amz-Expires=9",
        weights=["s3://b/w.pt?sig=1", 3],
        more={"url": "https://u.example/a?b=c"},
        epochs=3,
        time=None,
        name="what?",
    )
    assert arguments(given) == {
        "data": "https://bucket.example/d.zip?[redacted]",
        "weights": "['s3://b/w.pt?[redacted]', 3]",
        "more": {"url": "https://u.example/a?[redacted]"},
        "epochs": 3,
        "time": None,
        "name": "what?",
    }
