"""The journal: the truth and a total order, one per run. Ingest writes it; anyone reads it.

`writer.py` appends and commits, `reader.py` follows what is committed. Touches only files, through
the segments it shares with the spool.
"""
