"""Who is there: streams that should have been heard, and processes that say they are one rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rank_client.wire import frames
from rank_client.wire.frames import Type

from .streams import Stream

UNHEARD_NS = 6 * 10**9  #: a ping missed: is it connected at all?


def unheard(streams: Iterable[Stream], now_ns: int) -> Iterator[tuple[Stream, bytes]]:
    """Streams that should have been heard, each with a frame that it ignores, as it is of no
    session: the shell sends that, and notes on the stream whether it can."""
    for stream in streams:
        if stream.file or stream.ended or not stream.peer:
            continue
        if now_ns - stream.heard_ns > UNHEARD_NS:
            yield stream, frames.control(Type.ACK, 0, stream.id, {})
        else:
            stream.link = "up"


def superseded(streams: Iterable[Stream], run: str) -> dict[bytes, Stream]:
    """Older stream → the newer one, where two processes that live say they are one rank.

    Which is older is told by the journal, which has their openings in order.
    """
    ranks: dict[Any, list[Stream]] = {}
    for s in streams:
        if s.run == run and s.kind == "live" and not (s.ended or s.silent):
            ranks.setdefault(s.about["rank"], []).append(s)
    out: dict[bytes, Stream] = {}
    for rank, lives in ranks.items():
        if rank is not None and len(lives) > 1:
            order = {id_: n for n, id_ in enumerate(lives[0].journal.streams)}
            lives.sort(key=lambda s: order[s.id])
            out.update({s.id: lives[-1] for s in lives[:-1]})
    return out
