"""The gateway: takes what every rank logs, stores it, says so, and passes it on.

    ranks ──▶ ingest ──▶ journal ──▶ rules ──▶ series + feed ──▶ sinks ──▶ Neptune, ClearML, HUB
                                                    └──▶ view: command line

Each arrow is a file that the next part reads; each part is a process that may die at any
instruction and goes on from disk. `app.py` says which process runs what.
"""
