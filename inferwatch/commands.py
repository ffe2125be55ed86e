"""From what a person typed to a signed command on iw.commands."""

import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from collector.uuid7 import uuid7
from detectors.commands import AnyCommand, BadCommand, Suppress, public_keys, sign, verify
from detectors.finding import CONTRIBUTORS_MAX, Entity, Finding
from detectors.orders import AGGREGATES
from inferwatch.config import Config
from inferwatch.operators import FOLDER, load_operator
from streams.commands import send_command

_UNITS: Final = {"m": 60, "h": 3_600, "d": 86_400}
_Command = TypeVar("_Command", bound=AnyCommand)


class BadWords(ValueError):
    """What was typed can't be a command; the message says why."""


class Operator(NamedTuple):
    """Who signs."""

    name: str
    key: Ed25519PrivateKey


def operator_of(config: Config, name: str, key_file: Path | None) -> Operator:
    """The operator to sign as. Raises KeyProblem."""
    return Operator(*load_operator(config.data_dir / FOLDER, name, key_file, config.detect.commands))


def make(kind: type[_Command], operator: Operator, tenant: str, reason: str, **fields: Any) -> _Command:
    """A command of now, with an id of its own."""
    return kind(id=uuid7(), tenant=tenant, by=operator.name, at_us=moment_now_us(), reason=reason, **fields)


async def send(config: Config, operator: Operator, command: AnyCommand) -> None:
    """Signs and writes it, once it is sure that stage 2 would take it. Raises BadWords, BrokerAway or NotWritten."""
    record = sign(command, operator.key)
    try:
        verify(record, command.at_us // 1000, public_keys(config.detect.commands), config.detect.commands)
    except BadCommand as error:
        raise BadWords(f"the command would be refused: {error}") from None
    await send_command(config.kafka, command.tenant, record, timeout_s=config.streams.broker_timeout_s)


def suppression_of(finding: Finding, operator: Operator, reason: str, for_s: int) -> Suppress:
    """Suppresses a finding's entity as its operator saw it. Raises BadWords where that could hide somebody else."""
    users = finding.counts.get("users", 0)
    if finding.entity.kind in AGGREGATES and (
        users > len(finding.contributors) or (not users and len(finding.contributors) >= CONTRIBUTORS_MAX)
    ):
        raise BadWords(
            f"more people are behind this finding than the {len(finding.contributors)} it names, so suppressing it"
            " could hide others: acknowledge it, or announce a maintenance window for"
            f" --tenant {finding.tenant} --model {finding.model} --detector {finding.detector}"
        )
    return make(
        Suppress,
        operator,
        finding.tenant,
        reason,
        detector=finding.detector,
        entity=finding.entity,
        severity=finding.severity,
        until_us=moment_now_us() + for_s * 1_000_000,
        known=sorted({contributor.entity.id for contributor in finding.contributors}),
    )


def entity_of(text: str) -> Entity:
    """KIND:ID. Raises BadWords."""
    kind, _, name = text.partition(":")
    if kind not in ("user", "session", "api_key", "address", "model", "collector", "tenant") or not name:
        raise BadWords("an entity is KIND:ID; the kinds are user, session, api_key, address, model, collector, tenant")
    return Entity(kind=kind, id=name)  # type: ignore[arg-type]  # one of these kinds


def seconds_of(text: str) -> int:
    """90m, 12h, 7d. Raises BadWords."""
    found = re.fullmatch(r"([1-9][0-9]{0,5})([mhd])", text)
    if found is None:
        raise BadWords(f"a length of time is a number and m, h or d, like 90m, 12h or 7d; not {text!r}")
    return int(found[1]) * _UNITS[found[2]]


def moment_us(moment: datetime) -> int:
    """Microseconds of a UTC time as typer reads it."""
    return round(moment.replace(tzinfo=UTC).timestamp() * 1e6)


def moment_now_us() -> int:
    """Microseconds since the epoch."""
    return time.time_ns() // 1000
