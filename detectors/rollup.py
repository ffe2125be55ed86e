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
Extreme = tuple[int, int, str, str, int, int]
"""(value, timestamp in µs, entity id, event_id, guard score in thousandths, 1 where cut at its limit): the largest
values of a second, with whose they are."""


EXTREMES_MAX: Final = 8


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
    if not into:
        into.update(other)
        return
    for bucket, count in other.items():
        into[bucket] = into.get(bucket, 0) + count


class Cell:
    """The sums of one key over all partitions, of one second."""

    __slots__ = ("counts", "extremes", "histograms", "offsets", "samples", "weights")

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.histograms: dict[str, dict[int, int]] = {}
        self.weights: dict[str, dict[str, int]] = {}
        self.extremes: list[Extreme] = []
        self.samples: list[Sample] = []
        self.offsets: dict[int, tuple[int, int]] = {}
        """Partition to first and last offset."""

    def absorb(self, other: Partial) -> None:
        """Adds another partition. Weights are all kept: whoever reads them takes the `first` of the union."""
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        for name, histogram in other.histograms.items():
            add_all(self.histograms.setdefault(name, {}), histogram)
        for name, weights in other.weights.items():
            mine = self.weights.setdefault(name, {})
            for entity_id, weight in weights.items():
                mine[entity_id] = mine.get(entity_id, 0) + weight
        self.extremes = largest([*self.extremes, *other.extremes]) if other.extremes else self.extremes
        self.samples = earliest([*self.samples, *other.samples]) if other.samples else self.samples
        merge_offsets(self.offsets, {other.partition: (other.first_offset, other.last_offset)})


def earliest(samples: Iterable[Sample]) -> list[Sample]:
    """The first five samples in order of (timestamp, event_id), each once."""
    return heapq.nsmallest(EVENT_IDS_MAX, set(samples))


def largest(extremes: Iterable[Extreme]) -> list[Extreme]:
    """The eight largest values; of equal ones the earliest, by (timestamp, event_id)."""
    return sorted(extremes, key=lambda extreme: (-extreme[0], extreme[1], extreme[3]))[:EXTREMES_MAX]


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
