"""A bounded table of users and sessions, for the stage-1 halves.

Eviction, in order: entries idle for too long; then, when full, the longest unseen entry without evidence; only where
all have evidence, the longest unseen of these. So a flood of made-up users can't push out one that is under suspicion.
"Longest unseen" is by the order of (timestamp, event_id), so replays evict alike. Both kinds of eviction are counted.
"""

from collections import OrderedDict
from typing import Generic, TypeVar

State = TypeVar("State")
Dump = tuple[list[tuple[str, int, State]], list[tuple[str, int, State]], dict[str, int]]
"""An `EntityTable` as it goes into a snapshot: entries without evidence, entries with, counters."""


class EntityTable(Generic[State]):
    """Key to state, least recently touched first. Memory: `limit` entries."""

    def __init__(self, limit: int, idle_us: int) -> None:
        self._limit = limit
        self._idle_us = idle_us
        # OrderedDict, since taking the first of a plain dict again and again takes longer each time.
        self._plain: OrderedDict[str, tuple[int, State]] = OrderedDict()
        self._evident: OrderedDict[str, tuple[int, State]] = OrderedDict()
        self.counters: dict[str, int] = {"expired": 0, "evicted": 0, "evicted_with_evidence": 0}

    def __len__(self) -> int:
        return len(self._plain) + len(self._evident)

    def get(self, key: str) -> State | None:
        """The state, untouched; None for a stranger."""
        entry = self._plain.get(key) or self._evident.get(key)
        return None if entry is None else entry[1]

    def put(self, key: str, moment_us: int, state: State, *, evident: bool) -> None:
        """Keeps `state` as the most recently seen."""
        part, other = (self._evident, self._plain) if evident else (self._plain, self._evident)
        if key in part:
            part.move_to_end(key)
        elif other.pop(key, None) is None:
            self._make_room(moment_us)
        part[key] = (moment_us, state)

    def drop(self, key: str) -> None:
        """Forgets it, if it is known."""
        if self._plain.pop(key, None) is None:
            self._evident.pop(key, None)

    def _make_room(self, moment_us: int) -> None:
        for part in (self._plain, self._evident):
            while part:
                oldest = next(iter(part))
                if moment_us - part[oldest][0] <= self._idle_us:
                    break
                part.popitem(last=False)
                self.counters["expired"] += 1
        if len(self) >= self._limit:
            part = self._plain or self._evident
            part.popitem(last=False)
            self.counters["evicted" if part is self._plain else "evicted_with_evidence"] += 1

    def dump(self) -> Dump[State]:
        """What `load` takes, in order."""
        plain = [(key, moment_us, state) for key, (moment_us, state) in self._plain.items()]
        evident = [(key, moment_us, state) for key, (moment_us, state) in self._evident.items()]
        return plain, evident, self.counters

    def load(self, dumped: Dump[State]) -> None:
        """Goes on from a dump."""
        plain, evident, self.counters = dumped
        self._plain = OrderedDict((key, (moment_us, state)) for key, moment_us, state in plain)
        self._evident = OrderedDict((key, (moment_us, state)) for key, moment_us, state in evident)
