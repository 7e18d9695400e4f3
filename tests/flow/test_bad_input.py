"""Bad input gets one paragraph that says what happened and what to do, a code, no traceback."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from .job import Job


def assert_paragraph(result: tuple[int, str, str], *words: str) -> None:
    code, _, err = result
    assert code != 0
    assert "Traceback" not in err
    assert "\n\n" not in err.strip()
    flat = " ".join(err.split())
    for word in words:
        assert word in flat, (word, err)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[gateway]\ndrain_second = 3\n", ["gateway.drain_second", "gateway.drain_seconds"]),
        ("[sinks.clearm]\n", ["sinks.clearm", "sinks.clearml"]),
        ("[sinks.neptune]\nmod = 'offline'\n", ["sinks.neptune.mod", "sinks.neptune.mode"]),
        ("[gateway]\ndrain_seconds = 'soon'\n", ["gateway.drain_seconds", "expected"]),
        ("[sinks.hub]\nprotocol = 'old'\n", ["sinks.hub.protocol", "one of 'platform', 'legacy'"]),
        ("[sinks]\nhub = 3\n", ["sinks.hub", "must be a table"]),
        ("[gateway\n", ["is not valid TOML"]),
        ("[gateway]\nbind = 'tcp://0.0.0.0:5717'\n", ["gateway.bind", "every network"]),
        ("[gateway]\nbind = 'somewhere'\n", ["gateway.bind", "tcp://ADDRESS:PORT"]),
    ],
)
def test_config(tmp_path: Path, text: str, words: list[str]) -> None:
    """A bad config names the file, the key's full path and, if there is one, the nearest name."""
    with Job(tmp_path) as job:
        config = tmp_path / "gateway.toml"
        config.write_text(text)
        assert_paragraph(job.cli("serve", "--config", str(config)), *words)


def test_missing_config(tmp_path: Path) -> None:
    """A config file that is not there is named."""
    with Job(tmp_path) as job:
        assert_paragraph(job.cli("serve", "--config", "/no/such.toml"), "/no/such.toml")


def test_unwritable_directory(tmp_path: Path) -> None:
    """A data directory that cannot be made is named, with the option that changes it."""
    with Job(tmp_path) as job:
        (tmp_path / "file").write_text("")
        where = str(tmp_path / "file" / "data")
        assert_paragraph(job.cli("serve", "--dir", where), where, "--dir")


def test_port_in_use(tmp_path: Path) -> None:
    """A taken port is named, with the option that changes it."""
    with Job(tmp_path) as job, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        assert_paragraph(job.cli("serve", "--bind", address), address, "--bind")


def test_second_gateway(tmp_path: Path) -> None:
    """A second gateway on one directory is refused, and the first goes on."""
    with Job(tmp_path) as job:
        first = job.serve()
        assert_paragraph(job.cli("serve"), "another gateway", str(job.data))
        assert first.poll() is None


@pytest.mark.parametrize("command", ["show", "query", "tail", "replay"])
def test_unknown_run(tmp_path: Path, command: str) -> None:
    """An unknown run is named, and where it was looked for."""
    with Job(tmp_path) as job:
        more = {"query": ["train/loss"], "replay": ["--to", "hub=offline"]}.get(command, [])
        result = job.cli(command, "nosuch", *more)
        assert_paragraph(result, "nosuch")


def test_damaged_journal(tmp_path: Path) -> None:
    """A journal with flipped bytes: its good part is served, the damage is said, and how to have
    the rest from the spool, in another data directory."""
    with Job(tmp_path) as job:
        job.serve()  # it is there first, so that the rows come in many frames
        job.rank(0, 1, 400, "finish", 0.002)
        job.processes[-1].communicate(timeout=60)
        job.drain()
        job.stop_gateway(15)
        run_dir = job.data / "runs/r1"
        [segment] = (run_dir / "journal").glob("*.log")
        data = bytearray(segment.read_bytes())
        middle = len(data) // 2
        data[middle : middle + 64] = bytes(64)
        segment.write_bytes(data)
        for path in run_dir.glob("series.db*"):
            path.unlink()
        code, _out, err = job.cli("replay", "r1", "--to", "clearml=offline")
        assert "Traceback" not in err
        assert "not readable" in err
        assert f"journal/{segment.name}" in err
        assert code != 0
        with job.reader() as reader:
            kept = len(reader.points("train/loss"))
            lost = sum(n for *_, n, _ in reader.losses())
            unknown = sum(n for *_, n, _ in reader.quarantine())  # their schema was in there
        assert 100 < kept < 400
        assert kept + lost + unknown == 400
        job.assert_accounted()
        for words in (("query", "r1", "train/loss"), ("show", "r1")):
            result = job.cli(*words)
            assert_paragraph(result, "journal of run r1 is damaged", "not readable")
            assert "train/loss" in result[1]
        code, out, err = job.cli("drain", "--seconds", "60")
        assert (code, "delivered" in out) == (65, True), (out, err)
        ship = " ".join(err.split()).partition("data directory: ")[2].rstrip(".")
        words = ship.replace("COPY", str(tmp_path / "copy")).replace("NEW", str(tmp_path / "new"))
        assert job.start("sh", "-c", words).wait(60) == 0, ship
        job.stop_gateway(15)
        job.data = tmp_path / "new"
        job.environ["RANKGATE_DIR"] = str(job.data)
        job.drain()
        job.assert_all_there()


def test_a_sink_whose_package_is_missing(tmp_path: Path) -> None:
    """The sink is off and says the pip command; everything else goes on."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text("import sys\nsys.modules['neptune'] = None\n")
    with Job(tmp_path, NEPTUNE_API_TOKEN="x", NEPTUNE_PROJECT="a/b") as job:
        job.environ["PYTHONPATH"] += f":{blocked}"
        job.rank(0, 1, 10, "finish", RANKGATE_MODE="offline")
        job.processes[-1].communicate(timeout=60)
        code, out, err = job.cli("drain", "--sink", "neptune", "--sink", "clearml=offline")
        assert code == 0, (out, err, job.log())
        assert "pip install" in job.log()
        from gateway.sinks.store import read_views

        views = {v.name: v for v in read_views(job.data / "runs/r1")}
        assert views["neptune"].state == "off"
        assert "pip install 'rankgate[neptune]'" in views["neptune"].reason
        assert views["clearml"].state == "exported"
        job.assert_all_there()
