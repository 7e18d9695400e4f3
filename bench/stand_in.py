"""A stand-in for a backend in a process of its own: `python -m bench.stand_in NAME`.

Prints the environment its clients need, then, for each line it is told, how many points it holds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from tests.servers.clearml import ClearmlServer
from tests.servers.hub_legacy import KEY as LEGACY_KEY
from tests.servers.hub_legacy import HubLegacyServer
from tests.servers.neptune import NeptuneServer, token
from tests.servers.platform import KEY, PlatformServer


def _clearml(server: ClearmlServer) -> int:
    return server.accepted_scalar_sends


def _neptune(server: NeptuneServer) -> int:
    return sum(len(p) for id_ in server.runs for p in server.series(id_).values())


def _hub(server: PlatformServer | HubLegacyServer) -> int:
    return sum(len(v) for m in server.models.values() for v in m.metrics.values())


def _serve(server: object, env: dict[str, str], count: Callable[[], int]) -> None:
    print(json.dumps(env), flush=True)
    for _ in sys.stdin:
        print(json.dumps(count()), flush=True)


def main() -> None:
    name = sys.argv[1]
    if name == "clearml":
        with ClearmlServer() as clearml:
            _serve(clearml, clearml.env, lambda: _clearml(clearml))
    elif name == "neptune":
        with NeptuneServer(("team/bench",)) as neptune:
            env = {"NEPTUNE_API_TOKEN": token(neptune.url), "NEPTUNE_PROJECT": "team/bench"}
            env["OAUTHLIB_INSECURE_TRANSPORT"] = "1"
            _serve(neptune, env, lambda: _neptune(neptune))
    elif name == "hub platform":
        with PlatformServer() as platform:
            env = {"ULTRALYTICS_API_KEY": KEY, "ULTRALYTICS_PLATFORM_URL": platform.url}
            _serve(platform, env, lambda: _hub(platform))
    else:
        with HubLegacyServer() as legacy:
            env = {"HUB_API_KEY": LEGACY_KEY, "ULTRALYTICS_HUB_API": legacy.url}
            _serve(legacy, env, lambda: _hub(legacy))


if __name__ == "__main__":
    main()
