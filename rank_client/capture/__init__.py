"""What is recorded without being logged: console, machine, source.

`console.py` puts a pipe over the descriptors 1 and 2, and `copier.py`, a process of its own, copies
what comes out of it to where it went before; `machine.py` samples the node; `source.py` finds out
which code this is. Nothing is imported here: the copier starts without the rest of the package.
"""
