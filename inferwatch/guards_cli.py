"""`inferwatch guards`: run guards in a process of their own, judge them, and train the classifier."""

import typer

from inferwatch import guards_check
from inferwatch.config import load
from inferwatch.options import ConfigOption

app = typer.Typer(no_args_is_help=True, help=__doc__)
app.command()(guards_check.check)
app.command()(guards_check.train)


@app.command()
def serve(config: ConfigOption = None) -> None:
    """Run the guards with `where = "sidecar"` in this process and its workers, until SIGTERM or Ctrl-C.

    Example: inferwatch guards serve --config inferwatch.toml
    """
    from collector.guards.sidecar import run_sidecar  # noqa: PLC0415  # each command loads its own room

    run_sidecar(load(config).collector.guards)
