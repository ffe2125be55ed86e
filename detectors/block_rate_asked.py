"""How much the users of a partition ask, so that stage 2 can tell a few attackers from a busy crowd.

With each block goes how many requests its user had sent by then, and the seconds of his last eight; with his first,
third and ninth request after it, the number again. All are integers, and a user is in one partition, so partitions
merge.

Memory: 40 bytes a user, in the registry.
"""

from typing import Final

import numpy as np
from msgspec import Struct

from detectors.chunk import Chunk, in_order_of
from detectors.columns import Flags, Ints
from detectors.registry import Registry

TIMES: Final = 8
"""Requests of a user of which the second is kept."""
LATER: Final = (1, 3, 9)
"""Requests after a user's last block with which his number of requests is told again."""


class Asked(Struct, frozen=True):
    """What a user had asked by his block: requests in all, and the seconds of the last eight, oldest first."""

    total: int
    seconds: list[int]


class Asking:
    """Of each user the number of requests, that by the last block, and the seconds of the last eight."""

    def __init__(self, registry: Registry, name: str) -> None:
        """Declares its columns under that name."""
        self._total = registry.column(f"{name}.total", np.uint32)
        self._blocked = registry.column(f"{name}.total_blocked", np.uint32)
        self._times = registry.column(f"{name}.times", np.uint32, TIMES)

    def see(self, chunk: Chunk, trial: Ints, blocked: Flags) -> tuple[dict[int, Asked], dict[int, int]]:
        """By event: what the user of a blocked one had asked, and the number that is told again.

        `trial` is the event of each verdict, in order."""
        hit = np.zeros(len(chunk), bool)
        hit[trial[blocked]] = True
        new = np.ones(len(trial), bool)
        np.not_equal(trial[1:], trial[:-1], out=new[1:])
        events = trial[new]
        events = events[chunk.entity[events] >= 0]
        if not len(events):
            return {}, {}
        rows = chunk.entity[events]
        order, rows = in_order_of(rows, int(rows.max()) + 1)
        events = events[order]
        starts = np.flatnonzero(np.concatenate(([True], rows[1:] != rows[:-1])))
        sizes = np.diff(starts, append=len(rows))
        rank = np.arange(len(rows)) - np.repeat(starts, sizes)
        before = self._total.values[rows].astype(np.int64)
        marks = self._blocked.values[rows].astype(np.int64)
        since = before + rank + 1 - marks
        due = np.flatnonzero((marks > 0) & np.isin(since, LATER))
        later = dict(zip(events[due].tolist(), (since + marks)[due].tolist(), strict=True))
        asked: dict[int, Asked] = {}
        hits = hit[events]
        mine = np.flatnonzero(np.logical_or.reduceat(hits, starts))
        for begin, size in zip(starts[mine].tolist(), sizes[mine].tolist(), strict=True):
            part = slice(begin, begin + size)
            numbers = events[part].tolist(), chunk.second[events[part]].tolist(), hits[part].tolist()
            self._with_blocks(int(rows[begin]), *numbers, asked, later)
        # Of two requests with one place the later is written last, and stays.
        self._times.values[rows, (before + rank) % TIMES] = chunk.second[events]
        self._total.values[rows[starts]] += sizes.astype(np.uint32)
        return asked, later

    def _with_blocks(  # noqa: PLR0917  # three columns of one table
        self,
        row: int,
        events: list[int],
        seconds: list[int],
        hits: list[bool],
        asked: dict[int, Asked],
        later: dict[int, int],
    ) -> None:
        """All events of one user, of which some were blocked."""
        total, mark = int(self._total.values[row]), int(self._blocked.values[row])
        times = self._times.values[row].tolist()
        seen = [times[number % TIMES] for number in range(max(total - TIMES, 0), total)]
        before = len(seen)
        seen += seconds
        for place, (event, blocked) in enumerate(zip(events, hits, strict=True), 1):
            later.pop(event, None)
            if blocked:
                mark = total + place
                asked[event] = Asked(mark, seen[max(before + place - TIMES, 0) : before + place])
            elif mark and total + place - mark in LATER:
                later[event] = total + place
        self._blocked.values[row] = mark
