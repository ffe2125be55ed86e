"""What a detector is: a card that says what it means, a half for stage 1 and a half for stage 2.

Stage 1 runs once per partition of iw.events and sees events in the order (timestamp, event_id), many at a time. What it
says about a whole tenant it says in a `Partial` for each second; these add over partitions. A user's events are all in
one partition, so what concerns one user may be decided there, as a `Signal`. Stage 2 sees merged seconds and raises
`Alarm`s; `lifecycle.py` makes findings of them. Neither half reads a clock, draws randomness or does I/O.

A new detector is one file with a `Detector` in it, a line in `catalogue.py`, and one test file.
"""

import os
import traceback
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import msgspec
from msgspec import Struct

from collector.event import AnyRecord, AuditEvent, Record
from detectors.config import DetectConfig
from detectors.finding import Confidence, Contributor, Entity, Severity, Statistic
from detectors.rollup import Cell, Partial, Sample, Signal
from detectors.text import Text

if TYPE_CHECKING:
    from detectors.chunk import Chunk
    from detectors.registry import Registry


class Alarm(Struct, frozen=True, kw_only=True):
    """A detector's word that an entity is out of the ordinary now. Repeated while it lasts."""

    tenant: str
    entity: Entity
    model: str
    at_us: int
    """When it was decided, in event time: the end of a second."""
    first_seen_us: int
    last_seen_us: int
    severity: Severity
    confidence: Confidence
    statistic: Statistic
    counts: dict[str, int]
    summary: str
    offsets: dict[int, tuple[int, int]]
    """Partition to first and last offset."""
    samples: list[Sample]
    contributors: list[Contributor] = []
    cold_start: str = ""
    peak_speaks: bool = False
    """Whether the strongest alarm of an episode describes it. Else the newest does, since its counts go on growing."""
    replay_us: tuple[int, int] | None = None
    """What to read again, where it is not the episode's own time; for all detectors and tenants."""
    replay_from_us: int | None = None
    """Where a replay must begin at the latest, where the card's lookback is too short for this entity."""


class StageOne:
    """A detector's half in one partition; what it keeps in columns of the registry is saved there.

    Every method does nothing until a detector says otherwise.
    """

    @property
    def counters(self) -> dict[str, int]:
        """What was counted, by name."""
        return {}

    def events(self, chunk: "Chunk") -> Iterable[Partial | Signal]:  # noqa: ARG002 a default
        """The events of some whole seconds in order: what each second of them showed, in any order.

        At most one signal a key and second.
        """
        return ()

    def snapshot(self) -> bytes:
        """All of its state; `restore` on a new half with the same config gives the same half."""
        return b""

    def restore(self, raw: bytes) -> None:
        """Goes on from a snapshot. Raises `msgspec.DecodeError` for other bytes."""


class StageTwo:
    """A detector's half over all partitions. Every method does nothing until a detector says otherwise."""

    @property
    def counters(self) -> dict[str, int]:
        """What was counted, by name."""
        return {}

    def advance(self, until_s: int) -> Iterable[Alarm]:  # noqa: ARG002 a default
        """Nothing more comes from before `until_s`: judge every window that ends at or before it, oldest first."""
        return ()

    def second(self, second: int, cells: list[tuple[str, str, Cell]]) -> Iterable[Alarm]:  # noqa: ARG002 a default
        """One merged second: (tenant, key, sums) in order of tenant and key."""
        return ()

    def signal(self, signal: Signal) -> Iterable[Alarm]:  # noqa: ARG002 a default
        """One entity signal of the second that is being closed."""
        return ()

    def snapshot(self) -> bytes:
        """All of its state; `restore` on a new half with the same config gives the same half."""
        return b""

    def restore(self, raw: bytes) -> None:
        """Goes on from a snapshot. Raises `msgspec.DecodeError` for other bytes."""


class Card(Struct, frozen=True, kw_only=True):
    """What every finding of a detector says in the same words."""

    name: str
    version: str
    """Changes whenever the same events could give other findings."""
    atlas: list[str]
    owasp: list[str]
    runbook: list[str]
    """The first three things to check."""
    key: list[str]
    """What its baselines and windows are kept by. Of a user's own they live in his partition of iw.events; all others
    are added up over partitions and live in the tenant's partition of iw.rollups. So partitioning changes no answer."""
    window_s: int
    """The longest stretch of events that one of its answers rests on, baselines apart."""
    lookback_s: int
    """How long before an episode a replay must start to see what the detector saw."""


class Detector(Struct, frozen=True, kw_only=True):
    """A card and how to make the two halves."""

    card: Card
    enabled: Callable[[DetectConfig], bool]
    reads: frozenset[str] = frozenset()
    """Columns of an event that the first half looks at, of `detectors.columns.EVERYTHING`: no others are filled in."""
    stage_one: Callable[[DetectConfig, "Registry"], StageOne] | None
    """Given the registry of the partition's users, in which it may declare columns. None where the engine itself feeds
    stage 2."""
    stage_two: Callable[[DetectConfig], StageTwo]


def actor(event: AuditEvent | Text) -> str:
    """Who sent it: the key by which iw.events is partitioned, user, else API key, else address. May be empty."""
    return event.user_id or event.api_key or event.client_address


def printable(record: AnyRecord) -> AnyRecord:
    """The record with control characters in its names replaced, so that no name can pass for two or break a line."""
    names = record.collector_id + record.boot + record.event_id
    if not isinstance(record, AuditEvent):
        return record if names.isprintable() else _cleaned(record, ())
    names += record.tenant + record.model_version + record.user_id + record.session_id + record.api_key
    names += record.client_address
    for result in record.guardrail_results:
        names += result.guard
    if names.isprintable():
        return record
    cleaned = _cleaned(record, ("tenant", "model_version", "user_id", "session_id", "api_key", "client_address"))
    results = [msgspec.structs.replace(result, guard=clean(result.guard)) for result in record.guardrail_results]
    return msgspec.structs.replace(cleaned, guardrail_results=results)


_Record = TypeVar("_Record", bound=Record)


def _cleaned(record: _Record, names: tuple[str, ...]) -> _Record:
    wanted = ("collector_id", "boot", "event_id", *names)
    return msgspec.structs.replace(record, **{name: clean(getattr(record, name)) for name in wanted})


def clean(name: str) -> str:
    """The name without characters that break a line, no longer than before."""
    if name.isprintable():
        return name
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)


def line_of(error: BaseException) -> str:
    """Where it was raised, `FILE:LINE`: a whole traceback may show values."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""  # noqa: PTH119  # a name


def actor_entity(actor_id: str) -> Entity:
    """The entity of an actor id, told by its prefix."""
    if actor_id.startswith("k_"):
        return Entity(kind="api_key", id=actor_id)
    if actor_id.startswith("a_"):
        return Entity(kind="address", id=actor_id)
    return Entity(kind="user", id=actor_id)


def contributors(weights: dict[str, int], unit: str, limit: int) -> list[Contributor]:
    """The largest `limit` of `weights`, ties by id; the empty id is left out, since it names nobody."""
    ranked = sorted((item for item in weights.items() if item[0]), key=lambda item: (-item[1], item[0]))
    return [Contributor(entity=actor_entity(name), amount=amount, unit=unit) for name, amount in ranked[:limit]]
