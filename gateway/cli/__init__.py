"""The command line: one file per command that parses, calls and prints; nothing is decided here.

Each module has a function `command`; `main.py` registers it and turns errors into a paragraph.
"""
