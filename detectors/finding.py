"""The finding: what a detector has to say, in the shape that every sink, panel and command reads.

`uid` is a digest of (tenant, detector, entity, episode start), so whoever computes the same episode again gets the same
uid, and create / update / close are idempotent in every sink. `revision` counts from 1 within a uid.
"""

import hashlib
from typing import Final, Literal

import msgspec
from msgspec import Struct

FINDING_SCHEMA_VERSION: Final = "1.0"
EVENT_IDS_MAX: Final = 5
CONTRIBUTORS_MAX: Final = 5

Severity = Literal["info", "low", "medium", "high", "critical"]
Confidence = Literal["low", "medium", "high"]
State = Literal["open", "update", "close"]
RANK: Final[dict[Severity, int]] = {"info": 0, "low": 1, "medium": 2, "high": 3, "critical": 4}


class Entity(Struct, frozen=True, kw_only=True):
    """Who or what the finding is about: user, session, api_key, address, or `model` (tenant × model × guard)."""

    kind: Literal["user", "session", "api_key", "address", "model", "collector", "tenant"]
    id: str


class Statistic(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The number that crossed its threshold, so that a reader can judge it."""

    name: str
    observed: float
    baseline: float
    threshold: float
    unit: str = ""
    improbability: float = 0.0
    """-log10 of the probability of this or worse under the baseline; 0 where none is computed."""


class OffsetRange(Struct, frozen=True, kw_only=True):
    """Kafka offsets, both ends included, that hold the events behind the finding."""

    topic: str
    partition: int
    first: int
    last: int


class Contributor(Struct, frozen=True, kw_only=True):
    """Who drove it, largest first."""

    entity: Entity
    amount: int
    unit: str


class Evidence(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where to look for oneself."""

    offsets: list[OffsetRange] = []
    event_ids: list[str] = []
    """At most five."""
    replay: str = ""
    """The command that reads these events again."""


class Finding(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One revision of one episode. Times are microseconds since the epoch, UTC, in event time."""

    schema_version: str
    uid: str
    revision: int
    state: State
    tenant: str
    detector: str
    detector_version: str
    config_digest: str
    severity: Severity
    confidence: Confidence
    entity: Entity
    model: str
    first_seen_us: int
    last_seen_us: int
    updated_us: int
    statistic: Statistic
    counts: dict[str, int]
    summary: str
    """One line of plain reason, for a person at three in the morning."""
    evidence: Evidence
    contributors: list[Contributor] = []
    """At most five."""
    atlas: list[str] = []
    """MITRE ATLAS technique ids, `AML.T0051.000`."""
    owasp: list[str] = []
    """OWASP Top 10 for LLM Applications 2025, `LLM01`."""
    runbook: list[str] = []
    """The first three things to check."""
    cold_start: str = ""
    """What this detector can't say yet at its age; empty when its baseline is grown."""
    incident: str = ""
    """The same for findings that belong together."""
    leads: bool = False
    """For a pager: the first told of its incident, one worse than all told before, one told again after it was held
    back, or the close of one of these."""
    flapping: int = 0
    """How often the entity opened of late, where that is too often: then it is held open for longer."""
    acknowledged_by: str = ""
    """The command that acknowledged it, or called it false."""
    false_positive: bool = False
    suppressed_by: str = ""
    """The suppression or maintenance window that holds it back."""
    handled_by: str = ""
    """The operator who signed that command."""
    handled_why: str = ""
    change: str = ""
    """The planned change shortly after which it opened."""
    quiet: bool = False
    """Held back from people. The topic and the store have it all the same."""


def finding_uid(tenant: str, detector: str, entity: Entity, episode_start_us: int) -> str:
    """32 hex digits: the same for everyone who sees the same episode."""
    parts = (tenant, detector, entity.kind, entity.id, str(episode_start_us))
    digest = hashlib.blake2b(digest_size=16, person=b"iw-finding")
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(4, "big"))
        digest.update(raw)
    return digest.hexdigest()


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Finding)


def encode(finding: Finding) -> bytes:
    """The finding as one JSON object, UTF-8; the same finding always gives the same bytes."""
    return _encoder.encode(finding)


def decode(raw: bytes) -> Finding:
    """The inverse of `encode`. Raises `msgspec.DecodeError`."""
    return _decoder.decode(raw)
