"""From `[sinks]` to sinks: the table `[sinks.NAME]` is built by `sinks.NAME.build`."""

from importlib import import_module
from typing import cast

from sinks.config import SinksConfig
from sinks.delivery import Sink


def build_sink(config: SinksConfig, name: str) -> Sink:
    """The sink of one table. Raises `SinkSetupError`, one sentence, when a file is missing or a setting can't be."""
    return cast("Sink", import_module(f"sinks.{name}").build(getattr(config, name)))


def build_sinks(config: SinksConfig) -> list[Sink]:
    """All sinks that have a table, in the order of the fields. Raises `SinkSetupError`."""
    return [build_sink(config, name) for name in config.names]
