"""Calls sorted by prompt size and answer length, so that a heavier mix of calls does not look like a slower model.

Direct standardisation: what a window should have taken is its own number of calls in each stratum, each spread as the
baseline spreads that stratum. Strata that the baseline hardly knows are left out on both sides.
Source: J. L. Fleiss, "Statistical Methods for Rates and Proportions", 1973.
"""

import math
from collections.abc import Iterable
from typing import Final

from msgspec import Struct

from detectors.histogram import Histogram, bucket_of, halve, total
from detectors.rollup import Cell, Sample, add_all

STRATA_MAX: Final = 128
STRATUM_CALLS_MIN: Final = 10
Weights = dict[int, float]


class Stratum(Struct):
    """Histograms of one prompt size and answer length, by metric, in µs."""

    calls: int = 0
    metrics: dict[str, Histogram] = {}

    def absorb(self, other: "Stratum | Cell") -> None:
        self.calls += other.calls if isinstance(other, Stratum) else other.counts["calls"]
        for name, histogram in (other.metrics if isinstance(other, Stratum) else other.histograms).items():
            add_all(self.metrics.setdefault(name, {}), histogram)


class Step(Struct):
    """A fifth of a window."""

    index: int
    strata: dict[str, Stratum] = {}
    prompt_tokens: dict[str, int] = {}
    samples: list[Sample] = []
    offsets: dict[int, tuple[int, int]] = {}
    slow: bool = False
    learned: bool = False


def known(baseline: dict[str, Stratum], key: str) -> bool:
    """Whether the baseline can say what to expect of this stratum."""
    base = baseline.get(key)
    return base is not None and base.calls >= STRATUM_CALLS_MIN


def standardised(baseline: dict[str, Stratum], steps: Iterable[Step], metric: str) -> tuple[Weights, Weights]:
    """What was seen in known strata, and the same number of calls a stratum as the baseline has them."""
    seen: dict[str, Histogram] = {}
    for step in steps:
        for key, stratum in step.strata.items():
            if metric in stratum.metrics and known(baseline, key):
                add_all(seen.setdefault(key, {}), stratum.metrics[metric])
    observed: Weights = {}
    expected: Weights = {}
    for key, histogram in sorted(seen.items()):
        base = baseline[key].metrics.get(metric, {})
        if not base:
            continue
        factor = total(histogram) / total(base)
        for bucket, count in sorted(histogram.items()):
            observed[bucket] = observed.get(bucket, 0.0) + count
        for bucket, count in sorted(base.items()):
            expected[bucket] = expected.get(bucket, 0.0) + count * factor
    return observed, expected


def above(weights: Weights, value: float) -> float:
    """The weight in buckets that lie wholly above the bucket of `value`."""
    bucket = bucket_of(int(value))
    return math.fsum(weight for other, weight in weights.items() if other > bucket)


def forget(baseline: dict[str, Stratum]) -> dict[str, Stratum]:
    """Every count halved; strata that are then empty go."""
    return {
        key: Stratum(base.calls >> 1, {name: halve(histogram) for name, histogram in base.metrics.items()})
        for key, base in baseline.items()
        if base.calls > 1
    }
