"""Run by every Python that starts with this folder on its path; see `__init__.py`.

It only puts a finder in place, and imports rank_client once Ultralytics' callbacks are imported.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys

WATCHED = "ultralytics.utils.callbacks.base"


class CallbacksFinder:
    """Lets Ultralytics' default callbacks be imported as ever, and then adds ours."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            execute(module)
            try:
                from rank_client.integrations.ultralytics import with_callbacks

                module.default_callbacks = with_callbacks(module.default_callbacks)
            except Exception as error:
                sys.stderr.write(f"rankgate: ultralytics is not logged: {error!r}\n")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _run_the_next() -> None:
    """The sitecustomize that would have run without this one."""
    here = os.path.dirname(os.path.realpath(__file__))  # noqa: PTH120 - pathlib is slow to import
    rest = [folder for folder in sys.path if os.path.realpath(folder) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if os.environ.get("RANKGATE_ULTRALYTICS") == "1":
    sys.meta_path.insert(0, CallbacksFinder())
_run_the_next()
