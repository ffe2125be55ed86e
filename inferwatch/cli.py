"""The command line: `inferwatch …`. Each command loads only its room, and says one sentence when it fails."""

import asyncio
import os
import sys
from datetime import datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import structlog
import typer

from inferwatch import budget_cli, deadletter_cli, findings_cli, topics_cli
from inferwatch.config import Config, describe, load
from inferwatch.options import ConfigOption, JsonOption

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
config_app = typer.Typer(no_args_is_help=True, help="Look at the configuration.")
dashboards_app = typer.Typer(no_args_is_help=True, help="Dashboards for Grafana.")
keys_app = typer.Typer(no_args_is_help=True, help="Make keys.")
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")
app.add_typer(dashboards_app, name="dashboards")
app.add_typer(budget_cli.app, name="budget")
app.add_typer(deadletter_cli.app, name="deadletter")
app.add_typer(topics_cli.app, name="topics")
app.add_typer(findings_cli.app, name="finding")
app.command()(findings_cli.maintenance)
app.command()(findings_cli.change)

MOMENTS = ["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S.%fZ"]


class Source(StrEnum):
    """Where a backtest reads events."""

    kafka = "kafka"
    store = "store"


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


@keys_app.command("create")
def keys_create(tenant: Annotated[str, typer.Argument()] = "default", config: ConfigOption = None) -> None:
    """Make the key that a tenant's hashes and pseudonyms are under.

    Example: inferwatch keys create default
    """
    from inferwatch.keys import create_tenant_key  # noqa: PLC0415

    typer.echo(f"Made {create_tenant_key(load(config).collector.identity.key_dir, tenant)}")


@keys_app.command("api")
def keys_api(
    user: Annotated[str, typer.Option(help="Whose key it is.")],
    tenant: Annotated[str, typer.Option()] = "default",
    on_behalf: Annotated[bool, typer.Option("--on-behalf", help="It may name the users it speaks for.")] = False,
    config: ConfigOption = None,
) -> None:
    """Make an API key: its digest goes into the file of API keys, the secret is printed once.

    Example: inferwatch keys api --user alice
    """
    from inferwatch.keys import add_api_key  # noqa: PLC0415

    file = load(config).collector.identity.api_keys_file
    secret, key_id = add_api_key(file, tenant=tenant, user=user, on_behalf=on_behalf)
    typer.echo(f"{key_id} was added to {file}. The key, shown only now:", err=True)
    typer.echo(secret)


@keys_app.command("operator")
def keys_operator(name: Annotated[str, typer.Argument(help="Who commands.")], config: ConfigOption = None) -> None:
    """Make the key that an operator signs commands with, and print the lines that make it known.

    Example: inferwatch keys operator alice
    """
    from inferwatch.operators import FOLDER, create_operator_key  # noqa: PLC0415

    file, public = create_operator_key(load(config).data_dir / FOLDER, name)
    typer.echo(f"Made {file}: keep it to yourself. Put this into inferwatch.toml, where stage 2 runs too:", err=True)
    typer.echo(f'[detect.commands.operators]\n"{name}" = "{public}"')


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


def _log_to_stderr() -> None:
    """Standard output is for answers; logs are plain lines elsewhere, without colours in a file."""
    structlog.configure(
        processors=[
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.add_log_level,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(os.environ.get("INFERWATCH_LOG_LEVEL", "info")),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def main() -> None:
    """The entry point: a failure is one sentence on standard error and exit status 1; 130 after Ctrl-C."""
    _log_to_stderr()
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("INFERWATCH_TRACEBACK"):
            raise
        known = isinstance(error, ValueError | OSError | RuntimeError)
        said = str(error) if known and str(error) else f"{type(error).__name__}: {error}"
        hint = "" if known else " (INFERWATCH_TRACEBACK=1 shows where)"
        typer.echo(f"inferwatch: {said}{hint}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
