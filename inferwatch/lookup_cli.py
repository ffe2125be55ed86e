"""`inferwatch lookup`: was this text, or one like it, seen?"""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from inferwatch.config import load
from inferwatch.findings_cli import KeyOption, OperatorOption, ReasonOption
from inferwatch.options import ConfigOption, JsonOption

if TYPE_CHECKING:  # the command loads its own room
    from inferwatch.lookup import Found
    from sinks.clickhouse.lookup import Sightings


def lookup(
    *,
    reason: ReasonOption,
    file: Annotated[Path | None, typer.Option(help="The text; left out: from standard input.")] = None,
    tenant: Annotated[str, typer.Option(help="The tenant whose events are searched.")] = "default",
    similar: Annotated[float, typer.Option(min=0.1, max=1, help="Least similarity of texts like it.")] = 0.5,
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="At most so many texts like it, an epoch.")] = 20,
    operator: OperatorOption = "",
    key: KeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether a prompt, or one like it, was seen: in the store, under every key of the tenant that is left.

    Runs where the tenants' keys are. The text is what was new in its request, as the user wrote it; it stays on this
    host. Who asked, why, by which digest and how much was found is recorded, signed, before anything is told.

    Example: inferwatch lookup --file prompt.txt --reason "incident 4711"
    """
    from inferwatch.commands import operator_of  # noqa: PLC0415
    from inferwatch.lookup import look_up, read_text  # noqa: PLC0415

    settings = load(config)
    who = operator_of(settings, operator, key)
    if file is None and sys.stdin.isatty():
        typer.echo("The text, then Ctrl-D:", err=True)
    text = read_text(file, sys.stdin.buffer)
    found = asyncio.run(look_up(settings, who, text, tenant=tenant, reason=reason, at_least=similar, limit=limit))
    typer.echo(msgspec.json.encode(found).decode() if as_json else "\n".join(_lines(found)))


def _lines(found: "Found") -> list[str]:
    lines = [f"Recorded as {found.command}."]
    for each in found.epochs:
        if each.exact is not None:
            lines.append(f"{each.epoch}  this very text: {_seen(each.exact)}")
        lines += [f"{each.epoch}  {alike.similarity:4.0%} alike: {_seen(alike)}" for alike in each.similar]
    return lines if len(lines) > 1 else [*lines, "Neither this text nor one like it is among the events in the store."]


def _seen(seen: "Sightings") -> str:
    who = "1 user" if seen.users == 1 else f"{seen.users} users"
    return (
        f"{seen.events} events by {who}, {seen.blocked} blocked, {seen.first[:19]} to {seen.last[:19]} UTC,"
        f" {' '.join(seen.event_ids)}"
    )
