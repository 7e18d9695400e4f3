"""The secret: who can read or replace its file, and where else it may not stand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec

from gateway import app, supervise
from gateway.config import build
from gateway.sinks import registry
from gateway.sinks.base import SinkKind
from rank_client.redact import is_secret_name
from rank_client.wire import keys
from rank_client.wire.keys import BadKey, Key, read_keyfile, write_keyfile

from .row import Row, careless, needs_root, nothing, refused, without

SECRET = bytes(range(200, 232))
KEY = Key(SECRET)


def keyfile(root: Path) -> Path:
    path = root / "keys" / "k"
    write_keyfile(path, KEY)
    return path


def made_private(root: Path) -> None:
    with careless():
        path = keyfile(root)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def open_to_others(patched: Any) -> None:
    real = os.open
    patched.setattr(keys.os, "open", lambda path, flags, mode: real(path, flags, 0o666))


def readable_by_others(root: Path) -> None:
    path = keyfile(root)
    assert read_keyfile(path).secret == SECRET
    for mode in (0o640, 0o604, 0o620, 0o660):
        path.chmod(mode)
        assert refused(lambda: read_keyfile(path), BadKey), oct(mode)


def of_another_owner(root: Path) -> None:
    needs_root()
    path = keyfile(root)
    os.chown(path, 65534, 65534)
    assert refused(lambda: read_keyfile(path), BadKey)


def replaceable(root: Path) -> None:
    path = keyfile(root)
    for mode in (0o770, 0o777, 0o1777):
        path.parent.chmod(mode)
        assert refused(lambda: read_keyfile(path), BadKey), oct(mode)


def behind_a_link(root: Path) -> None:
    path = keyfile(root)
    (path.parent / "link").symlink_to(path)
    assert refused(lambda: read_keyfile(path.parent / "link"), BadKey)


def never_shown(_: Path) -> None:
    shown = f"{KEY} {KEY!r} {[KEY]}"
    assert not any(form in shown for form in (str(SECRET), SECRET.hex(), repr(SECRET)[2:-1]))


def supervisor(root: Path, text: str) -> supervise.Supervisor:
    """One that is not started, of a gateway on a network whose secret is in the environment."""
    config = build({"sinks": {"clearml": {}}}, "a test")
    where = ["ipc:///nowhere", "tcp://127.0.0.1:1"]
    with patch.dict(os.environ, {"RANKGATE_SECRET": text}):
        guard = app.guard_of(root, config, where, False, os.environ)
        return supervise.Supervisor(root, config, where, guard, True)


def not_on_a_command_line(root: Path) -> None:
    """Everybody on the node can read the words a process was started with."""
    text = SECRET.hex()
    made = supervisor(root, text)
    for child in (made._ingest, made._rules):
        assert text not in " ".join(child.command)


def not_for_vendors(root: Path) -> None:
    """A vendor's package may record the environment of its process."""
    made = supervisor(root, SECRET.hex())
    assert made._environ["RANKGATE_SECRET"] == SECRET.hex()  # ingest needs it
    assert SECRET.hex() not in made._sink_environ.values()


def with_all_of_it(patched: Any) -> None:
    real = supervise.Supervisor.__init__

    def careless(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        self._sink_environ = self._environ

    patched.setattr(supervise.Supervisor, "__init__", careless)


def no_secret_in_a_config(_: Path) -> None:
    """A sink's config is handed to its process as an argument, so it must not be able to hold a
    secret: tokens come from the environment."""
    for kind in registry.BUILT_IN.values():
        assert [n for n in kind().config.__struct_fields__ if is_secret_name(n)] == []


class Leaky(msgspec.Struct):
    api_key: str = ""


def leaky() -> SinkKind:
    return SinkKind(Leaky, nothing)


THREAT = "key handling"

ROWS = [
    Row(THREAT, "a keyfile is made 0600 in 0700", made_private, open_to_others),
    Row(THREAT, "its mode is checked", readable_by_others, without(keys, "_check_file", nothing)),
    Row(THREAT, "its owner is checked", of_another_owner, without(keys, "_check_file", nothing)),
    Row(THREAT, "its folder is checked", replaceable, without(keys, "_check_directory", nothing)),
    Row(THREAT, "no link is followed", behind_a_link, without(keys.os, "O_NOFOLLOW", 0)),
    Row(THREAT, "no repr has it", never_shown, without(Key, "__repr__", lambda k: str(k.secret))),
    Row(
        THREAT,
        "no command line has it",
        not_on_a_command_line,
        without(app, "ENVIRONMENT", SECRET.hex()),
    ),
    Row(THREAT, "no vendor gets it", not_for_vendors, with_all_of_it),
    Row(
        THREAT,
        "no config can hold a secret",
        no_secret_in_a_config,
        lambda patched: patched.setitem(registry.BUILT_IN, "leaky", leaky),
    ),
]
