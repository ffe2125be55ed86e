"""`inferwatch topics`: check the topics against what they must be, and give iw.events more partitions."""

import asyncio
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.table import Column, Table

from inferwatch.config import load
from inferwatch.options import ConfigOption, JsonOption

app = typer.Typer(no_args_is_help=True, help=__doc__)

SETTINGS = ("cleanup.policy", "retention.ms", "message.timestamp.type", "min.insync.replicas", "max.message.bytes")


@app.command()
def check(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show every topic as it is, and each mismatch with what mends it. Exit status 1 where there is one.

    Example: inferwatch topics check
    """
    from collector.admin import describe_topics, mismatches  # noqa: PLC0415  # each command loads its own room
    from collector.kafka import wait_for_broker  # noqa: PLC0415

    kafka = load(config).kafka
    asyncio.run(wait_for_broker(kafka))
    facts = asyncio.run(describe_topics(kafka))
    wrong = mismatches(kafka, facts)
    if as_json:
        told = {name: {**fact._asdict(), "configs": dict(fact.configs)} for name, fact in facts.items()}
        typer.echo(orjson.dumps({"topics": told, "mismatches": [one._asdict() for one in wrong]}).decode())
    else:
        table = Table(*(Column(name, overflow="fold") for name in ("topic", "partitions", "replication", *SETTINGS)))
        for name, fact in facts.items():
            table.add_row(
                name, str(fact.partitions), str(fact.replication), *(fact.configs.get(k, "") for k in SETTINGS)
            )
        Console().print(table)
        for one in wrong:
            typer.echo(f"{one.topic} {one.what}\n  mend: {one.remedy}")
    raise typer.Exit(1 if wrong else 0)


@app.command()
def grow(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check whether it could be done now.")] = False,
    abandon_lanes: Annotated[
        bool, typer.Option("--abandon-lanes", help="Go on though a collector never said goodbye.")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Give iw.events as many partitions as kafka.partitions.events says.

    Stop the collectors; let both stages run 15 s more, then stop them; set kafka.partitions.events in the configuration
    of all; run this; start everything again. It refuses while anything is under way, and says what. Baselines and open
    findings go over; what stage 1 remembers of single users over minutes begins anew.

    Example: inferwatch topics grow --dry-run
    """
    from streams.growth import grow as grow_events  # noqa: PLC0415

    settings = load(config)
    done = asyncio.run(
        grow_events(settings.kafka, settings.detect, settings.streams, dry_run=dry_run, abandon_lanes=abandon_lanes)
    )
    verb = "could grow" if dry_run else "grew"
    typer.echo(f"{settings.kafka.topic('events')} {verb} from {done.before} to {done.after} partitions.")
    if done.abandoned:
        typer.echo(f"Abandoned: {', '.join(done.abandoned)}")
