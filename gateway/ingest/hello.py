"""What a HELLO and a BYE say: checked before anything is done about them."""

from __future__ import annotations

from itertools import islice
from typing import Any

from rank_client.wire import frames
from rank_client.wire.frames import Code
from rank_client.wire.keys import valid_run_id
from rank_client.wire.records import MAX_DEPTH, BadRecord, check_nesting

from .streams import TOLD_CHARACTERS, Stream

MAX_NUMBER = 1 << 62  #: sums of numbers still fit the 64 bits of a column
HELLO_KINDS = ("live", "replay", "tool", "worker", "blob")

SPEAKS = f"this gateway speaks protocol {frames.MAJOR} only; install the same rankgate on both"


class Rejected(Exception):
    """A HELLO that is answered with REJECT; for good without `retry_seconds`."""

    def __init__(self, code: Code, text: str, retry_seconds: int = 0) -> None:
        super().__init__(text)
        self.code = code
        self.retry_seconds = retry_seconds


def check_hello(body: dict[str, Any]) -> None:
    """Raises Rejected for what cannot be of any stream."""
    versions, run = body.get("v"), body.get("run")
    if not (isinstance(versions, list) and [type(v) for v in versions] == [int, int]):
        raise Rejected(Code.HELLO, "no protocol versions")
    if not versions[0] <= frames.MAJOR <= versions[1]:
        raise Rejected(Code.VERSION, SPEAKS)
    if not (isinstance(run, str) and valid_run_id(run)):
        raise Rejected(Code.HELLO, "a run id must match [A-Za-z0-9._-]{1,64}")
    if body.get("kind") not in HELLO_KINDS:
        raise Rejected(Code.HELLO, "an unknown kind of stream")
    first = body.get("first", 1)
    if not (isinstance(first, int) and 0 <= first <= MAX_NUMBER):
        raise Rejected(Code.HELLO, "a first number that cannot be")
    try:
        check_nesting(body, MAX_DEPTH - 1)  # the journal's `open` entry is one level around it
    except BadRecord as error:
        raise Rejected(Code.HELLO, str(error)) from None


def check_same(stream: Stream, body: dict[str, Any]) -> None:
    """Raises Rejected for a HELLO that cannot be of the stream that has its id."""
    if stream.run != body["run"]:
        raise Rejected(Code.STREAM, "this stream belongs to another run")
    if (stream.file is not None) != (body["kind"] == "blob"):
        raise Rejected(Code.STREAM, "this stream is of another kind")
    if stream.file:
        blob = stream.file.blob
        if (blob.sha256, blob.size_bytes) != (body.get("sha256"), body.get("size")):
            raise Rejected(Code.STREAM, "this stream is of another file")


def had_more(stream: Stream, body: dict[str, Any]) -> bool:
    """Was more of it acknowledged than this journal has, or by another journal?"""
    journal, acked = body.get("journal"), body.get("acked")
    if not isinstance(journal, bytes) or not isinstance(acked, int):
        return False
    return journal != stream.journal.uuid or acked > stream.high_water


def refusals(body: dict[str, Any]) -> dict[str, Any]:
    """What a stream says at its end of the calls and values that stand in no record."""
    out: dict[str, Any] = {}
    for name in ("refused", "bad"):
        if isinstance(n := body.get(name), int) and 0 < n <= MAX_NUMBER:
            out[name] = n
    owed = body.get("owed")
    if isinstance(owed, dict):
        told = {k[:TOLD_CHARACTERS]: n for k, n in islice(owed.items(), 64) if type(n) is int}
        out |= {"owed": told} if told else {}
    return out
