"""Which sinks there are, and how each is made from its config; a vendor's package is imported by
the sink alone, when it is opened."""

from __future__ import annotations

from pathlib import Path

from .base import Sink
from .clearml import ClearmlConfig, ClearmlSink
from .clearml_export import ClearmlExport
from .hub.config import HubConfig
from .hub.export import HubExport
from .hub.legacy import LegacySink
from .hub.platform import PlatformSink
from .neptune import NeptuneConfig, NeptuneSink
from .neptune_export import NeptuneExport

SinkConfig = ClearmlConfig | NeptuneConfig | HubConfig

CONFIGS: dict[str, type[SinkConfig]] = {
    "clearml": ClearmlConfig,
    "neptune": NeptuneConfig,
    "hub": HubConfig,
}


def online(config: SinkConfig, scratch: Path) -> Sink:
    """The sink that talks to the service; `scratch` is a folder of its own."""
    if isinstance(config, ClearmlConfig):
        return ClearmlSink(config)
    if isinstance(config, NeptuneConfig):
        return NeptuneSink(config, scratch)
    return PlatformSink(config) if config.protocol == "platform" else LegacySink(config)


def export(config: SinkConfig, folder: Path, final: Path) -> Sink:
    """The sink that writes what the vendor's own tools can send later, into `folder`, which
    will be renamed to `final` when it is whole."""
    if isinstance(config, ClearmlConfig):
        return ClearmlExport(config, folder, final)
    if isinstance(config, NeptuneConfig):
        return NeptuneExport(config, folder)
    return HubExport(config, folder)
