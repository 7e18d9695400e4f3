"""The frames that the gateway sends: what a stream has on disk, and what it may send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rank_client.wire import frames
from rank_client.wire.frames import Code, Type

from .room import Room
from .streams import Stream

Reply = tuple[bytes, bytes]  #: (peer, frame)


class Answers:
    """Makes them; `stop(run)` says whether somebody has asked that a run should end."""

    def __init__(self, session: int, room: Room, stop: Callable[[str], bool]) -> None:
        self._session = session
        self._room = room
        self._stop = stop

    def welcome(self, now_ns: int, stream: Stream) -> Reply:
        body = {
            "v": frames.MAJOR,
            "nonce": stream.nonce,
            "journal": stream.journal.uuid,
            "durable": min(stream.durable, stream.high_water),
            "now": now_ns,
            **self._credit_body(stream),
        }
        return stream.peer, self._frame(Type.WELCOME, stream, body)

    def ack(self, stream: Stream) -> Reply:
        """With `back`, where to begin again, once there is room for what was dropped."""
        body = self.ack_body(stream)
        if stream.dropped and body["credit"]:
            body["back"] = stream.high_water + 1
            stream.dropped = False
        return stream.peer, self._frame(Type.ACK, stream, body)

    def back(self, stream: Stream) -> Reply:
        """What came does not follow what is here: begin again behind that."""
        body = {**self.ack_body(stream), "back": stream.high_water + 1}
        return stream.peer, self._frame(Type.ACK, stream, body)

    def pong(self, now_ns: int, stream: Stream, sent: Any) -> Reply:
        """`sent`: the time that stood in the PING."""
        body = {**self.ack_body(stream), "t": sent, "now": now_ns}
        return stream.peer, self._frame(Type.PONG, stream, body)

    def bye_ack(self, stream: Stream, peer: bytes) -> Reply:
        return peer, self._frame(Type.BYE_ACK, stream, {"durable": stream.durable})

    def unknown(self, peer: bytes, stream: bytes) -> Reply:
        """Nothing is known of a stream in this session: it says HELLO again."""
        return peer, frames.control(Type.UNKNOWN, self._session, stream, {})

    def reject(
        self, peer: bytes, stream: bytes, code: Code, text: str, retry_seconds: int, nonce: Any
    ) -> Reply:
        """For good, or with `retry_seconds` until then."""
        body: dict[str, Any] = {"code": code.value, "text": text, "fatal": not retry_seconds}
        if retry_seconds:
            body["retry_seconds"] = retry_seconds
        if code is Code.VERSION:
            body["v"] = [frames.MAJOR, frames.MAJOR]
        if nonce is not None:
            body["nonce"] = nonce
        return peer, frames.control(Type.REJECT, self._session, stream, body)

    def ack_body(self, stream: Stream) -> dict[str, Any]:
        body = {"durable": stream.durable, **self._credit_body(stream)}
        if not stream.file and self._stop(stream.run):
            body["stop"] = True
        return body

    def _credit_body(self, stream: Stream) -> dict[str, Any]:
        lacking = self._room.lacking(stream.run)
        return {"credit": 0, "full": lacking} if lacking else {"credit": self._room.credit_bytes}

    def _frame(self, type_: Type, stream: Stream, body: dict[str, Any]) -> bytes:
        return frames.control(type_, self._session, stream.id, body)
