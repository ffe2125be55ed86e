"""What a detector's first half is given: the events of some closed seconds in order, and ways to add them up by key.

Order: (timestamp, event_id), whatever the arrival (T8). How many seconds a chunk has depends on the batches, so what a
half says of a second must not depend on where the chunk ends.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import msgspec
import numpy as np

from collector.event import AuditEvent, Rejection
from detectors.columns import SECOND_US, Columns, Floats, Ints, picked
from detectors.detector import actor
from detectors.finding import EVENT_IDS_MAX
from detectors.histogram import buckets_of
from detectors.registry import Registry, Rows
from detectors.rollup import Extreme, Partial, Sample, first

_decoder: Final[msgspec.json.Decoder[AuditEvent]] = msgspec.json.Decoder(AuditEvent | Rejection)
BUCKETS_MAX: Final = 512
"""More than `detectors.histogram` has."""


class Chunk:
    """Events in order, with the second and the registry's row of each."""

    def __init__(self, columns: Columns, partition: int, registry: Registry) -> None:
        """`columns` in order of time. Admits strangers to the registry."""
        self.columns, self.partition = columns, partition
        self.second: Ints = columns.moment_us // SECOND_US
        self.step: Ints = np.cumsum(np.diff(self.second, prepend=self.second[:1]) != 0)
        """The second's number in the chunk: 0, 1, 2 …"""
        self.entity: Rows = registry.rows(columns.high, columns.low, columns.moment_us, columns.named)
        self._events: dict[int, AuditEvent] = {}

    def __len__(self) -> int:
        return len(self.columns)

    def event(self, index: int) -> AuditEvent:
        """The event itself, decoded when first asked for."""
        event = self._events.get(index)
        if event is None:
            event = self._events[index] = _decoder.decode(self.columns.raws[index])
        return event

    def actor(self, index: int) -> str:
        """Who sent it; may be empty."""
        return actor(self.event(index))

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        """The first five of these, which are in order."""
        moments = self.columns.moment_us
        return [(int(moments[index]), self.event(index).event_id) for index in indices[:EVENT_IDS_MAX]]


def _event_id(raw: bytes) -> str:
    return _decoder.decode(raw).event_id


def in_order(columns: Columns, rows: Rows) -> Columns:
    """These events, sorted by (timestamp, event_id)."""
    order = rows[np.argsort(columns.moment_us[rows], kind="stable")]
    moments = columns.moment_us[order]
    tied = np.flatnonzero(moments[1:] == moments[:-1])
    if len(tied):
        apart = np.flatnonzero(np.diff(tied) != 1)
        begins, ends = tied[np.append(0, apart + 1)].tolist(), (tied[np.append(apart, len(tied) - 1)] + 2).tolist()
        for begin, end in zip(begins, ends, strict=True):
            order[begin:end] = sorted(order[begin:end].tolist(), key=lambda row: _event_id(columns.raws[row]))
    return picked(columns, order)


class Place(NamedTuple):
    """What every partial of a group says alike: where and when."""

    partition: int
    second: int
    tenant: str
    model: str
    detector: str
    size: int
    """Events in the group."""
    first_offset: int
    last_offset: int

    def partial(
        self,
        key: str,
        *,
        counts: dict[str, int] | None = None,
        histograms: dict[str, dict[int, int]] | None = None,
        weights: dict[str, dict[str, int]] | None = None,
        extremes: list[Extreme] | None = None,
        samples: list[Sample] | None = None,
    ) -> Partial:
        """The sums of the group. Each dictionary in an order that depends on nothing but its contents."""
        return Partial(
            self.partition,
            self.second,
            self.tenant,
            self.detector,
            key,
            counts or {},
            histograms or {},
            weights or {},
            extremes or [],
            samples or [],
            self.first_offset,
            self.last_offset,
        )


def bits(values: Ints) -> Ints:
    """The number of bits of each value, which is below 2**53: sizes in powers of two."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


class Groups:
    """Events with equal keys. Groups are in order of key, and events within a group in the chunk's order."""

    def __init__(self, rows: Rows, *keys: Ints) -> None:
        """`rows` of a chunk, and the keys of each of them, the most significant first; none negative."""
        code = keys[0]
        for key in keys[1:]:
            code = code * (int(key.max(initial=0)) + 1) + key
        order = np.argsort(code, kind="stable")
        ordered = code[order]
        self.starts: Rows = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1]))) if len(rows) else rows
        self.rows: Rows = rows[order]
        self.sizes: Ints = np.diff(np.append(self.starts, len(rows)))
        self.group: Ints = np.repeat(np.arange(len(self.starts)), self.sizes)
        """The group of each of `rows`."""
        self._order = order
        self._ends = np.append(self.starts, len(rows)).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def numbers(self) -> Ints:
        """The group of each row, in the order in which the rows were given."""
        numbers = np.empty(len(self.rows), np.int64)
        numbers[self._order] = self.group
        return numbers

    def firsts(self, values: Ints) -> list[int]:
        """The value of each group, of values that are the same within it; `values` are of the chunk."""
        return list(values[self.rows[self.starts]].tolist())

    def places(self, chunk: Chunk, detector: str) -> list[Place]:
        """Where each group belongs, for groups of one second and (tenant, model)."""
        kinds = chunk.columns.kinds
        told = zip(
            self.firsts(chunk.second),
            self.firsts(chunk.columns.kind),
            self.sizes.tolist(),
            self.span(chunk.columns.offset),
            strict=True,
        )
        return [
            Place(chunk.partition, second, *kinds[kind], detector, size, *span) for second, kind, size, span in told
        ]

    def members(self, group: int) -> list[int]:
        """Its rows of the chunk, in order."""
        return list(self.rows[self._ends[group] : self._ends[group + 1]].tolist())

    def sums(self, values: Ints) -> list[int]:
        """Of values of the chunk, a group."""
        return list(np.add.reduceat(values[self.rows], self.starts).tolist()) if len(self) else []

    def span(self, values: Ints) -> list[tuple[int, int]]:
        """The least and the largest value of each group."""
        if not len(self):
            return []
        low = np.minimum.reduceat(values[self.rows], self.starts).tolist()
        high = np.maximum.reduceat(values[self.rows], self.starts).tolist()
        return list(zip(low, high, strict=True))

    def histograms(self, values: Ints | Floats) -> list[dict[int, int]]:
        """A log-bucket histogram a group; values that are not a number count for nothing."""
        mine = values[self.rows]
        group = self.group
        if mine.dtype.kind == "f":
            known = ~np.isnan(mine)
            mine, group = mine[known], group[known]
        code = group * BUCKETS_MAX + buckets_of(mine.astype(np.int64))
        code, counts = np.unique(code, return_counts=True)
        ends = np.searchsorted(code, np.arange(len(self) + 1) * BUCKETS_MAX).tolist()
        buckets, numbers = (code % BUCKETS_MAX).tolist(), counts.tolist()
        return [dict(zip(buckets[begin:end], numbers[begin:end], strict=True)) for begin, end in pairwise(ends)]

    def largest(self, values: Ints, limit: int) -> list[list[int]]:
        """Of each group the rows with the `limit` largest values; the earlier first where values are the same."""
        order = np.lexsort((np.arange(len(self.rows)), -values[self.rows], self.group))
        ranked = self.rows[order].tolist()
        return [
            ranked[begin : min(begin + limit, end)] for begin, end in zip(self._ends[:-1], self._ends[1:], strict=True)
        ]

    def heaviest(self, chunk: Chunk, weights: Ints, limit: int) -> list[dict[str, int]]:
        """Of each group the `limit` actors with the largest sums, largest first, ties by name."""
        if not len(self):
            return []
        entity = chunk.entity[self.rows] + 1
        parts = Groups(np.arange(len(self.rows)), self.group, entity)
        sums = np.array(parts.sums(weights[self.rows]), np.int64)
        group = self.group[parts.rows[parts.starts]]
        shown = self.rows[parts.rows[parts.starts]]
        order = np.lexsort((-sums, group))
        ends = np.searchsorted(group[order], np.arange(len(self) + 1))
        told = []
        for begin, end in pairwise(ends.tolist()):
            mine = order[begin:end]
            if len(mine) > limit:
                mine = mine[sums[mine] >= sums[mine[limit - 1]]]
            told.append(self._named(chunk, shown[mine].tolist(), sums[mine].tolist(), limit))
        return told

    def _named(self, chunk: Chunk, shown: list[int], sums: list[int], limit: int) -> dict[str, int]:
        names: dict[str, int] = {}
        for row, weight in zip(shown, sums, strict=True):
            name = chunk.actor(row)
            names[name] = names.get(name, 0) + weight
        return first(names, limit)
