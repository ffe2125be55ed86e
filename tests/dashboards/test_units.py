"""Numbers as people read them."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards.units import ago, axis, clock, duration, exact, short, ticks


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (None, "ms", "–"), (math.nan, "count", "–"), (math.inf, "ms", "–"), (0, "ratio", "0 %"),
        (0.0308, "ratio", "3.08 %"),
        (1, "ratio", "100 %"), (340, "ms", "340 ms"), (1_840, "ms", "1.84 s"), (150_000, "ms", "2.5 min"),
        (0.2, "ms", "0.2 ms"), (9_999, "count", "9,999"), (12_431, "count", "12.4k"), (1.834e6, "tokens", "1.83M"),
        (4.2e13, "count", "42T"), (24, "per_minute", "24/min"), (0.0667, "per_minute", "0.07/min"), (-5, "count", "-5"),
    ],
)  # fmt: skip
def test_short(value: float | None, unit: str, expected: str) -> None:
    """Three digits and a unit; a dash where there is no number."""
    assert short(value, unit) == expected


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (None, "ms", "–"), (0.030812, "ratio", "3.08 %"), (1_840.25, "ms", "1,840.2 ms"), (12_431, "count", "12,431"),
        (1.5, "count", "1.50"), (24.0, "per_minute", "24/min"), (1_234.567, "tokens", "1,235"),
    ],
)  # fmt: skip
def test_exact(value: float | None, unit: str, expected: str) -> None:
    """All digits that mean something, thousands apart."""
    assert exact(value, unit) == expected


def test_durations_take_the_unit_that_reads_best() -> None:
    """A whole hour is `1 h`, ninety seconds stay seconds."""
    seconds = (0, 0.0005, 0.34, 1, 60, 90, 150, 3_600, 7_200, 86_400, 200_000)
    words = ["0 s", "0.5 ms", "340 ms", "1 s", "1 min", "90 s", "2.5 min", "1 h", "2 h", "1 d", "2.31 d"]
    assert [duration(value) for value in seconds] == words


def test_moments_are_told_as_distance_and_as_clock() -> None:
    """The past is `ago`, a clock that runs ahead is told as such; the clock is in UTC with the date."""
    now_ms = 1_790_002_800_000
    assert [ago(now_ms - 1000 * s, now_ms) for s in (0, 12, 119, 300, 7_200, 200_000, -30)] == [
        "just now", "12 s ago", "119 s ago", "5 min ago", "2 h ago", "2 d ago", "in 30 s",
    ]  # fmt: skip
    assert clock(now_ms) == "2026-09-21 15:00:00"
    assert clock(now_ms, now_ms=now_ms, seconds=False) == "15:00"


@given(st.floats(min_value=1e-9, max_value=1e15))
def test_ticks_cover_the_top_in_a_few_round_steps(top: float) -> None:
    """From 0 to at least the top, never more than seven values, evenly apart."""
    steps = ticks(top)
    assert steps[0] == 0
    assert steps[-1] >= top * (1 - 1e-6)
    assert steps[-2] < top
    assert 3 <= len(steps) <= 7
    assert all(math.isclose(b - a, steps[1], rel_tol=1e-6) for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize("top", [0.0, -1.0, math.nan, math.inf])
def test_ticks_of_nothing_are_an_axis_all_the_same(top: float) -> None:
    """A plot without values has an axis from 0 to 1."""
    assert ticks(top) == [0.0, 1.0]


def test_labels_of_an_axis_share_one_scale() -> None:
    """Not `5,000` under `10k`; a rate says its unit once."""
    assert axis(17_000, "per_minute") == [
        (0, "0"),
        (5_000, "5k"),
        (10_000, "10k"),
        (15_000, "15k"),
        (20_000, "20k/min"),
    ]
    assert axis(0.38, "ratio")[-1] == (0.4, "40 %")


def test_times_on_an_axis_are_round_in_one_unit() -> None:
    """Up to five minutes seconds, below one second milliseconds; never `1 min` between `40 s` and `80 s`."""
    assert [label for _, label in axis(75_000, "ms")] == ["0 s", "20 s", "40 s", "60 s", "80 s"]
    assert [label for _, label in axis(900_000, "ms")] == ["0 min", "5 min", "10 min", "15 min"]
    assert axis(0.18, "s") == [
        (0.0, "0 ms"),
        (0.05, "50 ms"),
        (0.1, "100 ms"),
        (pytest.approx(0.15), "150 ms"),
        (0.2, "200 ms"),
    ]
