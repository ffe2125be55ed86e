"""`inferwatch guards`: run guards in a process of their own."""

import typer

from inferwatch.config import load
from inferwatch.options import ConfigOption

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.callback()
def _several() -> None:
    """Keep `guards serve` a command of two words, however many there are."""


@app.command()
def serve(config: ConfigOption = None) -> None:
    """Run the guards with `where = "sidecar"` in this process and its workers, until SIGTERM or Ctrl-C.

    Example: inferwatch guards serve --config inferwatch.toml
    """
    from collector.guards.sidecar import run_sidecar  # noqa: PLC0415  # each command loads its own room

    run_sidecar(load(config).collector.guards)
