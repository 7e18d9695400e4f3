"""The gateway's config: read and checked once, at start; messages name the key's full path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec

from rank_client.rendezvous import MAX_PORT

from .errors import BadConfig
from .sinks import registry
from .sinks.base import MAX_SECONDS, SinkConfig

MAX_MIB = 1 << 30  #: a pebibyte: more is no size of a disk, but a slip
MAX_GIB = MAX_MIB >> 10

_TCP = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.]+\]|[^:/]+)(:(?P<port>\d{1,5}))?")

Mib = Annotated[int, msgspec.Meta(ge=0, le=MAX_MIB)]
Gib = Annotated[float, msgspec.Meta(ge=0, le=MAX_GIB)]


class GatewayConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`[gateway]`."""

    bind: str = "ipc"  #: "ipc", "tcp" (the way to MASTER_ADDR), or "tcp://ADDRESS:PORT"
    keyfile: str = ""  #: for tcp; relative to this file. Empty: one in the data directory
    #: how long the sinks may take after the last rank has gone
    drain_seconds: Annotated[float, msgspec.Meta(ge=0, le=MAX_SECONDS)] = 60.0
    #: MiB of events on their way in memory, over all ranks
    budget_mib: Annotated[int, msgspec.Meta(ge=1, le=MAX_MIB)] = 128
    #: MiB of the disk that stay free: below that nothing is taken until there is more room
    reserve_mib: Mib = 256
    #: GiB that a run's journal and files may fill; 0: the whole disk
    run_quota_gib: Gib = 0.0
    #: which checkpoints of a run stay once its sinks have them: all, of each name and rank the
    #: newest best, or the newest; final ones always do
    checkpoints: Literal["all", "best", "last"] = "all"
    #: GiB that a run's checkpoints may fill; 0: no cap. The newest and final ones stay
    checkpoints_gib: Gib = 0.0
    max_sink_processes: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 8


class Config(msgspec.Struct, frozen=True):
    """The whole file, and what the command line added to it."""

    gateway: GatewayConfig
    sinks: dict[str, SinkConfig]
    source: str  #: where it was read from, for messages


def load(path: Path | None, extra_sinks: tuple[str, ...] = ()) -> Config:
    """Read a TOML file (None: the defaults) and add `NAME[=online|offline]` sinks.

    Raises BadConfig.
    """
    source = str(path) if path else "the defaults"
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            raw = msgspec.toml.decode(path.read_bytes())
        except OSError as error:
            raise BadConfig(f"cannot read the config {path}: {error.strerror}") from None
        except (msgspec.DecodeError, ValueError) as error:
            raise BadConfig(f"{path} is not valid TOML: {error}") from None
    config = build(raw, source, extra_sinks)
    if path is None or not config.gateway.keyfile:
        return config
    return with_gateway(config, keyfile=str(path.absolute().parent / config.gateway.keyfile))


def with_gateway(config: Config, **changes: Any) -> Config:
    """The same config with other values in `[gateway]`."""
    gateway = msgspec.structs.replace(config.gateway, **changes)
    return msgspec.structs.replace(config, gateway=gateway)


def build(raw: dict[str, Any], source: str, extra_sinks: tuple[str, ...] = ()) -> Config:
    """Check a config given as plain maps. Raises BadConfig."""
    _known(raw, "", ("gateway", "sinks"), source)
    tables = dict(_table(raw.get("sinks", {}), "sinks", source))
    for text in extra_sinks:
        name, _, mode = text.partition("=")
        if name not in registry.names():
            raise BadConfig(f"there is no sink {name!r}; {_hint(name, '', registry.names())}")
        if mode:
            tables[name] = {**_table(tables.get(name, {}), f"sinks.{name}", source), "mode": mode}
        else:
            tables.setdefault(name, {})
    _known(tables, "sinks.", tuple(registry.names()), source)
    gateway: GatewayConfig = _convert(raw.get("gateway", {}), GatewayConfig, "gateway", source)
    if not gateway.bind.startswith("ipc"):
        tcp_address(gateway.bind, f"{source}: gateway.bind")
    sinks = {name: _sink(name, table, source) for name, table in tables.items()}
    return Config(gateway, sinks, source)


def tcp_address(bind: str, key: str) -> tuple[str, int]:
    """Host, empty for `tcp` alone, and port, 0 where none is given. Raises BadConfig, which names
    the key it stands under."""
    found = _TCP.fullmatch(bind)
    if bind == "tcp":
        return "", 0
    if not found:
        raise BadConfig(f'{key} must be "ipc", "tcp" or "tcp://ADDRESS:PORT", not {bind!r}')
    if found["port"] and not 1 <= int(found["port"]) <= MAX_PORT:
        raise BadConfig(f"{key} is {bind}, whose port is not one of 1 to {MAX_PORT}")
    return found["host"].strip("[]"), int(found["port"] or 0)


def _sink(name: str, table: Any, source: str) -> SinkConfig:
    type_: Any = registry.kind(name).config
    if type_ is registry.BrokenConfig:
        return registry.BrokenConfig()
    found: SinkConfig = _convert(table, type_, f"sinks.{name}", source)
    return found


def _table(value: Any, path: str, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadConfig(f"{source}: {path} must be a table, not {type(value).__name__}")
    return value


def _known(raw: dict[str, Any], prefix: str, names: tuple[str, ...], source: str) -> None:
    for name in raw:
        if name not in names:
            hint = _hint(name, prefix, names)
            raise BadConfig(f"{source}: unknown key {prefix}{name}; {hint}")


def _hint(name: str, prefix: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(names)}"


def _convert(raw: Any, type_: type[Any], path: str, source: str) -> Any:
    _known(_table(raw, path, source), f"{path}.", type_.__struct_fields__, source)
    try:
        return msgspec.convert(raw, type_)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$")
        key = re.sub(r"[`$]", "", where)
        values = _choices(type_, key.lstrip("."))
        hint = f"; it is one of {values}" if values else ""
        raise BadConfig(f"{source}: {path}{key}: {text[0].lower()}{text[1:]}{hint}") from None


def _choices(type_: type[Any], name: str) -> str:
    """The values a key may have, where they are few."""
    for found in msgspec.structs.fields(type_):
        if found.name == name and get_origin(found.type) is Literal:
            return ", ".join(repr(value) for value in get_args(found.type))
    return ""
