"""The users of one partition: who was seen, when, and a few numbers that detectors keep of each, in numpy columns.

A user is known by 128 bits (`detectors.columns`). Memory: 16 bytes of key, about 8 of index and 16 of times
an entity, and what detectors declare (`column`): with all of them some 120 bytes, the key included.

Bound: `limit` entities. When a second brings more, the longest unseen go first, those without evidence before any with;
both are counted. This is decided from one whole second at a time, so batches and restarts change nothing.
"""

from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import DTypeLike, NDArray

Rows = NDArray[np.int64]
Keys = NDArray[np.uint64]

NOBODY: Final = -1
"""The row of an event without an actor, or of one for whom there was no room."""
CAPACITY_MIN: Final = 1_024
SPARE: Final = 16
"""An eviction makes room for a sixteenth of the limit, so that it is rare."""
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)
_SHIFT: Final = np.uint64(32)


class Column:
    """One number an entity, or a few. `values[row]` is its own until the entity is evicted."""

    __slots__ = ("dtype", "values", "width")

    def __init__(self, dtype: DTypeLike, width: int) -> None:
        self.dtype, self.width = np.dtype(dtype), width
        self.values: NDArray[Any] = np.zeros(self._shape(CAPACITY_MIN), self.dtype)

    def _shape(self, rows: int) -> tuple[int, ...]:
        return (rows, self.width) if self.width > 1 else (rows,)

    def resize(self, rows: int, live: int) -> None:
        """Room for `rows`, the first `live` kept."""
        values = np.zeros(self._shape(rows), self.dtype)
        values[:live] = self.values[:live]
        self.values = values

    def keep(self, rows: Rows) -> None:
        """Only these rows, in this order; the rest is zero."""
        kept = self.values[rows]
        self.values[: len(rows)] = kept
        self.values[len(rows) :] = 0

    def load(self, raw: bytes, capacity: int, live: int) -> None:
        """The inverse of `values[:live].tobytes()`."""
        self.values = np.zeros(self._shape(capacity), self.dtype)
        self.values[:live] = np.frombuffer(raw, self.dtype).reshape(self._shape(live))


class Registry:
    """Keys to rows. Rows are dense, and change only at an eviction."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.live = 0
        self._columns: dict[str, Column] = {}
        self._high = self.column("key.high", np.uint64)
        self._low = self.column("key.low", np.uint64)
        self._last_us = self.column("last_us", np.int64)
        self._evident_s = self.column("evident_s", np.int64)
        self._index = np.full(2 * CAPACITY_MIN, NOBODY, np.int32)
        self.counters: dict[str, int] = {"evicted": 0, "evicted_with_evidence": 0, "refused": 0}

    def column(self, name: str, dtype: DTypeLike, width: int = 1) -> Column:
        """A number an entity that is kept, evicted and saved with it. Declare it before the first event."""
        column = self._columns[name] = Column(dtype, width)
        return column

    def suspect(self, row: int, until_s: int) -> None:
        """A detector holds something against the entity until then, so it is evicted last."""
        self._evident_s.values[row] = max(int(self._evident_s.values[row]), until_s)

    def sure_of_room(self, events: int) -> bool:
        """Whether so many more events can't bring an eviction, whoever sent them."""
        return self.live + events <= self._limit

    def rows(self, high: Keys, low: Keys, moment_us: NDArray[np.int64], named: NDArray[np.bool_]) -> Rows:
        """The row of each event, in order of time: strangers get one. Of one second, unless `sure_of_room`."""
        rows = self._find(high, low)
        rows[~named] = NOBODY
        strangers = np.flatnonzero((rows == NOBODY) & named)
        if len(strangers):
            rows = self._welcome(rows, strangers, high, low, moment_us)
        self._last_us.values[rows[rows >= 0]] = moment_us[rows >= 0]
        return rows

    def _find(self, high: Keys, low: Keys) -> Rows:
        rows = np.full(len(high), NOBODY, np.int64)
        slots = self._home(high, low)
        looking = np.arange(len(high))
        mask = len(self._index) - 1
        while len(looking):
            found = self._index[slots[looking]]
            same = (self._high.values[found] == high[looking]) & (self._low.values[found] == low[looking])
            free = found == NOBODY
            same &= ~free
            rows[looking[same]] = found[same]
            looking = looking[~(same | free)]
            slots[looking] = (slots[looking] + 1) & mask
        return rows

    def _home(self, high: Keys, low: Keys) -> NDArray[np.int64]:
        mixed = ((high ^ (low << np.uint64(1))) * _MIX) >> _SHIFT
        return (mixed & np.uint64(len(self._index) - 1)).astype(np.int64)

    def _welcome(self, rows: Rows, strangers: Rows, high: Keys, low: Keys, moment_us: NDArray[np.int64]) -> Rows:
        order = strangers[np.lexsort((strangers, low[strangers], high[strangers]))]
        new = np.ones(len(order), bool)
        new[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
        firsts = order[new]
        if self.live + len(firsts) > self._limit:
            rows = self._make_room(rows, len(firsts), int(moment_us[0]) // 1_000_000)
        which = np.cumsum(new) - 1
        room = self._limit - self.live
        rank = np.argsort(np.argsort(firsts))  # by first appearance: then rows don't depend on the cut
        given = np.where(rank < room, self.live + rank, NOBODY)
        # A second may bring more strangers than the whole table takes.
        self.counters["refused"] += max(len(firsts) - room, 0)
        admitted = np.sort(firsts)[:room]
        self._add(high[admitted], low[admitted])
        rows[order] = given[which]
        return rows

    def _add(self, high: Keys, low: Keys) -> None:
        begin, end = self.live, self.live + len(high)
        if end > len(self._high.values):
            self._grow(end)
        self._high.values[begin:end], self._low.values[begin:end] = high, low
        self.live = end
        self._place(np.arange(begin, end))

    def _grow(self, needed: int) -> None:
        capacity = len(self._high.values)
        while capacity < needed:
            capacity += max(capacity // 2, CAPACITY_MIN)
        for column in self._columns.values():
            column.resize(capacity, self.live)
        self._reindex(capacity)

    def _reindex(self, capacity: int) -> None:
        size = 2 * CAPACITY_MIN
        while size < 3 * capacity // 2:
            size *= 2
        self._index = np.full(size, NOBODY, np.int32)
        self._place(np.arange(self.live))

    def _place(self, rows: Rows) -> None:
        """Puts rows whose keys are stored into the index: open addressing, all of them a step at a time."""
        slots = self._home(self._high.values[rows], self._low.values[rows])
        mask = len(self._index) - 1
        while len(rows):
            free = self._index[slots] == NOBODY
            self._index[slots[free]] = rows[free]
            waiting = self._index[slots] != rows
            rows, slots = rows[waiting], (slots[waiting] + 1) & mask

    def _make_room(self, rows: Rows, wanted: int, now_s: int) -> Rows:
        """Evicts; the rows found so far are told anew. Who is in this very second is not evicted."""
        age = self._last_us.values[: self.live]
        present = np.zeros(self.live, bool)
        present[rows[rows >= 0]] = True
        evident = self._evident_s.values[: self.live] > now_s
        order = np.lexsort((self._low.values[: self.live], self._high.values[: self.live], age, evident, present))
        room = self._limit - self.live
        gone = order[: min(max(wanted + self._limit // SPARE - room, 0), self.live - np.count_nonzero(present))]
        with_evidence = int(np.count_nonzero(evident[gone]))
        self.counters["evicted"] += len(gone) - with_evidence
        self.counters["evicted_with_evidence"] += with_evidence
        stay = np.ones(self.live, bool)
        stay[gone] = False
        kept = np.flatnonzero(stay)
        told_anew = np.cumsum(stay) - 1
        for column in self._columns.values():
            column.keep(kept)
        self.live = len(kept)
        self._reindex(len(self._high.values))
        found = rows >= 0
        rows[found] = told_anew[rows[found]]
        return rows

    def dump(self) -> bytes:
        """Everything; `load` into a registry with the same columns gives the same one."""
        columns = {name: column.values[: self.live].tobytes() for name, column in self._columns.items()}
        return _encoder.encode((self.live, columns, self.counters))

    def load(self, raw: bytes) -> None:
        """Goes on from a dump; a column that it does not know starts at zero. Raises `msgspec.DecodeError`."""
        self.live, columns, self.counters = _decoder.decode(raw)
        capacity = max(self.live, CAPACITY_MIN)
        for name, column in self._columns.items():
            if name in columns:
                column.load(columns[name], capacity, self.live)
            else:
                column.resize(capacity, 0)
        self._reindex(capacity)


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(tuple[int, dict[str, bytes], dict[str, int]])
