"""`inferwatch verify` and `inferwatch journal check`: whether the log, and a journal on disk, are what was written."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from inferwatch.config import load
from inferwatch.options import MOMENTS, ConfigOption, JsonOption, Source

if TYPE_CHECKING:  # each command loads its own room
    from collector.verification import Report

journal_app = typer.Typer(no_args_is_help=True, help="Look at the collector's journal on disk.")
STATUS = {"sound": 0, "broken": 1, "unproven": 3}
"""Exit status by verdict; 2 is for a wrong command line."""


def verify(  # noqa: PLR0917  # the options of the command line
    files: Annotated[list[Path] | None, typer.Argument(help="Files of an exported log; none: read the source.")] = None,
    source: Annotated[Source, typer.Option(help="Where records are read, or files are from.")] = Source.kafka,
    begin: Annotated[datetime | None, typer.Option("--from", help="Only since, UTC.", formats=MOMENTS)] = None,
    end: Annotated[datetime | None, typer.Option("--to", help="Only until, UTC.", formats=MOMENTS)] = None,
    event: Annotated[str, typer.Option(help="Print the proof that this event was signed.")] = "",
    export: Annotated[Path | None, typer.Option(help="Also write what was read into this folder.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Verify the chain and the signed checkpoints of the log, and name the first record that is not as it was written.

    Exit status 0: sound. 1: something was changed, removed, added or moved. 3: whole, but not signed by a trusted key.

    Example: inferwatch verify --from 2026-01-31T10:00:00Z --json
    """
    from inferwatch.evidence import Range, verify_files, verify_kafka, verify_store  # noqa: PLC0415

    settings = load(config)
    if files and (begin or end):
        raise typer.BadParameter("--from and --to choose from Kafka or the store, not from files")
    asked = Range(begin=begin.replace(tzinfo=UTC) if begin else None, end=end.replace(tzinfo=UTC) if end else None)
    if files:
        report = verify_files(settings, files, event, beats=source is Source.kafka)
    elif source is Source.store:
        report = verify_store(settings, asked, event, export)
    else:
        report = asyncio.run(verify_kafka(settings, asked, event, export))
    if event and report.proof is None:
        raise ValueError(f"no signed checkpoint covers an event {event} here: look at a longer range, or wait for one")
    if event:
        typer.echo(msgspec.json.encode(report.proof).decode())
    elif as_json:
        typer.echo(msgspec.json.encode(report).decode())
    else:
        _tell(report)
    raise typer.Exit(STATUS[report.verdict])


def _tell(report: "Report") -> None:
    typer.echo(
        f"{report.verdict}: {report.records} records, {report.lanes} lanes of {report.boots} boots; checkpoints: "
        + (", ".join(f"{count} {worth}" for worth, count in report.checkpoints.items()) or "none")
        + f"; {report.unsigned_records} records after the last ones; {report.repeats} sent twice"
    )
    for problem in report.problems:
        event = f" event {problem.event_id}" if problem.event_id else ""
        place = f" at {problem.place}" if problem.place >= 0 else ""
        typer.echo(
            f"{problem.what}: partition {problem.partition}{place}, lane {problem.lane}, seq {problem.seq}{event}:"
            f" {problem.why}"
        )
    for note in report.notes:
        typer.echo(f"note: {note}")


@journal_app.command("check")
def check(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Say what each segment of each journal holds, what is torn or damaged, and what Kafka has not acknowledged.

    Only reads; the collector may run. Exit status 1 where anything is damaged.

    Example: inferwatch journal check --json
    """
    from collector.journal_check import check_journals  # noqa: PLC0415

    folder = load(config).collector.journal.dir
    boots = check_journals(folder)
    if as_json:
        typer.echo(msgspec.json.encode(boots).decode())
    elif not boots:
        typer.echo(f"No journal in {folder}.")
    for boot in () if as_json else boots:
        typer.echo(
            f"{boot.boot} ({'in use' if boot.in_use else 'left behind'}): {boot.records} records,"
            f" {boot.unacknowledged} not acknowledged, {boot.open_requests} requests without an end"
        )
        for segment in boot.segments:
            torn = f", {segment.torn_bytes} torn off its end" if segment.torn_bytes else ""
            damaged = f", {segment.damaged_bytes} damaged from {segment.damaged_at}" if segment.damaged_bytes else ""
            typer.echo(f"  {segment.name}: {segment.size_bytes} bytes, {segment.entries} entries{torn}{damaged}")
    raise typer.Exit(int(any(boot.damaged for boot in boots)))
