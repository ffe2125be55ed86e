"""`inferwatch finding`, `maintenance` and `change`: look at findings, and say what people know of them."""

import asyncio
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer
from rich.console import Console
from rich.table import Table

from inferwatch.config import Config, load
from inferwatch.options import MOMENTS, ConfigOption, JsonOption

if TYPE_CHECKING:  # each command loads its own room
    from detectors.commands import AnyCommand
    from detectors.finding import Finding
    from inferwatch.commands import Operator

app = typer.Typer(no_args_is_help=True, help="Look at findings; acknowledge, suppress, call them false.")

UidArgument = Annotated[str, typer.Argument(help="The finding's uid, or its first eight digits or more.")]
ReasonOption = Annotated[str, typer.Option(help="Why, in one line. Kept with the finding.")]
OperatorOption = Annotated[str, typer.Option(help="Who signs.", envvar="INFERWATCH_OPERATOR")]
KeyOption = Annotated[
    Path | None, typer.Option("--key", help="The private key, if not in the data folder.", envvar="INFERWATCH_KEY_FILE")
]
ForOption = Annotated[str, typer.Option("--for", help="How long: 90m, 12h, 7d.")]
TenantOption = Annotated[str, typer.Option(help="The tenant.")]
ModelOption = Annotated[str, typer.Option(help="Only this model, as findings name it.")]


@app.command("list")
def show_all(
    tenant: Annotated[str, typer.Option(help="Only findings of this tenant.")] = "",
    closed: Annotated[bool, typer.Option("--closed", help="Also what is over.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many, latest seen first.")] = 50,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List findings by their newest revision, those held back included.

    Example: inferwatch finding list --tenant acme --closed
    """
    from streams.findings import newest_findings  # noqa: PLC0415

    def wanted(finding: "Finding") -> bool:
        return tenant in ("", finding.tenant) and (closed or finding.state != "close")

    settings = load(config)
    timeout_s = settings.streams.broker_timeout_s
    found = asyncio.run(newest_findings(settings.kafka, timeout_s=timeout_s, wanted=wanted))[:limit]
    if as_json:
        typer.echo(orjson.dumps([_row(finding) for finding in found]).decode())
        return
    table = Table("uid", "state", "severity", "detector", "entity", "last seen", "handled", "what happened", box=None)
    for row in map(_row, found):
        uid, entity = row["uid"][:12], f"{row['entity_kind']} {_short(row['entity_id'])}"
        handled = f"{row['handled']} by {row['by']}" if row["handled"] else ""
        seen = row["last_seen"][:19]
        cells = (uid, row["state"], row["severity"], row["detector"], entity, seen, handled, row["summary"][:100])
        table.add_row(*map(_plain, cells))
    Console(markup=False, highlight=False, emoji=False).print(table if found else "No such findings.")


@app.command()
def ack(
    uid: UidArgument,
    *,
    reason: ReasonOption,
    operator: OperatorOption = "",
    key: KeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say that somebody sees to a finding: people hear of it again when it gets worse, goes on for a day, or closes.

    Example: inferwatch finding ack 4f1c09aa --reason "on it, ticket 4711"
    """
    _about(load(config), uid, reason, operator, key, as_json=as_json, false=False)


@app.command("false-positive")
def false_positive(
    uid: UidArgument,
    *,
    reason: ReasonOption,
    operator: OperatorOption = "",
    key: KeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say that a finding is false: as ack, and counted against the detector's budget. Closed findings too.

    Example: inferwatch finding false-positive 4f1c09aa --reason "nightly red-team job"
    """
    _about(load(config), uid, reason, operator, key, as_json=as_json, false=True)


@app.command()
def suppress(
    uid: Annotated[str, typer.Argument(help="The finding whose entity it is; or give tenant, detector, entity.")] = "",
    *,
    reason: ReasonOption,
    for_: ForOption,
    tenant: TenantOption = "",
    detector: Annotated[str, typer.Option(help="The detector.")] = "",
    entity: Annotated[str, typer.Option(help="The entity, KIND:ID.")] = "",
    severity: Annotated[str, typer.Option(help="Without a finding: what is worse is told.")] = "medium",
    operator: OperatorOption = "",
    key: KeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hold back what one detector says of one entity for a time. Nothing is lost: `finding list` shows it.

    People hear of it all the same when it gets worse than now, or when others are behind it than now.

    Example: inferwatch finding suppress 4f1c09aa --for 7d --reason "load test of team search"
    """
    from detectors.commands import Suppress  # noqa: PLC0415
    from inferwatch.commands import BadWords, entity_of, make, moment_now_us, operator_of, seconds_of, suppression_of  # noqa: PLC0415
    from streams.findings import find  # noqa: PLC0415

    settings, for_s = load(config), seconds_of(for_)
    if bool(uid) == bool(tenant and detector and entity):
        raise BadWords("name a finding, or --tenant, --detector and --entity")
    if severity not in ("info", "low", "medium", "high", "critical"):
        raise BadWords("a severity is info, low, medium, high or critical")
    who = operator_of(settings, operator, key)
    if uid:
        finding = asyncio.run(find(settings.kafka, uid, timeout_s=settings.streams.broker_timeout_s))
        command = suppression_of(finding, who, reason, for_s)
    else:
        until_us = moment_now_us() + for_s * 1_000_000
        named = {"detector": detector, "entity": entity_of(entity), "severity": severity, "until_us": until_us}
        command = make(Suppress, who, tenant, reason, **named)
    _send(settings, who, command, as_json=as_json)


@app.command()
def revoke(
    command: Annotated[str, typer.Argument(help="The id of an earlier command.")],
    *,
    tenant: TenantOption,
    reason: ReasonOption,
    operator: OperatorOption = "",
    key: KeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """End an acknowledgement, a suppression, a window or a change before its time.

    Example: inferwatch finding revoke 01920000-0000-7000-8000-000000000000 --tenant acme --reason "test is over"
    """
    from detectors.commands import Revoke  # noqa: PLC0415
    from inferwatch.commands import make, operator_of  # noqa: PLC0415

    settings = load(config)
    who = operator_of(settings, operator, key)
    _send(settings, who, make(Revoke, who, tenant, reason, command=command), as_json=as_json)


def maintenance(
    *,
    tenant: TenantOption,
    begin: Annotated[datetime, typer.Option("--from", help="UTC.", formats=MOMENTS)],
    end: Annotated[datetime, typer.Option("--to", help="UTC.", formats=MOMENTS)],
    reason: ReasonOption,
    model: ModelOption = "",
    detector: Annotated[str, typer.Option(help="Only this detector.")] = "",
    operator: OperatorOption = "",
    key: KeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Announce a maintenance window: what is found meanwhile is kept, and people are not called, unless it is critical.

    Example: inferwatch maintenance --tenant acme --from 2026-01-31T22:00:00Z --to 2026-02-01T02:00:00Z --reason GPUs
    """
    from detectors.commands import Maintenance  # noqa: PLC0415
    from inferwatch.commands import make, moment_us, operator_of  # noqa: PLC0415

    settings = load(config)
    who = operator_of(settings, operator, key)
    span = {"from_us": moment_us(begin), "until_us": moment_us(end)}
    command = make(Maintenance, who, tenant, reason, model=model, detector=detector, **span)
    _send(settings, who, command, as_json=as_json)


def change(
    *,
    tenant: TenantOption,
    reason: ReasonOption,
    at: Annotated[datetime | None, typer.Option("--at", help="UTC; without it, now.", formats=MOMENTS)] = None,
    model: ModelOption = "",
    operator: OperatorOption = "",
    key: KeyOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Announce a change (a guard, a model, a template): findings that open within the hour after it name it.

    Example: inferwatch change --tenant acme --reason "injection guard 2.1" --at 2026-01-31T22:00:00Z
    """
    from detectors.commands import Change  # noqa: PLC0415
    from inferwatch.commands import make, moment_now_us, moment_us, operator_of  # noqa: PLC0415

    settings = load(config)
    who = operator_of(settings, operator, key)
    from_us = moment_us(at) if at is not None else moment_now_us()
    _send(settings, who, make(Change, who, tenant, reason, from_us=from_us, model=model), as_json=as_json)


def _about(
    config: Config, uid: str, reason: str, operator: str, key: Path | None, *, as_json: bool, false: bool
) -> None:
    from detectors.commands import Acknowledge, FalsePositive  # noqa: PLC0415
    from inferwatch.commands import make, operator_of  # noqa: PLC0415
    from streams.findings import find  # noqa: PLC0415

    who = operator_of(config, operator, key)
    finding = asyncio.run(find(config.kafka, uid, timeout_s=config.streams.broker_timeout_s))
    kind = FalsePositive if false else Acknowledge
    command = make(kind, who, finding.tenant, reason, uid=finding.uid, severity=finding.severity)
    _send(config, who, command, as_json=as_json)


def _send(config: Config, operator: "Operator", command: "AnyCommand", *, as_json: bool) -> None:
    from inferwatch.commands import send  # noqa: PLC0415

    asyncio.run(send(config, operator, command))
    if as_json:
        told = {"command": command.id, "kind": command.__struct_config__.tag, "tenant": command.tenant}
        typer.echo(orjson.dumps({**told, "by": command.by}).decode())
    else:
        typer.echo(
            f"Written as command {command.id}; it takes effect within seconds, or is refused with a dead letter."
        )


def _row(finding: "Finding") -> dict[str, str]:
    from collector.event import from_timestamp_us  # noqa: PLC0415

    handled = "false positive" if finding.false_positive else "acknowledged" if finding.acknowledged_by else ""
    return {
        "uid": finding.uid,
        "state": finding.state,
        "severity": finding.severity,
        "tenant": finding.tenant,
        "detector": finding.detector,
        "entity_kind": finding.entity.kind,
        "entity_id": finding.entity.id,
        "model": finding.model,
        "last_seen": from_timestamp_us(finding.last_seen_us).isoformat(timespec="milliseconds"),
        "incident": finding.incident,
        "handled": "suppressed" if finding.suppressed_by else handled,
        "command": finding.suppressed_by or finding.acknowledged_by,
        "by": finding.handled_by,
        "why": finding.handled_why,
        "summary": finding.summary,
    }


def _plain(text: str) -> str:
    """Nothing that a terminal would obey."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _short(entity_id: str) -> str:
    return "/".join(part if len(part) <= 20 else f"{part[:10]}…" for part in entity_id.split("/"))
