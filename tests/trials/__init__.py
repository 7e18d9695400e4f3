"""Trials: each a program that tries to break one promise with real processes.

A trial prints its seed first and one JSON line of figures at the end, and exits with 1 when a
promise is broken. Full sizes run by `make`, small ones by pytest.
"""
