"""Which sinks there are: our own, and those that installed packages bring (`rankgate.sinks`).

A vendor's package is imported by the sink alone, when it is opened; a third party's sink when a
config names it. One that is broken stands for a sink that is off and says what to do.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from .base import Item, Memory, Off, RunInfo, Sent, Sink, SinkConfig, SinkKind

GROUP = "rankgate.sinks"
NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")  #: it becomes a file's name
MODES = ("online", "offline")


# Imported when a config names it: the gateway's other processes, and most commands, go without.
@functools.cache
def _clearml() -> SinkKind:
    from .clearml import ClearmlConfig, ClearmlSink
    from .clearml_export import ClearmlExport

    return SinkKind(
        ClearmlConfig, lambda config, _: ClearmlSink(config), ClearmlExport, newest_wins=True
    )


@functools.cache
def _neptune() -> SinkKind:
    from .neptune import NeptuneConfig, NeptuneSink
    from .neptune_export import NeptuneExport

    return SinkKind(
        NeptuneConfig, NeptuneSink, lambda config, folder, _: NeptuneExport(config, folder)
    )


@functools.cache
def _hub() -> SinkKind:
    from .hub.config import HubConfig
    from .hub.export import HubExport
    from .hub.legacy import LegacySink
    from .hub.platform import PlatformSink

    def online(config: HubConfig, scratch: Path) -> Sink:
        make = PlatformSink if config.protocol == "platform" else LegacySink
        return make(config, shared=scratch.parents[3])  # DIR/runs/RUN/sinks/hub.scratch

    return SinkKind(
        HubConfig, online, lambda config, folder, _: HubExport(config, folder), newest_wins=True
    )


BUILT_IN: dict[str, Callable[[], SinkKind]] = {
    "clearml": _clearml, "neptune": _neptune, "hub": _hub,
}  # fmt: skip


def names() -> list[str]:
    """Every sink a config may name; nothing of a third party is imported for it."""
    return [*BUILT_IN, *(name for name in _plug_ins() if name not in BUILT_IN)]


def kind(name: str) -> SinkKind:
    """The sink of that name. Raises KeyError when there is none; never for a broken one."""
    if name in BUILT_IN:
        return BUILT_IN[name]()
    entry = _plug_ins()[name]
    try:
        found = entry.load()
        problem = _problem(name, found)
    except (Exception, SystemExit) as error:  # whatever an import of a stranger's module raises
        problem = f"cannot be imported: {type(error).__name__}: {error}"
    if not problem:
        return found  # type: ignore[no-any-return]
    package = entry.dist.name if entry.dist else entry.value
    return _broken(f"the sink {name} {problem}. Repair or uninstall the package {package}")


def online(name: str, config: SinkConfig, scratch: Path) -> Sink:
    """The sink that talks to the service; `scratch` is a folder of its own."""
    return kind(name).online(config, scratch)


def export(name: str, config: SinkConfig, folder: Path, final: Path) -> Sink:
    """The sink that writes what the vendor's own tools can send later, into `folder`, which
    will be renamed to `final` when it is whole."""
    make = kind(name).export
    if make is None:
        return Unusable(f'the sink {name} has no offline export: set mode = "online"')
    return make(config, folder, final)


class BrokenConfig(msgspec.Struct, frozen=True):
    """The table of a sink that cannot be read: what stands in it is not looked at."""

    mode: str = "online"


class Unusable:
    """Stands in for a sink that cannot be made: off, with what to do."""

    stop_asked = ""

    def __init__(self, text: str) -> None:
        self._text = text

    def open(self, run: RunInfo, memory: Memory) -> None:
        raise Off(self._text)

    def send(self, batch: Sequence[Item], again: bool) -> Sent:
        raise Off(self._text)

    def close(self, state: str, reason: str) -> Sent:
        raise Off(self._text)


def _plug_ins() -> dict[str, metadata.EntryPoint]:
    found = metadata.entry_points(group=GROUP)
    return {entry.name: entry for entry in found if NAME.fullmatch(entry.name)}


def _problem(name: str, found: Any) -> str:
    """What is wrong with what an entry point names, or nothing."""
    if not isinstance(found, SinkKind):
        return f"is a {type(found).__name__}, not a gateway.sinks.base.SinkKind"
    if not callable(found.online):
        return "has no factory in `online`"
    try:
        mode = found.config().mode
    except Exception as error:  # a third party's class
        return f"has a config without defaults ({type(error).__name__}: {error})"
    return "" if mode in MODES else f"has a config whose `mode` is {mode!r}, not one of {MODES}"


def _broken(text: str) -> SinkKind:
    def unusable(*_: Any) -> Sink:
        return Unusable(text)

    return SinkKind(BrokenConfig, unusable, unusable)
