"""One rank of a benchmark: `python -m bench.client JSON`, the real client in a real process.

Says `ready`, logs when told to, reports when all is acknowledged, and finishes when its input ends.
"""

from __future__ import annotations

import json
import os
import sys
import time

from .measure import rss_mb


def main() -> None:
    config = json.loads(sys.argv[1])
    memory = {"before_init": rss_mb()}
    os.environ |= {"RANKGATE_DIR": config["directory"], "RANKGATE_SPOOL": config["spool"]}
    import rank_client

    memory["imported"] = rss_mb()
    rank, size = config["rank"], config["world_size"]
    run = rank_client.init(run="bench", gateway=config["address"], rank=rank, world_size=size)
    memory["after_init"] = rss_mb()
    print(json.dumps("ready"), flush=True)
    sys.stdin.readline()
    before, cpu = time.monotonic(), time.process_time()
    values = {f"bench/m{i:03}": i * 0.37 for i in range(config["keys"])}
    for step in range(config["rows"]):
        run.log(values, step)
    logged = time.monotonic()
    session, last = run._sender.session, run._spool.last
    while session.durable < last:
        time.sleep(0.002)
    memory["after_log"] = rss_mb()
    result = {"started": before, "logged": logged, "acked": time.monotonic(), "memory": memory}
    result |= {"cpu_s": time.process_time() - cpu, "resent": session.resent_total}
    print(json.dumps(result), flush=True)
    sys.stdin.read()
    run.finish(seconds=5)


if __name__ == "__main__":
    main()
