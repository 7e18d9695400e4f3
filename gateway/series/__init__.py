"""The series: what the rules made of a journal, laid out for questions. One SQLite file a run.

`writer.py` is used by the rules alone; `reader.py` and `feed.py` open it read-only, fetch, and end
the transaction before they work with what they got.
"""
