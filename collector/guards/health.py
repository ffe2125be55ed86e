"""Whether the guards still do what they did at their start: canaries by the clock, and the drift of their scores.

A canary is one of a guard's own probes, a known attack or a known harmless text, in turn, judged on the same threads
and under the same deadline as a request, past the cache, and under no tenant: no event speaks of it. A guard that
answers one wrongly, or not at all, is unhealthy until it has answered one of that kind rightly; heartbeats carry both,
and the coverage detector makes a finding of what fails. A canary shows that a guard works, not that it is good.

Drift is the population stability index between the first `REFERENCE_SCORES` scores that a guard of one version gave at
one stage and its last so many, over ten equal bins, each with half a score added: sum of (p − q) ln(p / q). Below 0.1
nothing has changed, above 0.25 much has, by custom (Siddiqi, Credit Risk Scorecards, 2006). It tells that traffic or
guard are not what they were, not which of them. Memory: three lists of ten numbers for each guard and stage.
"""

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import structlog

from collector.event import Stage
from collector.guards.protocol import Guard, Probe

_log = structlog.get_logger(__name__)
BINS: Final = 10
REFERENCE_SCORES: Final = 1_000
DRIFT_TOLD: Final = 0.25


def stability_index(first: Sequence[int], last: Sequence[int]) -> float:
    """The population stability index of two histograms of the same bins; 0 where either is empty."""
    totals = sum(first), sum(last)
    if not all(totals):
        return 0.0
    shares = [
        ((a + 0.5) / (totals[0] + len(first) / 2), (b + 0.5) / (totals[1] + len(last) / 2))
        for a, b in zip(first, last, strict=True)
    ]
    return math.fsum((q - p) * math.log(q / p) for p, q in shares)


class Scores:
    """What one guard of one version gave at one stage."""

    __slots__ = ("all", "drift", "last", "reference", "version")

    def __init__(self, version: str) -> None:
        self.version = version
        self.all, self.last = [0] * BINS, [0] * BINS
        self.reference: list[int] = []
        self.drift = 0.0

    def add(self, score: float) -> bool:
        """One more score; whether the drift has just been taken anew."""
        place = min(BINS - 1, int(score * BINS))
        self.all[place] += 1
        self.last[place] += 1
        if sum(self.last) < REFERENCE_SCORES:
            return False
        last, self.last = self.last, [0] * BINS
        if not self.reference:
            self.reference = last
            return False
        self.drift = stability_index(self.reference, last)
        return True


class Health:
    """Thread-safe. `judge`: a guard's block or pass on a probe, None where it failed."""

    def __init__(self, guards: Iterable[Guard], judge: Callable[[Guard, Probe], bool | None]) -> None:
        self._guards, self._judge = tuple(guards), judge
        self._lock = threading.Lock()
        self._scores: dict[tuple[str, Stage], Scores] = {}
        self._failed: dict[str, int] = {}
        self._wrong: dict[str, set[bool]] = {}
        """By guard: the kinds of canaries, attack or not, of which it has answered the last one wrongly."""
        self._round = 0
        self._stop = threading.Event()

    def scored(self, guard: Guard, stage: Stage, score: float) -> None:
        """A text was judged."""
        key = (guard.name, stage)
        with self._lock:
            scores = self._scores.get(key)
            if scores is None or scores.version != guard.version:
                scores = self._scores[key] = Scores(guard.version)
            drifted = scores.add(score) and scores.drift > DRIFT_TOLD
        if drifted:
            _log.warning("a guard's scores are not what they were", guard=key[0], stage=stage, index=scores.drift)

    def canaries(self) -> None:
        """One canary for each guard: attacks and harmless texts in turn."""
        for guard in self._guards:
            probes = [probe for probe in guard.probes if probe.block is (self._round % 2 == 0)]
            if not probes:
                continue  # a sidecar that has not been there yet
            probe = probes[self._round // 2 % len(probes)]
            right = self._judge(guard, probe) is probe.block
            with self._lock:
                wrong = self._wrong.setdefault(guard.name, set())
                healthy = not wrong
                (wrong.discard if right else wrong.add)(probe.block)
                self._failed[guard.name] = self._failed.get(guard.name, 0) + (not right)
            if not right:
                kind = "missed a known attack" if probe.block else "did not pass a known harmless text"
                _log.error(f"a guard {kind}", guard=guard.name, stage=probe.stage)
            elif not healthy and not wrong:
                _log.warning("a guard is healthy again", guard=guard.name)
        self._round += 1

    def watch(self, every_s: float) -> None:
        """Canaries every so many seconds, on a thread of their own, until `close`. 0: none."""
        if every_s and self._guards:
            threading.Thread(target=self._watch, args=(every_s,), name="guards-canaries", daemon=True).start()

    def _watch(self, every_s: float) -> None:
        while not self._stop.wait(every_s):
            self.canaries()

    def close(self) -> None:
        """No more canaries."""
        self._stop.set()

    def told(self) -> Mapping[str, object]:
        """As fields of a heartbeat."""
        with self._lock:
            return {
                "canaries_failed": {name: count for name, count in self._failed.items() if count},
                "guards_unhealthy": sorted(name for name, wrong in self._wrong.items() if wrong),
                "guard_scores": {f"{name}/{stage}": list(each.all) for (name, stage), each in self._scores.items()},
                "guard_drift": self._drift(),
            }

    @property
    def drift(self) -> Mapping[str, float]:
        """By `GUARD/STAGE`, where it is known: the index between the first scores and the last."""
        with self._lock:
            return self._drift()

    def _drift(self) -> dict[str, float]:
        return {f"{name}/{stage}": round(each.drift, 4) for (name, stage), each in self._scores.items() if each.drift}

    @property
    def failed(self) -> int:
        """Canaries that failed since the start."""
        return sum(self._failed.values())

    @property
    def unhealthy(self) -> int:
        """Guards that are unhealthy now."""
        return sum(map(bool, self._wrong.values()))
