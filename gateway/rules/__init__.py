"""The rules: what a journal means. Which rank's items pass, which launch a stream belongs to, how
a run ended. Pure: entries in, changes out; no clock, no file, no table is read here.

`project.py` is the core, `gate.py` and `generations.py` are its two decisions; `follow.py` is the
process around it.
"""
