"""Counting for the metrics page: histograms, rates, and counters that never go back. Pure."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Final, Self


class Histogram:
    """Counts of values by upper bound. One task adds; reading it needs no lock."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        """By bound, not cumulative; the last is for all that is larger."""
        self.sum = 0.0

    @classmethod
    def of_seconds(cls) -> Self:
        """For how long something took: 1 ms to 10 s."""
        return cls((0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10))

    @classmethod
    def of_records(cls) -> Self:
        """For how many records came together: 1 to 50,000."""
        return cls((1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000))

    def add(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, int]]:
        """(upper bound, values up to it), as Prometheus wants them."""
        names = [*(f"{bound:g}" if bound < 1e5 else str(bound) for bound in self.bounds), "+Inf"]
        return list(zip(names, accumulate(self.counts), strict=True))


Counts = Mapping[str, int]


class Tally:
    """Counters of engines that come and go with their partitions, as counters of the process, which never go back.

    An engine counts since the beginning of its log; of that only what it counted here is taken. What a restart replays
    is counted again.
    """

    def __init__(self) -> None:
        self._kept: Counter[str] = Counter()
        self._before: dict[int, Counts] = {}

    def begin(self, found: Mapping[int, Counts]) -> None:
        """These partitions were restored, with what their engines had counted elsewhere."""
        self._before = {partition: dict(counts) for partition, counts in found.items()}

    def end(self, now: Mapping[int, Counts]) -> None:
        """All partitions go; `now` is the last that their engines say."""
        self._kept = self.totals(now)
        self._before = {}

    def totals(self, now: Mapping[int, Counts]) -> Counter[str]:
        """What was counted in this process."""
        totals = Counter(self._kept)
        for partition, counts in now.items():
            before = self._before.get(partition, {})
            for name, count in counts.items():
                totals[name] += max(count - before.get(name, 0), 0)
        return totals


UNWATCHED: Final = ("entities.refused", "volume.refused", ".refused_keys", ".refused_tenants")
FAILURES: Final = (".failed_chunks", "failed_judgements")


def troubles(counted: Counts) -> dict[str, int]:
    """Of an engine's counters: who was forgotten for want of room, who is not watched for want of it, how often a
    detector failed, and how many seconds were judged before all had spoken of them."""
    return {
        "evictions": sum(count for name, count in counted.items() if "evicted" in name.rpartition(".")[2]),
        "unwatched": sum(count for name, count in counted.items() if name.endswith(UNWATCHED)),
        "forced_seconds": counted.get("forced_seconds", 0),
        "detector_failures": sum(count for name, count in counted.items() if name.endswith(FAILURES)),
    }


class Rate:
    """How much a counter grows in a second, over the last `WINDOW_S` to twice that."""

    WINDOW_S: Final = 10.0

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._marks: list[tuple[float, int]] = []
        """(when, how much): the beginning of the window before, and of this one."""

    def of(self, total: int) -> float:
        """The rate, by this and earlier calls; 0 at the first."""
        now_s = self._clock_s()
        if not self._marks or now_s - self._marks[-1][0] >= self.WINDOW_S:
            self._marks = [*self._marks[-1:], (now_s, total)]
        since_s, before = self._marks[0]
        return max(total - before, 0) / (now_s - since_s) if now_s > since_s else 0.0
