"""What a detector's first half is given: the events of some closed seconds in order, and ways to add them up by key.

Order: (timestamp, event_id), whatever the arrival (T8). How many seconds a chunk has depends on the batches, so what a
half says of a second must not depend on where the chunk ends.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

from detectors.columns import SECOND_US, Columns, Floats, Ints, picked
from detectors.detector import actor
from detectors.finding import EVENT_IDS_MAX
from detectors.histogram import buckets_of
from detectors.registry import Registry, Rows
from detectors.rollup import Extreme, Partial, Sample, first
from detectors.text import Text, actor_of, event_id_of, text_of

BUCKETS_MAX: Final = 512
"""More than `detectors.histogram` has."""
COUNTERS_A_NUMBER: Final = 8
"""With more of them sorting is quicker than counting."""


class Chunk:
    """Events in order, with the second and the registry's row of each."""

    def __init__(self, columns: Columns, partition: int, registry: Registry) -> None:
        """`columns` in order of time. Admits strangers to the registry."""
        self.columns, self.partition = columns, partition
        self.second: Ints = columns.moment_us // SECOND_US
        self.step: Ints = np.cumsum(np.diff(self.second, prepend=self.second[:1]) != 0)
        """The second's number in the chunk: 0, 1, 2 …"""
        self.entity: Rows = registry.rows(columns.high, columns.low, columns.moment_us, columns.named)
        self._events: dict[int, Text] = {}
        self._actors: dict[int, str] = {}
        """Row of the registry to who it is."""

    def __len__(self) -> int:
        return len(self.columns)

    def event(self, index: int) -> Text:
        """What the event says in words, decoded when first asked for."""
        event = self._events.get(index)
        if event is None:
            event = self._events[index] = text_of(self.columns.raws[index])
        return event

    def actor(self, index: int) -> str:
        """Who sent it; may be empty."""
        row = self.entity.item(index)
        name = self._actors.get(row)
        if name is None:
            event = self._events.get(index)
            name = actor_of(self.columns.raws[index]) if event is None else actor(event)
            if row >= 0:
                self._actors[row] = name
        return name

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        """The first five of these, which are in order."""
        moments = self.columns.moment_us
        return [(int(moments[index]), self.event(index).event_id) for index in indices[:EVENT_IDS_MAX]]


def in_order(columns: Columns, rows: Rows) -> Columns:
    """These events, sorted by (timestamp, event_id)."""
    order = rows[np.argsort(columns.moment_us[rows], kind="stable")]
    moments = columns.moment_us[order]
    tied = np.flatnonzero(moments[1:] == moments[:-1])
    if len(tied):
        apart = np.flatnonzero(np.diff(tied) != 1)
        begins, ends = tied[np.append(0, apart + 1)].tolist(), (tied[np.append(apart, len(tied) - 1)] + 2).tolist()
        for begin, end in zip(begins, ends, strict=True):
            order[begin:end] = sorted(order[begin:end].tolist(), key=lambda row: event_id_of(columns.raws[row]))
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


def in_order_of(code: Ints, bound: int) -> tuple[Rows, Ints]:
    """The stable order of numbers below `bound`, none negative, and the numbers in it.

    Sixteen bits at a time, the lowest first: numpy sorts so short numbers by counting, several times quicker than
    others. Seconds mostly come in order."""
    if (code[1:] >= code[:-1]).all():
        return np.arange(len(code)), code
    order = np.argsort(code.astype(np.uint16), kind="stable")
    for shift in range(16, (bound - 1).bit_length(), 16):
        order = order[np.argsort((code[order] >> shift).astype(np.uint16), kind="stable")]
    return order, code[order]


def tallied(code: Ints, bound: int) -> tuple[Ints, Ints]:
    """The different ones of numbers below `bound`, ascending, and how often each is there."""
    if bound > COUNTERS_A_NUMBER * (len(code) + BUCKETS_MAX):
        return np.unique(code, return_counts=True)
    counts = np.bincount(code, minlength=bound)
    found = np.flatnonzero(counts)
    return found, counts[found]


def bits(values: Ints) -> Ints:
    """The number of bits of each value, which is below 2**53: sizes in powers of two."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


class Groups:
    """Events with equal keys. Groups are in order of key, and events within a group in the chunk's order."""

    def __init__(self, rows: Rows, *keys: Ints) -> None:
        """`rows` of a chunk, and the keys of each of them, the most significant first; none negative."""
        code, bound = keys[0], int(keys[0].max(initial=0)) + 1
        for key in keys[1:]:
            different = int(key.max(initial=0)) + 1
            if different > 1:
                code, bound = code * different + key, bound * different
        order, ordered = in_order_of(code, bound)
        new = np.ones(len(rows), bool)
        np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
        self.starts: Rows = np.flatnonzero(new)
        self.rows: Rows = rows[order]
        ends = np.append(self.starts, len(rows))
        self.sizes: Ints = ends[1:] - ends[:-1]
        self.group: Ints = np.repeat(np.arange(len(self.starts)), self.sizes)
        """The group of each of `rows`."""
        self._order = order
        self._ends = ends.tolist()

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

    def first_members(self, group: int) -> list[int]:
        """The first of its rows of the chunk, in order: as many as `Chunk.samples` takes."""
        begin, end = self._ends[group], self._ends[group + 1]
        return list(self.rows[begin : min(begin + EVENT_IDS_MAX, end)].tolist())

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

    def histograms(self, *values: Ints | Floats, factor: int = 1) -> list[list[dict[int, int]]]:
        """Of each of `values`, times `factor`, a log-bucket histogram a group. What is no number counts for nothing."""
        if not len(self):
            return [[] for _ in values]
        whole = len(values) * len(self)
        mine = np.concatenate([each[self.rows] for each in values])
        group = np.arange(whole).reshape(len(values), -1)[:, self.group].ravel()
        if factor != 1:
            mine *= factor
        if mine.dtype.kind == "f":
            known = ~np.isnan(mine)
            mine, group = mine[known], group[known]
        code, counts = tallied(group * BUCKETS_MAX + buckets_of(mine.astype(np.int64)), whole * BUCKETS_MAX)
        ends = np.searchsorted(code, np.arange(whole + 1) * BUCKETS_MAX).tolist()
        buckets, numbers = (code % BUCKETS_MAX).tolist(), counts.tolist()
        found = [dict(zip(buckets[begin:end], numbers[begin:end], strict=True)) for begin, end in pairwise(ends)]
        return [found[begin : begin + len(self)] for begin in range(0, whole, len(self))]

    def largest(self, values: Ints, limit: int) -> list[list[int]]:
        """Of each group the rows with the `limit` largest values; the earlier first where values are the same."""
        mine = values[self.rows]
        most = int(mine.max(initial=0)) + 1
        order, _ = in_order_of(self.group * most + (most - 1 - mine), len(self) * most)
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
        sums = np.add.reduceat(weights[self.rows][parts.rows], parts.starts)
        heads = parts.rows[parts.starts]
        shown = self.rows[heads]
        ends = np.searchsorted(self.group[heads], np.arange(len(self) + 1))
        told = []
        for begin, end in pairwise(ends.tolist()):
            mine = sums[begin:end]
            heavy = np.arange(begin, end)
            if len(mine) > limit:
                heavy = heavy[mine >= np.partition(mine, len(mine) - limit)[len(mine) - limit]]
            told.append(self._named(chunk, shown[heavy].tolist(), sums[heavy].tolist(), limit))
        return told

    def _named(self, chunk: Chunk, shown: list[int], sums: list[int], limit: int) -> dict[str, int]:
        names: dict[str, int] = {}
        for row, weight in zip(shown, sums, strict=True):
            name = chunk.actor(row)
            names[name] = names.get(name, 0) + weight
        return first(names, limit)
