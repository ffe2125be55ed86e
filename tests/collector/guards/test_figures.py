"""The figures are right on cases that can be counted by hand."""

import numpy as np
import pytest

from collector.guards.figures import Interval, auroc, bootstrap, tpr_at


def test_auroc_counts_pairs_and_ties_half() -> None:
    """Of six pairs four are in order and one is a tie."""
    assert auroc(np.array([1.0, 3.0, 5.0]), np.array([1.0, 2.0])) == pytest.approx((0.5 + 2 + 2) / 6)
    assert auroc(np.array([2.0]), np.array([1.0])) == 1.0
    assert auroc(np.array([1.0]), np.array([1.0])) == 0.5


def test_tpr_is_read_at_the_false_positive_rate() -> None:
    """At 1 % of a hundred harmless texts the threshold lies just under the highest."""
    harmless = np.arange(101, dtype=float)
    assert tpr_at(0.01)(np.array([98.5, 99.5, 200.0]), harmless) == pytest.approx(2 / 3)


def test_the_interval_holds_the_figure_and_repeats() -> None:
    """The same seed gives the same interval, around the figure."""
    chance = np.random.default_rng(1)
    attacks, harmless = chance.normal(1, 1, 200), chance.normal(0, 1, 300)
    first = bootstrap(auroc, attacks, harmless, seed=3, draws=100)
    assert first == bootstrap(auroc, attacks, harmless, seed=3, draws=100)
    assert first.low < first.value < first.high
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250–0.750]"
