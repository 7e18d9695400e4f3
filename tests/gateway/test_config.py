"""The gateway's config: what cannot be right is refused at start, by the key's full path."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from gateway.cli import main
from gateway.config import GatewayConfig, load
from gateway.errors import BadConfig
from gateway.sinks.hub.config import HubConfig
from rank_client.rendezvous import address_trouble

NUMBERS = [
    (table, field.name)
    for table, kind in (("gateway", GatewayConfig), ("sinks.hub", HubConfig))
    for field in msgspec.structs.fields(kind)
    if isinstance(field.default, int | float)
]


def read(folder: Path, text: str) -> object:
    path = folder / "gateway.toml"
    path.write_text(text)
    return load(path)


@pytest.mark.parametrize(("table", "key"), NUMBERS)
@pytest.mark.parametrize("value", ["-1", "-0.5", "nan", "inf", "-inf", "1e300", "9" * 18, "true"])
def test_a_number_that_cannot_be_right(tmp_path: Path, table: str, key: str, value: str) -> None:
    """Every number has bounds on both sides, and no place for what is no number."""
    with pytest.raises(BadConfig, match=f"gateway.toml: {table}.{key}: "):
        read(tmp_path, f"[{table}]\n{key} = {value}\n")


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("gateway", "max_sink_processes = 0"),
        ("gateway", "budget_mib = 0"),
        ("sinks.hub", "requests_per_minute = 0"),
        ("sinks.hub", "heartbeat_interval_seconds = 0"),
    ],
)
def test_a_zero_that_would_stop_everything(tmp_path: Path, table: str, line: str) -> None:
    """None at all of these is no gateway."""
    with pytest.raises(BadConfig, match=f"{table}.{line.split()[0]}: expected"):
        read(tmp_path, f"[{table}]\n{line}\n")


@pytest.mark.parametrize("port", ["0", "65536", "99999"])
def test_a_port_that_there_is_not(tmp_path: Path, port: str) -> None:
    """Is known when the config is read, not when somebody listens."""
    with pytest.raises(BadConfig, match=r"gateway\.bind is tcp:.*, whose port is not one"):
        read(tmp_path, f'[gateway]\nbind = "tcp://127.0.0.1:{port}"\n')


@pytest.mark.parametrize("bind", ["ipc", "tcp", "tcp://127.0.0.1", "tcp://[::1]:65535"])
def test_where_it_may_listen(tmp_path: Path, bind: str) -> None:
    """The forms that the README names."""
    read(tmp_path, f'[gateway]\nbind = "{bind}"\n')


@pytest.mark.parametrize(
    ("address", "fine"),
    [
        ("tcp://head:5717", True),
        ("tcp://[fe80::1]:1", True),
        ("ipc:///tmp/x", True),
        ("tcp://head:0", False),
        ("tcp://head:65536", False),
        ("tcp://head:-1", False),
        ("tcp://head", False),
        ("tcp://:5717", False),
        ("head:5717", False),
    ],
)
def test_an_address_that_ranks_are_given(address: str, fine: bool) -> None:
    """ZeroMQ itself takes ports that there are not, and would try for ever."""
    assert (address_trouble(address) == "") is fine


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("drain", "--seconds", "nan"), "--seconds takes 0 or more"),
        (("drain", "--seconds", "-1"), "--seconds takes 0 or more"),
        (("sweep", "--seconds", "inf"), "--seconds takes 0 or more"),
        (("sweep", "--address", "tcp://head:99999"), "--address tcp://head:99999: its port"),
        (("serve", "--bind", "tcp://127.0.0.1:99999"), "whose port is not one of 1 to"),
    ],
)
def test_the_same_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str
) -> None:
    """Refused before anything is waited for or sent."""
    assert main.run([*words, "--dir", str(tmp_path / "data")]) == BadConfig.exit_code
    assert told in " ".join(capsys.readouterr().err.split())
