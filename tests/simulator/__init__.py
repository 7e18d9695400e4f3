"""A whole deployment in one process, driven by one random seed: the same cores that run for real
(client session, spool, gateway session, journal, rules, sink loop), on simulated disks, a hostile
network, and a clock that jumps.

`disk.py` and `network.py` are the world's matter, `stores.py` stands in for SQLite and a backend,
`parts.py` holds the processes, `world.py` the schedule of what befalls them, `checks.py` the
promises, `mutants.py` the planted bugs that the promises must catch.

    python -m tests.simulator --seeds 10000      python -m tests.simulator --seed 4711
"""
