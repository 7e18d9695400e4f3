"""Loggers measured by one loop, each in a process of its own: `python -m bench.rivals.NAME JSON`.

A module here imports its logger, the standard library and numpy only: most run in an environment
where rankgate is not installed.
"""
