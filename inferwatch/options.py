"""Options that several commands of the command line have."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="The configuration file.", envvar="INFERWATCH_CONFIG")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]

MOMENTS = ["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S.%fZ"]
"""How a time is written on the command line: UTC."""


class Source(StrEnum):
    """Where events are read."""

    kafka = "kafka"
    store = "store"
