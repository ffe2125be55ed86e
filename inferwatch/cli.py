"""The command line: `inferwatch …`. Each command loads only its room, and says one sentence when it fails."""

import asyncio
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from inferwatch import (
    budget_cli,
    deadletter_cli,
    evidence_cli,
    findings_cli,
    guards_cli,
    keys_cli,
    lookup_cli,
    record_cli,
    topics_cli,
)
from inferwatch.config import Config, describe, load
from inferwatch.entry import telling
from inferwatch.options import MOMENTS, ConfigOption, JsonOption, Source

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
config_app = typer.Typer(no_args_is_help=True, help="Look at the configuration.")
dashboards_app = typer.Typer(no_args_is_help=True, help="Dashboards for Grafana.")
app.add_typer(config_app, name="config")
app.add_typer(keys_cli.app, name="keys")
app.add_typer(dashboards_app, name="dashboards")
app.add_typer(budget_cli.app, name="budget")
app.add_typer(deadletter_cli.app, name="deadletter")
app.add_typer(guards_cli.app, name="guards")
app.add_typer(topics_cli.app, name="topics")
app.add_typer(findings_cli.app, name="finding")
app.add_typer(evidence_cli.journal_app, name="journal")
app.command()(evidence_cli.verify)
app.command()(findings_cli.maintenance)
app.command()(findings_cli.change)
app.command()(lookup_cli.lookup)
app.command()(record_cli.record)


@app.command()
def broker(config: ConfigOption = None) -> None:
    """Run the development Kafka on this machine.

    Example: inferwatch broker
    """
    from streams.broker import run  # noqa: PLC0415  # each command loads its own room

    run(load(config).broker)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context, config: ConfigOption = None) -> None:
    """Run `vllm serve` with the collector inside; everything else on the line goes to vLLM.

    Example: inferwatch serve --config inferwatch.toml my-model --port 8000
    """
    from inferwatch.serve import serve as serve_vllm  # noqa: PLC0415

    serve_vllm(config, context.args)


@app.command()
def proxy(  # the options of the command line
    upstream: Annotated[str | None, typer.Option(help="The server behind: http://HOST:PORT.")] = None,
    kind: Annotated[str | None, typer.Option(help="openai (llama.cpp, SGLang, TGI, vLLM …) or ollama.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    config: ConfigOption = None,
) -> None:
    """Stand before Ollama or a server that speaks OpenAI's API, with the same gate, guards and audit.

    Example: inferwatch proxy --upstream http://127.0.0.1:11434 --kind ollama --port 8080
    """
    from inferwatch.proxy import run_proxy  # noqa: PLC0415

    run_proxy(load(config), {"upstream": upstream, "kind": kind, "host": host, "port": port})


@app.command()
def detect(
    stage: Annotated[int, typer.Option(min=1, max=2, help="1: events to rollups. 2: rollups to findings.")],
    config: ConfigOption = None,
) -> None:
    """Run one stage of the stream processors.

    Example: inferwatch detect --stage 1
    """
    from inferwatch.roles import run_detect  # noqa: PLC0415

    run_detect(load(config), stage)


@app.command()
def deliver(config: ConfigOption = None) -> None:
    """Deliver findings to the configured sinks.

    Example: inferwatch deliver --config inferwatch.toml
    """
    from inferwatch.roles import run_deliver  # noqa: PLC0415

    run_deliver(load(config))


@app.command()
def store(config: ConfigOption = None) -> None:
    """Keep events and findings in ClickHouse or chDB; serve the HTML view and the read-only query face.

    Example: inferwatch store --config inferwatch.toml
    """
    from inferwatch.roles import run_store  # noqa: PLC0415

    run_store(load(config))


@app.command()
def up(config: ConfigOption = None) -> None:
    """Run broker, store, both stages and delivery on this machine until Ctrl-C.

    Example: inferwatch up --config inferwatch.toml
    """
    from inferwatch.up import run_up  # noqa: PLC0415

    run_up(config)


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="End by itself instead of leaving the view up.")] = False,
    as_json: JsonOption = False,
    engine: Annotated[str, typer.Option(help="vllm, replay, or auto: vllm where it is installed.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the traffic.")] = 20_260_101,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the HTML view; 0 takes a free one.")] = 0,
) -> None:
    """Run the whole pipe on this machine with staged traffic, and show what it finds.

    Example: inferwatch demo --once --json
    """
    from inferwatch.demo import run_demo  # noqa: PLC0415

    raise typer.Exit(run_demo(once=once, as_json=as_json, engine=engine, seed=seed, port=port))


@app.command()
def status(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show the health record of every process: lag, watermark, late events, drops.

    Example: inferwatch status --json
    """
    from inferwatch.roles import print_status  # noqa: PLC0415

    raise typer.Exit(asyncio.run(print_status(load(config), as_json=as_json)))


@app.command()
def doctor(config: ConfigOption = None) -> None:
    """Look at what is easily forgotten: whether the guards start, and whether a sound check of them is on record.

    Exit status 1 where something is broken, or a record was changed.

    Example: inferwatch doctor --config inferwatch.toml
    """
    from inferwatch.doctor import run_doctor  # noqa: PLC0415

    raise typer.Exit(run_doctor(load(config)))


@app.command()
def backtest(  # noqa: PLR0917  # the options of the command line
    source: Annotated[Source, typer.Option(help="Where the events are read: Kafka, or the store.")] = Source.kafka,
    detector: Annotated[str, typer.Option(help="Only findings of this detector.")] = "",
    tenant: Annotated[str, typer.Option(help="Only findings of this tenant.")] = "",
    begin: Annotated[
        datetime | None, typer.Option("--from", help="Only revisions since, UTC.", formats=MOMENTS)
    ] = None,
    end: Annotated[datetime | None, typer.Option("--to", help="Only revisions until, UTC.", formats=MOMENTS)] = None,
    config: ConfigOption = None,
) -> None:
    """Judge the events on Kafka, or in the store, again and print the same findings, one JSON object a line.

    Example: inferwatch backtest --detector probing --from 2026-01-31T10:00:00Z --to 2026-01-31T11:00:00Z
    """
    from inferwatch.roles import print_backtest  # noqa: PLC0415

    asyncio.run(
        print_backtest(load(config), source=source.value, detector=detector, tenant=tenant, begin=begin, end=end)
    )


@config_app.command("check")
def config_check(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Check a configuration file: unknown keys, wrong values, missing files.

    Example: inferwatch config check --config inferwatch.toml
    """
    checked: Config = load(config)
    if as_json:
        typer.echo(checked.model_dump_json())
    else:
        typer.echo(f"The configuration is sound. Digest {checked.digest()}.")


@config_app.command("example")
def config_example() -> None:
    """Print every key with its default and meaning.

    Example: inferwatch config example > inferwatch.toml
    """
    typer.echo("\n".join(describe()))


@dashboards_app.command("export")
def dashboards_export(
    folder: Annotated[Path, typer.Argument(help="Where the JSON files go.")], config: ConfigOption = None
) -> None:
    """Write the Grafana dashboards as JSON, ready to import or provision.

    Example: inferwatch dashboards export compose/grafana/dashboards
    """
    from dashboards.grafana import export  # noqa: PLC0415

    for file in export(folder, load(config).dashboards):
        typer.echo(str(file))


@app.command("version")
def show_version() -> None:
    """Print the version.

    Example: inferwatch version
    """
    typer.echo(version("inferwatch"))


def main() -> None:
    """All commands, but the short way to a sidecar (`inferwatch.entry`)."""
    telling(app)


if __name__ == "__main__":
    main()
