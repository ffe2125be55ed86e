"""The figures by which a classifier is judged, and their intervals: pure functions on scores."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}–{self.high:.3f}]"


def auroc(attacks: Floats, harmless: Floats) -> float:
    """The chance that an attack scores above a harmless text, ties half (Mann and Whitney 1947)."""
    order = np.sort(harmless)
    below = np.searchsorted(order, attacks, side="left")
    upto = np.searchsorted(order, attacks, side="right")
    return float((below + upto).mean() / 2 / len(harmless))


def tpr_at(fpr: float) -> Callable[[Floats, Floats], float]:
    """The share of attacks above the threshold that lets `fpr` of the harmless texts through as false alarms."""

    def figure(attacks: Floats, harmless: Floats) -> float:
        return float((attacks > np.quantile(harmless, 1 - fpr)).mean())

    return figure


def bootstrap(
    figure: Callable[[Floats, Floats], float], attacks: Floats, harmless: Floats, *, seed: int = 0, draws: int = 500
) -> Interval:
    """The figure with a percentile interval, both classes drawn anew with replacement (Efron 1979)."""
    chance = np.random.default_rng(seed)
    values = [
        figure(chance.choice(attacks, len(attacks)), chance.choice(harmless, len(harmless))) for _ in range(draws)
    ]
    low, high = np.quantile(values, (0.025, 0.975))
    return Interval(figure(attacks, harmless), float(low), float(high))
