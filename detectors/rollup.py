"""What stage 1 tells stage 2 over iw.rollups: partial sums of one second, signals about one entity, and markers.

Everything in a `Partial` adds or merges exactly, whatever the partitions: counts and histograms add; of contributors,
samples and extremes the first K in a total order are kept, and the first K of a union are the first K of the parts'
first K, because a user's events are all in one partition. So one partition or sixty-four give the same merged second.

Delivery: a rollup is overwritten by (partition, second, type, tenant, kind, key), so writing it twice does no harm.
"""

import heapq
from collections.abc import Iterable
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from detectors.finding import EVENT_IDS_MAX, Entity, OffsetRange

Name = Annotated[str, Meta(max_length=1024)]
Sample = tuple[int, str]
"""(timestamp in µs, event_id): the order in which samples are chosen."""
Extreme = tuple[int, str, str]
"""(value, entity id, event_id): the largest values of a second, with whose they are."""


CellName = tuple[str, str, str]
"""(tenant, detector, key)."""


class Partial(Struct, frozen=True, array_like=True, tag="partial"):
    """What one partition saw of one key in one second. Integers only."""

    partition: int
    second: int
    tenant: Name
    kind: Name
    """The detector."""
    key: Name
    counts: dict[str, int]
    histograms: dict[str, dict[int, int]]
    """Name to {bucket: count}."""
    weights: dict[str, dict[str, int]]
    """Name to {entity id: sum}: the K largest."""
    extremes: list[Extreme]
    """The K largest."""
    samples: list[Sample]
    """The first five."""
    first_offset: int
    last_offset: int


class Signal(Struct, frozen=True, array_like=True, tag="signal"):
    """What stage 1 found about an entity that lives in one partition."""

    partition: int
    second: int
    tenant: Name
    kind: Name
    key: Name
    entity: Entity
    model: Name
    first_seen_us: int
    last_seen_us: int
    observed_milli: int
    """The statistic in thousandths of its unit."""
    baseline_milli: int
    counts: dict[str, int]
    samples: list[Sample]
    first_offset: int
    last_offset: int


class Marker(Struct, frozen=True, array_like=True, tag="marker"):
    """Partition `partition` of `partitions` of `topic` has said all it has to say of every second up to and
    including `closed_through`. Goes to every rollups partition."""

    topic: Name
    partition: int
    partitions: int
    closed_through: int
    """Seconds since the epoch."""


class Command(Struct, frozen=True, array_like=True, tag="command"):
    """A record of iw.commands, carried over by stage 2 itself: its place among the rollups fixes when it counts."""

    partition: int
    """Of iw.commands, as the offset."""
    offset: int
    append_ms: int
    value: bytes
    """As it lay there, signature included; empty where it was too large."""


Rollup = Partial | Signal | Marker

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final[msgspec.msgpack.Decoder[Rollup | Command]] = msgspec.msgpack.Decoder(Rollup | Command)


class BadRollup(ValueError):
    """The bytes are no rollup. The message never quotes them."""


def encode(rollup: Rollup | Command) -> bytes:
    """MessagePack; the same rollup always gives the same bytes."""
    return _encoder.encode(rollup)


def decode(raw: bytes) -> Rollup | Command:
    """The inverse of `encode`. Raises `BadRollup`."""
    try:
        return _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRollup(f"no rollup of this version: {type(error).__name__}") from None


def first(weights: dict[str, int], limit: int) -> dict[str, int]:
    """The `limit` largest by (weight descending, id), in that order."""
    ranked = sorted(weights.items(), key=lambda item: (-item[1], item[0]))
    return dict(ranked[:limit])


def add_all(into: dict[int, int], other: dict[int, int]) -> None:
    """Adds the counts of `other` to `into`."""
    for bucket, count in other.items():
        into[bucket] = into.get(bucket, 0) + count


class Cell:
    """The sums of one key while its second is open (stage 1), or of several partitions and seconds (stage 2)."""

    __slots__ = ("counts", "extremes", "high", "histograms", "low", "offsets", "samples", "weights")

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.histograms: dict[str, dict[int, int]] = {}
        self.weights: dict[str, dict[str, int]] = {}
        self.extremes: list[Extreme] = []
        self.samples: list[Sample] = []
        self.low = self.high = 0
        """First and last offset of the one partition of stage 1."""
        self.offsets: dict[int, tuple[int, int]] = {}
        """In stage 2: partition to first and last offset."""

    def count(self, name: str, by: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + by

    def weigh(self, name: str, entity_id: str, by: int) -> None:
        weights = self.weights.get(name)
        if weights is None:
            weights = self.weights[name] = {}
        weights[entity_id] = weights.get(entity_id, 0) + by

    def absorb(self, other: Partial, limit: int) -> None:
        """Adds another partition; of weights and extremes `limit` are kept."""
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        for name, histogram in other.histograms.items():
            add_all(self.histograms.setdefault(name, {}), histogram)
        for name, weights in other.weights.items():
            mine = self.weights.setdefault(name, {})
            for entity_id, weight in weights.items():
                mine[entity_id] = mine.get(entity_id, 0) + weight
            if len(mine) > limit:
                self.weights[name] = first(mine, limit)
        self.extremes = largest([*self.extremes, *other.extremes], limit) if other.extremes else self.extremes
        self.samples = earliest([*self.samples, *other.samples]) if other.samples else self.samples
        merge_offsets(self.offsets, {other.partition: (other.first_offset, other.last_offset)})

    def partial(self, partition: int, second: int, name: CellName, limit: int) -> Partial:
        """The wire form, in an order that does not depend on arrival."""
        tenant, kind, key = name
        return Partial(
            partition=partition,
            second=second,
            tenant=tenant,
            kind=kind,
            key=key,
            counts=dict(sorted(self.counts.items())),
            histograms={name: dict(sorted(self.histograms[name].items())) for name in sorted(self.histograms)},
            weights={name: first(self.weights[name], limit) for name in sorted(self.weights)},
            extremes=largest(self.extremes, limit),
            samples=earliest(self.samples),
            first_offset=self.low,
            last_offset=self.high,
        )


def earliest(samples: Iterable[Sample]) -> list[Sample]:
    """The first five samples in order of (timestamp, event_id), each once."""
    return heapq.nsmallest(EVENT_IDS_MAX, set(samples))


def largest(extremes: Iterable[Extreme], limit: int) -> list[Extreme]:
    """The `limit` largest values; ties by entity and event."""
    return sorted(extremes, key=lambda extreme: (-extreme[0], extreme[1], extreme[2]))[:limit]


def merge_offsets(into: dict[int, tuple[int, int]], other: dict[int, tuple[int, int]]) -> None:
    """Widens the spans of `into` by those of `other`, partition by partition."""
    for partition, (low, high) in other.items():
        span = into.get(partition)
        into[partition] = (low, high) if span is None else (min(span[0], low), max(span[1], high))


def offset_ranges(offsets: dict[int, tuple[int, int]], topics: dict[int, str], limit: int) -> list[OffsetRange]:
    """At most `limit` ranges, in order of partition."""
    return [
        OffsetRange(topic=topics.get(partition, ""), partition=partition, first=low, last=high)
        for partition, (low, high) in sorted(offsets.items())[:limit]
    ]
