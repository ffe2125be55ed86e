"""Flapping: an entity that opens and closes again and again is held open for longer, and says so.

An entity flaps from its `flap_openings`th opening within `flap_window_s`. Its episode then closes after
`flap_quiet_s` instead of `quiet_s`; a rise in severity is told at once as always.

Memory: at most 64 moments for each of at most `flap_entities_max` closed entities; beyond that the longest closed
is forgotten, which is counted, and may open once more before it counts as flapping.
"""

from collections.abc import Iterable
from typing import Final

from detectors.config import LifecycleConfig
from detectors.orders import Key
from detectors.time import SECOND_US

OPENINGS_MAX: Final = 64


class Flapping:
    """The openings of closed entities, longest closed first."""

    def __init__(self, config: LifecycleConfig) -> None:
        self._config = config
        self._closed: dict[Key, tuple[int, list[int]]] = {}
        """Key to (closed at, openings)."""
        self.counters = dict.fromkeys(("flapping", "flapping_forgotten"), 0)

    def opened(self, key: Key, at_us: int) -> list[int]:
        """The entity's openings within the window, this one included: the newest 64."""
        _, before = self._closed.pop(key, (0, []))
        since_us = at_us - self._config.flap_window_s * SECOND_US
        openings = [*(moment for moment in before if moment > since_us), at_us][-OPENINGS_MAX:]
        self.counters["flapping"] += self.flaps(openings)
        return openings

    def flaps(self, openings: list[int]) -> bool:
        """Whether so many openings are too many."""
        return len(openings) >= self._config.flap_openings

    def closed(self, key: Key, openings: list[int], at_us: int) -> None:
        """The entity's episode is over."""
        self._forget(at_us)
        if len(self._closed) >= self._config.flap_entities_max:
            del self._closed[next(iter(self._closed))]
            self.counters["flapping_forgotten"] += 1
        self._closed[key] = (at_us, openings)

    def dump(self) -> list[tuple[Key, tuple[int, list[int]]]]:
        """All of it, in order."""
        return list(self._closed.items())

    def load(self, closed: Iterable[tuple[Key, tuple[int, list[int]]]]) -> None:
        """Goes on from what `dump` gave."""
        self._closed = dict(closed)

    def _forget(self, now_us: int) -> None:
        since_us = now_us - self._config.flap_window_s * SECOND_US
        while self._closed:
            oldest = next(iter(self._closed))
            if self._closed[oldest][0] > since_us:
                return
            del self._closed[oldest]
