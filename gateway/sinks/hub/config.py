"""The `[sinks.hub]` table. Keys and addresses are the vendor's variables, never in here."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ..base import MAX_SECONDS


class HubConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Settings of the HUB sink.

    Read from the environment instead: `ULTRALYTICS_API_KEY` (legacy also `HUB_API_KEY`),
    `ULTRALYTICS_PLATFORM_URL`, `ULTRALYTICS_HUB_API`.
    """

    mode: Literal["online", "offline"] = "online"  #: offline writes a request bundle
    protocol: Literal["platform", "legacy"] = "platform"
    project: str | None = None  #: platform only: "owner/project-slug"
    #: platform only, of all runs below one data directory; 100 are allowed, and a key may have
    #: other users
    requests_per_minute: Annotated[int, msgspec.Meta(ge=1, le=6000)] = 95
    #: between two checkpoints that are neither best nor final, on the ranks' clock; the newest one
    #: held back goes out at the end
    checkpoint_interval_seconds: Annotated[float, msgspec.Meta(ge=0, le=MAX_SECONDS)] = 900.0
    #: legacy only; beats go along with deliveries
    heartbeat_interval_seconds: Annotated[float, msgspec.Meta(ge=1, le=MAX_SECONDS)] = 300.0
