"""The figures are right on cases that can be counted by hand."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from collector.guards.figures import Interval, auroc, bootstrap, kappa, platt, tpr_at, wilson


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


def test_a_share_has_wilsons_interval() -> None:
    """The published example of 10 in 100, nothing of ten, and nothing of nothing."""
    assert wilson(10, 100) == pytest.approx((0.1, 0.05523, 0.17437), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.0, 0.27753), abs=1e-5)
    assert wilson(0, 0) == Interval(0.0, 0.0, 1.0)


def test_agreement_is_told_from_chance() -> None:
    """Cohen's own table of 100 cases: kappa 0.4. The same verdicts: 1. One verdict throughout: nothing to say."""
    first = np.array([True] * 20 + [True] * 5 + [False] * 10 + [False] * 15)
    second = np.array([True] * 20 + [False] * 5 + [True] * 10 + [False] * 15)
    assert kappa(first, second) == pytest.approx(0.4)
    assert kappa(first, first) == pytest.approx(1.0)
    assert kappa(np.zeros(9, dtype=bool), np.zeros(9, dtype=bool)) is None


def test_scores_are_calibrated_as_scikit_learn_does_it() -> None:
    """Without softened targets, which fade as rows grow, Platt's fit is logistic regression without penalty."""
    chance = np.random.default_rng(2)
    attacks, harmless = chance.normal(1, 1, 4000), chance.normal(-1, 1, 8000)
    slope, offset = platt(attacks, harmless)
    rows = np.concatenate((attacks, harmless))[:, None]
    model = LogisticRegression(C=1e9, class_weight="balanced").fit(rows, np.arange(12_000) < 4000)
    assert (slope, offset) == pytest.approx((model.coef_[0, 0], model.intercept_[0]), abs=0.02)
    assert all(np.isfinite(platt(np.array([1.0]), np.array([0.0]))))
    assert all(np.isfinite(platt(np.ones(50), np.ones(50))))
