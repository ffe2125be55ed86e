"""How many requests and tokens each client had in a window, and in the windows before: numpy columns of a registry.

Windows are fixed: second // window_s. A client's *past* is its largest window, fading to nothing over `memory_s`; a
window that exceeds it by `RATIO_MIN` waits `ADOPT_S` before it becomes past, so that a flood does not hide its own next
hour, while what a job does every day is past from the second day on. Only additions, multiplications and comparisons
are done, which every machine does alike, and nothing depends on where a batch ends.

Memory: 54 bytes a client.
"""

from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

from detectors.chunk import bits, in_order_of
from detectors.columns import Floats, Ints
from detectors.config import VolumeConfig
from detectors.registry import Registry, Rows

RATIO_MIN: Final = 1.5
"""From so many times its past on a client's window is told to the second half."""
LEVELS: Final[Floats] = np.array([RATIO_MIN * 2 ** (step / 4) for step in range(160)])
"""Each of them is told once a window."""
ADOPT_S: Final = 20 * 3_600
"""Less than a day, so that a daily job is told once."""
MEASURES: Final = ("requests", "tokens")


class Crossing(NamedTuple):
    """An event that took its client's window past one of `LEVELS`."""

    event: int
    """Its place among the events given."""
    measure: int
    """Of `MEASURES`."""
    volume: int
    ratio_milli: int
    """To the client's past."""
    windows: int
    """Active windows known of the client."""


class Added(NamedTuple):
    """What some events came to."""

    crossings: list[Crossing]
    reached: tuple[tuple[Rows, Ints], tuple[Rows, Ints]]
    """A measure: the events that took their client's window to a power of two, and to which."""
    above: Rows
    """Events of clients whose window was above their past in requests or tokens."""


class Book:
    """Windows and pasts of the clients of one registry."""

    def __init__(self, registry: Registry, name: str, config: VolumeConfig) -> None:
        self._window_s = config.window_s
        self._least = np.array([config.requests_min, config.tokens_min], np.float64)
        self._memory = config.memory_s // config.window_s
        self._adopt = ADOPT_S // config.window_s
        self._window = registry.column(f"{name}.window", np.uint32)
        self._sums = registry.column(f"{name}.sums", np.int64, 2)
        self._past = registry.column(f"{name}.past", np.float64, 2)
        self._held = registry.column(f"{name}.held", np.float64, 2)
        self._held_since = registry.column(f"{name}.held_since", np.uint32)
        self._windows = registry.column(f"{name}.windows", np.uint16)

    def add(self, second: Ints, row: Rows, requests: Ints, tokens: Ints) -> Added:
        """Events in order of time, each of a client of the registry."""
        window = second // self._window_s
        cuts = [0, *(np.flatnonzero(np.diff(window)) + 1).tolist(), len(row)]
        told: list[Added] = []
        for begin, end in pairwise(cuts):
            part = slice(begin, end)
            if end > begin:
                told.append(self._within(begin, int(window[begin]), row[part], (requests[part], tokens[part])))
        if len(told) == 1:
            return told[0]
        merged = [crossing for each in told for crossing in each.crossings]
        empty = [np.zeros(0, np.int64)]
        reached = [
            tuple(np.concatenate(empty + [each.reached[measure][which] for each in told]) for which in (0, 1))
            for measure in (0, 1)
        ]
        above = np.concatenate(empty + [each.above for each in told])
        return Added(merged, ((reached[0][0], reached[0][1]), (reached[1][0], reached[1][1])), above)

    def _within(self, begin: int, window: int, row: Rows, amounts: tuple[Ints, Ints]) -> Added:
        order, ordered = in_order_of(row, int(row.max()) + 1)
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        who = ordered[starts]
        stale = who[self._window.values[who] != window]
        if len(stale):
            self._roll(stale, window)
        sizes = np.diff(np.append(starts, len(row)))
        base = np.maximum(self._past.values[who], self._least)
        before = self._sums.values[who]
        crossings: list[Crossing] = []
        reached, over = [], np.zeros(len(row), bool)
        for measure, amount in enumerate(amounts):
            summed = np.cumsum(amount[order])
            offset = before[:, measure] - (summed[starts] - amount[order][starts])
            running = summed + np.repeat(offset, sizes)
            ends = running[np.append(starts[1:], len(row)) - 1]
            self._sums.values[who, measure] = ends
            earlier = running - amount[order]
            grew = np.flatnonzero((running ^ earlier) > earlier)  # its highest bit is new
            reached.append((begin + order[grew], bits(running[grew])))
            high = np.flatnonzero(ends > base[:, measure])
            if len(high):
                mine = np.concatenate([np.arange(starts[each], starts[each] + sizes[each]) for each in high])
                least = np.repeat(base[high, measure], sizes[high])
                over[mine[running[mine] > least]] = True
                crossings += self._crossings(begin, measure, mine, order, running, amount, least, row)
        return Added(crossings, (reached[0], reached[1]), begin + np.sort(order[over]))

    def _crossings(  # noqa: PLR0917  # the parts of one sum
        self, begin: int, measure: int, mine: Ints, order: Ints, running: Ints, amount: Ints, least: Floats, row: Rows
    ) -> list[Crossing]:
        level = np.searchsorted(LEVELS, running[mine] / least, side="right")
        passed = np.flatnonzero(level > np.searchsorted(LEVELS, (running[mine] - amount[order[mine]]) / least, "right"))
        return [
            Crossing(
                begin + int(order[mine[each]]),
                measure,
                int(running[mine[each]]),
                int(1_000 * running[mine[each]] / least[each]),
                int(self._windows.values[row[order[mine[each]]]]),
            )
            for each in passed.tolist()
        ]

    def _roll(self, who: Rows, window: int) -> None:
        """Their last window becomes past, or waits to; then the past fades until now."""
        last, sums = self._window.values[who].astype(np.int64), self._sums.values[who].astype(np.float64)
        past, held, since = self._past.values[who], self._held.values[who], self._held_since.values[who]
        high = sums >= RATIO_MIN * np.maximum(past, self._least)
        past = np.where(high, past, np.maximum(past, sums))
        since = np.where(high.any(axis=1) & (held == 0).all(axis=1), last, since)
        held = np.where(high, np.maximum(held, sums), held)
        past *= np.maximum(1 - (window - last) / self._memory, 0)[:, None]
        due = (window - since.astype(np.int64) >= self._adopt)[:, None]
        self._past.values[who] = np.where(due, np.maximum(past, held), past)
        self._held.values[who] = np.where(due, 0, held)
        self._held_since.values[who] = since
        known = self._windows.values[who]
        self._windows.values[who] = np.where(last > 0, np.minimum(known, 65_534) + 1, known)
        self._window.values[who] = window
        self._sums.values[who] = 0
