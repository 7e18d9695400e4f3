"""Benchmarks: `python -m bench` measures what the README says of speed, on this machine.

One module per question (`log_cost`, `throughput`, `memory`, `queries`, `sinks`); `gateway.py` runs
the real processes, `measure.py` holds the arithmetic, `rivals/` the loggers we are compared with,
each in a process of its own. What is written goes below `bench/out/` and is removed at the end.
"""
