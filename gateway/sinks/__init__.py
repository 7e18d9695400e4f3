"""The sinks: each carries one run's passed items to one backend, from a process of its own.

`base.py` is the contract, `loop.py` everything they share, `registry.py` which there are. A sink
reads series.db and media/, and writes its own `sinks/NAME.db` and nothing else.
"""
