"""Where a gateway listens, and what keeps strangers out."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.app import ENVIRONMENT, INSECURE, KEYFILE, addresses, guard_of
from gateway.config import Config, build, load, with_gateway
from gateway.errors import BadConfig
from rank_client.rendezvous import ipc_address
from rank_client.wire.keys import Key, read_keyfile, write_keyfile

TCP = ["ipc:///x", "tcp://10.0.0.1:5717"]


@pytest.fixture
def config() -> Config:
    return build({}, "the defaults")


@pytest.mark.parametrize(
    ("bind", "address"),
    [
        ("tcp://127.0.0.1:9", "tcp://127.0.0.1:9"),
        ("tcp://127.0.0.1", "tcp://127.0.0.1:5717"),
        ("tcp://localhost:9", "tcp://127.0.0.1:9"),
        ("tcp://[::1]:9", "tcp://[::1]:9"),
    ],
)
def test_an_address_is_added_to_this_nodes_socket(tmp_path: Path, bind: str, address: str) -> None:
    """The ipc socket is always there; names become addresses, the port is 5717 by default."""
    assert addresses(tmp_path, bind, False, "") == [ipc_address(tmp_path), address]


def test_without_bind_no_network_is_listened_on(tmp_path: Path) -> None:
    """ipc means this node only."""
    assert addresses(tmp_path, "ipc", False, "") == [ipc_address(tmp_path)]


@pytest.mark.parametrize("bind", ["tcp://*:1", "tcp://0.0.0.0:1", "tcp://[::]:1"])
def test_every_network_at_once_needs_insecure(tmp_path: Path, bind: str) -> None:
    """A wildcard is refused with what to give instead; --insecure takes it."""
    with pytest.raises(BadConfig, match=r"tcp://10\.0\.0\.1:1, or tcp alone"):
        addresses(tmp_path, bind, False, "")
    assert addresses(tmp_path, bind, True, "")[1] == bind


@pytest.mark.parametrize("bind", ["", "udp://x:1", "tcp://", "tcp://:1", "tcp://h:x", "10.0.0.1:1"])
def test_what_is_no_address_is_refused(tmp_path: Path, bind: str) -> None:
    """The message names the forms there are."""
    with pytest.raises(BadConfig, match="bind must be"):
        addresses(tmp_path, bind, False, "")


def test_tcp_alone_needs_to_know_where_the_nodes_meet(tmp_path: Path) -> None:
    """Nowhere, or at an address no other node reaches: it says what to give."""
    with pytest.raises(BadConfig, match="MASTER_ADDR"):
        addresses(tmp_path, "tcp", False, "")
    with pytest.raises(BadConfig, match="loopback"):
        addresses(tmp_path, "tcp", False, "localhost")


def test_without_network_there_is_no_key(tmp_path: Path, config: Config) -> None:
    """An ipc gateway makes no keyfile."""
    assert guard_of(tmp_path, config, TCP[:1], False, {}) == ""
    assert not (tmp_path / KEYFILE).exists()


def test_a_key_is_made_once_where_none_is_named(tmp_path: Path, config: Config) -> None:
    """Mode 0600 in the data directory; the next start takes the same."""
    guard = guard_of(tmp_path, config, TCP, False, {})
    assert guard == str(tmp_path / KEYFILE)
    key = read_keyfile(Path(guard))
    assert len(set(key.secret)) > 8
    assert guard_of(tmp_path, config, TCP, False, {}) == guard
    assert read_keyfile(Path(guard)) == key


def test_which_key_is_taken(tmp_path: Path, config: Config) -> None:
    """The config's > RANKGATE_KEYFILE > RANKGATE_SECRET > the one in the data directory;
    --insecure takes none."""
    first, second = tmp_path / "first", tmp_path / "second"
    write_keyfile(first, Key(b"1" * 32))
    write_keyfile(second, Key(b"2" * 32))
    named = with_gateway(config, keyfile=str(first))
    environ = {"RANKGATE_KEYFILE": str(second), "RANKGATE_SECRET": "33" * 32}
    assert guard_of(tmp_path, named, TCP, False, environ) == str(first)
    assert guard_of(tmp_path, config, TCP, False, environ) == str(second)
    del environ["RANKGATE_KEYFILE"]
    assert guard_of(tmp_path, config, TCP, False, environ) == ENVIRONMENT
    assert guard_of(tmp_path, named, TCP, True, environ) == INSECURE
    assert not (tmp_path / KEYFILE).exists()


def test_a_key_that_cannot_be_used_is_not_passed_over(tmp_path: Path, config: Config) -> None:
    """A named key that is missing or no secret is an error, never a reason for another one."""
    missing = with_gateway(config, keyfile=str(tmp_path / "none"))
    with pytest.raises(BadConfig, match="No such file"):
        guard_of(tmp_path, missing, TCP, False, {})
    with pytest.raises(BadConfig, match="RANKGATE_SECRET must be"):
        guard_of(tmp_path, config, TCP, False, {"RANKGATE_SECRET": "hunter2"})


def test_a_keyfile_in_a_config_is_relative_to_it(tmp_path: Path) -> None:
    """`keyfile = "k"` is beside the config, wherever the gateway is started."""
    (tmp_path / "gateway.toml").write_text('[gateway]\nkeyfile = "k"\n')
    assert load(tmp_path / "gateway.toml").gateway.keyfile == str(tmp_path / "k")
