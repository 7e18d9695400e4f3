"""A job that fills the disk: it is told to wait, before nobody else can write any more."""

from __future__ import annotations

from pathlib import Path

from gateway.ingest import limits
from gateway.ingest.limits import Limits, Watch
from tests.gateway.ingest.test_peers import A, B, Gateway

from .row import Row, without


def the_reserve_is_kept(root: Path) -> None:
    """Below the reserve every answer gives credit 0, and what comes all the same is not taken."""
    gateway = Gateway(root)
    gateway.hello()
    watch = Watch(root, Limits(reserve_bytes=1 << 62))
    gateway.peers.room.full = watch.full(gateway.peers.room.full)
    assert gateway.hello(B).body["credit"] == 0
    [(_, pong)] = gateway.ping()
    assert (pong.body["credit"], pong.body.get("full")) == (0, "disk")
    gateway.data(1)
    assert gateway.peers.streams[A].high_water == 0


def the_quota_is_kept(root: Path) -> None:
    """The same for one run that has filled its share, and for that run alone."""
    (root / "runs/r/journal").mkdir(parents=True)
    (root / "runs/r/journal/1.log").write_bytes(bytes(1000))
    gateway = Gateway(root)
    gateway.hello()
    watch = Watch(root, Limits(reserve_bytes=0, run_quota_bytes=1000))
    watch.look(False, ["r", "other"])
    gateway.peers.room.over_quota = watch.over_quota
    [(_, pong)] = gateway.ping()
    assert (pong.body["credit"], pong.body.get("full")) == (0, "quota")
    gateway.data(1)
    assert gateway.peers.streams[A].high_water == 0
    assert gateway.hello(B, run="other").body["credit"] > 0
    assert [alarm for alarm in watch.alarms if "run r" in alarm]


THREAT = "a disk is filled"

ROWS = [
    Row(THREAT, "the reserve", the_reserve_is_kept, without(Watch, "full", lambda *_: False)),
    Row(THREAT, "a run's quota", the_quota_is_kept, without(limits, "stored_bytes", lambda _: 0)),
]
