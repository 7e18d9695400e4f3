"""Ingest: one thread that receives, deduplicates, appends, commits and only then acknowledges.

`peers.py` is the protocol without I/O, `media.py` takes the bytes of files, `listener.py` is the
loop around them that owns the sockets and the clock. Writes journals and live.json, nothing else.
"""
