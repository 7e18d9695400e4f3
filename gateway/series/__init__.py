"""The series: what the rules made of a journal, laid out for questions. One SQLite file a run.

`writer.py` is used by the rules alone; `reader.py` opens it read-only, fetches, and ends the
transaction before it works with what it got: rows by `columns.py`, the rest as in `tables.py`.
"""
