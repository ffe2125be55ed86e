"""The figures by which a classifier is judged, and their intervals: pure functions on scores."""

import math
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


def wilson(hits: int, count: int) -> Interval:
    """A share with its 95 % interval that stays honest near 0 and 1 (Wilson 1927). Of nothing: 0 in [0, 1]."""
    if count == 0:
        return Interval(0.0, 0.0, 1.0)
    z = 1.959964
    share = hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def kappa(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float | None:
    """Agreement beyond chance (Cohen 1960): 1 the same, 0 as by chance. None where both said one thing throughout."""
    chance = first.mean() * second.mean() + (1 - first.mean()) * (1 - second.mean())
    return None if chance == 1 else float(((first == second).mean() - chance) / (1 - chance))


def platt(attacks: Floats, harmless: Floats) -> tuple[float, float]:
    """(slope, offset): 1 / (1 + exp(-(slope · score + offset))) is the chance of an attack among as many of both.

    Platt 1999, with his softened targets and each class at the same weight; Newton's method as Lin, Lin and Weng 2007.
    """
    scores = np.concatenate((attacks, harmless))
    share = np.concatenate((np.full(len(attacks), 0.5 / len(attacks)), np.full(len(harmless), 0.5 / len(harmless))))
    wanted = np.concatenate(
        (
            np.full(len(attacks), (len(attacks) + 1) / (len(attacks) + 2)),
            np.full(len(harmless), 1 / (len(harmless) + 2)),
        )
    )
    design = np.stack((scores, np.ones_like(scores)), axis=1)
    found = np.zeros(2)

    def loss(at: Floats) -> float:
        margins = design @ at
        return float((share * (np.logaddexp(0, margins) - wanted * margins)).sum())

    for _ in range(100):
        chance = 1 / (1 + np.exp(-np.clip(design @ found, -500, 500)))
        gradient = design.T @ (share * (chance - wanted))
        curve = design.T @ (design * (share * chance * (1 - chance))[:, None]) + 1e-9 * np.eye(2)
        move = np.linalg.solve(curve, gradient)
        size = 1.0
        while loss(found - size * move) > loss(found) and size > 1e-6:
            size /= 2
        found = found - size * move
        if np.abs(gradient).max() < 1e-9:
            break
    return float(found[0]), float(found[1])
