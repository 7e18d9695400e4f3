"""Ingest: one thread that receives, deduplicates, appends, commits and only then acknowledges.

`peers.py` is the protocol without I/O, with new streams in `opening.py`, credit in `room.py`, what
goes out in `answers.py`; `media.py` takes the bytes of files. `listener.py` is the loop around them
that owns the sockets, the open journals and the clock. Writes journals and live.json
(`telling.py`), nothing else.
"""
