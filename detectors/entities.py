"""Bounded tables for the detectors: of what is held against users, and of models and tenants.

Eviction: entries idle for too long; then, when full, the longest unseen, by the order of (timestamp, event_id), so that
replays evict alike. Both are counted. Users without evidence are in `detectors.registry`.

A model or tenant is known for good while it is in use: a full table refuses new ones, until one is gone. Each revision
of a model's weights is a model, so without this a year of them would fill the table.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, TypeVar

Key = TypeVar("Key", str, bytes)
State = TypeVar("State")
Name = TypeVar("Name", str, tuple[str, str])
Dump = tuple[list[tuple[Key, int, State]], dict[str, int]]
"""An `EntityTable` as it goes into a snapshot: entries, counters."""


class EntityTable(Generic[Key, State]):
    """Key to state, least recently touched first. Memory: `limit` entries."""

    def __init__(self, limit: int, idle_us: int) -> None:
        self._limit = limit
        self._idle_us = idle_us
        # OrderedDict, since taking the first of a plain dict again and again takes longer each time.
        self._entries: OrderedDict[Key, tuple[int, State]] = OrderedDict()
        self.counters: dict[str, int] = {"expired": 0, "evicted_with_evidence": 0}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> State | None:
        """The state, untouched; None for a stranger."""
        entry = self._entries.get(key)
        return None if entry is None else entry[1]

    def put(self, key: Key, moment_us: int, state: State) -> None:
        """Keeps `state` as the most recently seen."""
        if key in self._entries:
            self._entries.move_to_end(key)
        else:
            self._make_room(moment_us)
        self._entries[key] = (moment_us, state)

    def drop(self, key: Key) -> None:
        """Forgets it, if it is known."""
        self._entries.pop(key, None)

    def _make_room(self, moment_us: int) -> None:
        entries = self._entries
        while entries and moment_us - next(iter(entries.values()))[0] > self._idle_us:
            entries.popitem(last=False)
            self.counters["expired"] += 1
        if len(entries) >= self._limit:
            entries.popitem(last=False)
            self.counters["evicted_with_evidence"] += 1

    def dump(self) -> Dump[Key, State]:
        """What `load` takes, in order."""
        return [(key, moment_us, state) for key, (moment_us, state) in self._entries.items()], self.counters

    def load(self, dumped: Dump[Key, State]) -> None:
        """Goes on from a dump."""
        entries, self.counters = dumped
        self._entries = OrderedDict((key, (moment_us, state)) for key, moment_us, state in entries)


GONE_S: Final = 28 * 86_400
"""What was not seen for so long makes room."""


class Room(Generic[Name, State]):
    """Makes room in a full table of models or tenants. What it keeps only saves looking again: it needs no snapshot."""

    def __init__(self, seen_s: Callable[[State], int]) -> None:
        """`seen_s`: when one was last seen; that never falls."""
        self._seen_s = seen_s
        self._none_before_s = 0

    def made(self, table: dict[Name, State], now_s: int) -> bool:
        """Drops what was longest unseen, of equals the first by name; False where all are in use."""
        if now_s < self._none_before_s:
            return False
        name = min(table, key=lambda each: (self._seen_s(table[each]), each))
        self._none_before_s = self._seen_s(table[name]) + GONE_S
        if now_s < self._none_before_s:
            return False
        del table[name]
        return True
