"""Alarms, signed commands and a lifecycle for the tests of stage 2's tail."""

import base64
from collections.abc import Iterable
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from detectors.catalogue import cards
from detectors.commands import Acknowledge, AnyCommand, Suppress, sign
from detectors.config import CommandsConfig, LifecycleConfig
from detectors.detector import Alarm
from detectors.finding import Contributor, Entity, Finding, Severity, Statistic
from detectors.lifecycle import Lifecycle
from detectors.rollup import Command

S = 1_000_000
T0 = 1_800_000_000 * S
KEY = Ed25519PrivateKey.from_private_bytes(b"a" * 32)
STRANGER = Ed25519PrivateKey.from_private_bytes(b"b" * 32)
PUBLIC = base64.b64encode(KEY.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()
COMMANDS = CommandsConfig(operators={"alice": PUBLIC}, delay_s=0)
CONFIG = LifecycleConfig(quiet_s=300, update_s=60)
TENANT = "acme"


def alarm(
    at_s: int,
    *,
    user: str = "u_1",
    kind: str = "user",
    severity: Severity = "medium",
    by: Iterable[str] = (),
    users: int | None = None,
    model: str = "m",
    tenant: str = TENANT,
) -> Alarm:
    """An alarm at T0 + `at_s`, driven `by` these users."""
    contributors = [Contributor(entity=Entity(kind="user", id=name), amount=9, unit="blocked requests") for name in by]
    return Alarm(
        tenant=tenant,
        entity=Entity(kind=kind, id=user),  # type: ignore[arg-type]
        model=model,
        at_us=T0 + at_s * S,
        first_seen_us=T0 + at_s * S - 1,
        last_seen_us=T0 + at_s * S,
        severity=severity,
        confidence="low",
        statistic=Statistic(name="x", observed=1.0, baseline=0.0, threshold=1.0),
        counts={"n": at_s} if users is None else {"users": users},
        summary=f"at {at_s}",
        offsets={0: (at_s, at_s)},
        samples=[(at_s, f"e{at_s}")],
        contributors=contributors,
    )


def lifecycle(config: LifecycleConfig = CONFIG, commands: CommandsConfig = COMMANDS) -> Lifecycle:
    """With operator alice."""
    made = Lifecycle(config, cards(), "digest", commands)
    made.topics = {0: "iw.events"}
    return made


class Desk:
    """Signs commands and numbers them as iw.commands would."""

    def __init__(self, partition: int = 0) -> None:
        self.partition = partition
        self.offset = -1

    def head(self, at_s: float, **fields: Any) -> dict[str, Any]:
        """What all commands have; the id is of the next offset."""
        values = {"id": f"{self.offset + 1:032x}", "tenant": TENANT, "by": "alice", "reason": "because"}
        return values | {"at_us": T0 + round(at_s * S)} | fields

    def record(self, command: AnyCommand, key: Ed25519PrivateKey = KEY, append_ms: int | None = None) -> Command:
        """As stage 2 reads it; taken by the broker when it was signed."""
        self.offset += 1
        append_ms = command.at_us // 1000 if append_ms is None else append_ms
        return Command(self.partition, self.offset, append_ms, sign(command, key))

    def suppress(self, at_s: float, *, detector: str = "probing", user: str = "u_1", kind: str = "user", **fields: Any):
        """A suppression of an hour."""
        values = {"severity": "medium", "until_us": T0 + round(at_s * S) + 3_600 * S}
        entity = Entity(kind=kind, id=user)  # type: ignore[arg-type]
        return self.record(Suppress(**self.head(at_s), **(values | fields), detector=detector, entity=entity))

    def ack(
        self, at_s: float, uid: str, kind: type = Acknowledge, severity: Severity = "medium", **head: Any
    ) -> Command:
        """An acknowledgement, or a false positive."""
        return self.record(kind(**self.head(at_s, **head), uid=uid, severity=severity))


class Story:
    """A lifecycle to which things happen in order of time."""

    def __init__(self, config: LifecycleConfig = CONFIG, commands: CommandsConfig = COMMANDS) -> None:
        self.lifecycle = lifecycle(config, commands)
        self.desk = Desk()
        self.said: list[Finding] = []

    def alarms(self, *alarms: Alarm, detector: str = "probing") -> "Story":
        for each in alarms:
            self.said += self.lifecycle.advance(each.at_us - 1)
            self.said += self.lifecycle.alarm(detector, each)
        return self

    def command(self, record: Command) -> "Story":
        self.lifecycle.command(record, 0)
        return self

    def until(self, at_s: int) -> "Story":
        self.said += self.lifecycle.advance(T0 + at_s * S)
        return self

    def told(self) -> list[tuple[str, str, int, bool]]:
        """(entity, state, seconds after T0, whether people are told) of all that was said since the last call."""
        said, self.said = self.said, []
        return [(f.entity.id, f.state, (f.updated_us - T0) // S, not f.quiet) for f in said]
