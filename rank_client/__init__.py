"""Log from every rank of a distributed training job, without ever waiting for it.

    import rank_client
    run = rank_client.init(project="digits")        # the same call on every rank
    run.log({"train/loss": loss}, step=step)

Importing starts nothing. Imports pyzmq and msgpack only; torch and numpy are never imported.
"""

from .run import Run, init

__all__ = ["Run", "init"]
