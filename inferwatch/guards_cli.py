"""`inferwatch guards`: run guards in a process of their own, judge them, train the classifier, make a bank."""

from pathlib import Path
from typing import Annotated

import orjson
import typer

from inferwatch import guards_check
from inferwatch.config import load
from inferwatch.options import ConfigOption, JsonOption

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


@app.command()
def bank(
    files: Annotated[list[Path], typer.Argument(help=".jsonl or .jsonl.gz rows: text, and label, 0 for harmless.")],
    out: Annotated[Path, typer.Option(help="The bank to write, safetensors; it holds no text.")],
    model: Annotated[Path | None, typer.Option(help="Folder of an embedding model. Unset: hashed n-grams.")] = None,
    similar: Annotated[float, typer.Option(min=0.01, max=0.99, help="Cosine to print the figures for.")] = 0.6,
    as_json: JsonOption = False,
) -> None:
    """Make the bank of the similarity guard from attacks that you have seen, and say what it would find.

    Example: inferwatch guards bank blocked.jsonl --out bank.safetensors
    """
    from collector.guards.bank import make_bank, read_rows  # noqa: PLC0415
    from collector.guards.local_model import ModelConfig  # noqa: PLC0415
    from collector.guards.similarity import embedder  # noqa: PLC0415

    attacks, harmless = read_rows(files)
    embed = embedder(None if model is None else ModelConfig(folder=model))
    with guards_check.progress("embedding") as tick:
        raw, figures = make_bank(attacks, harmless, embed, similar, tick)
    out.write_bytes(raw)
    if as_json:
        typer.echo(orjson.dumps(figures._asdict()).decode())
        return
    typer.echo(f"{figures.attacks} attacks in {figures.rows} rows; at a cosine of {figures.similar}:")
    typer.echo("  of a fifth left out, the rest finds {} of {}".format(*figures.left_out_found))
    typer.echo("  of the harmless texts, it takes {} of {} for attacks".format(*figures.harmless_flagged))
