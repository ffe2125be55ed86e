"""The log-bucket histogram: layout, merging, quantiles, and the tail bound against simulation."""

import math
import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from detectors.histogram import (
    VALUE_MAX,
    at_least,
    bucket_of,
    buckets_of,
    halve,
    lower_edge,
    quantile,
    share_above,
    total,
    upper_tail,
)
from detectors.rollup import add_all

VALUES = st.integers(0, VALUE_MAX)


def histogram_of(values: list[int]) -> dict[int, int]:
    histogram: dict[int, int] = {}
    for value in values:
        histogram[bucket_of(value)] = histogram.get(bucket_of(value), 0) + 1
    return histogram


@given(VALUES)
def test_a_value_lies_in_its_bucket_which_is_an_eighth_wide_at_most(value: int) -> None:
    """lower_edge(b) <= value < lower_edge(b + 1), and the width is at most 12.5 % of the value."""
    low, high = lower_edge(bucket_of(value)), lower_edge(bucket_of(value) + 1)
    assert low <= value < high
    assert high - low <= max(1, value / 8)


def test_values_out_of_range_are_kept_at_the_ends() -> None:
    """Negative as 0, too large in the last bucket."""
    assert (bucket_of(-5), bucket_of(2**60)) == (0, bucket_of(VALUE_MAX))


@given(st.lists(VALUES), st.lists(VALUES))
def test_merging_is_adding(left: list[int], right: list[int]) -> None:
    """merge(h(a), h(b)) = h(a + b), in either order."""
    merged, reverse = histogram_of(left), histogram_of(right)
    add_all(merged, histogram_of(right))
    add_all(reverse, histogram_of(left))
    assert merged == reverse == histogram_of(left + right)


@given(st.lists(VALUES, min_size=1, max_size=200), st.floats(0.01, 0.99))
def test_a_quantile_is_off_by_an_eighth_at_most(values: list[int], share: float) -> None:
    """Against the exact order statistic."""
    exact = sorted(values)[max(math.ceil(share * len(values) - 1e-9) - 1, 0)]
    weights = {bucket: float(count) for bucket, count in histogram_of(values).items()}
    assert abs(quantile(weights, share) - exact) <= max(1.0, exact / 7)


def test_forgetting_halves_and_drops_what_is_gone() -> None:
    """Integers only."""
    assert halve({1: 9, 2: 1, 3: 2}) == {1: 4, 3: 1}


@given(st.lists(VALUES, max_size=50), VALUES)
def test_counts_above_a_bucket(values: list[int], value: int) -> None:
    """at_least counts whole buckets."""
    wanted = sum(bucket_of(other) >= bucket_of(value) for other in values)
    assert at_least(histogram_of(values), bucket_of(value)) == wanted <= total(histogram_of(values))


def test_the_tail_bound_holds_in_simulation() -> None:
    """False alarms under the null are at most as frequent as the bound says, at every level."""
    seed = 7
    print("seed", seed)
    rng = random.Random(seed)  # noqa: S311 seeded on purpose
    trials, share, rounds = 40, 0.1, 20_000
    bounds = [upper_tail(sum(rng.random() < share for _ in range(trials)), trials, share) for _ in range(rounds)]
    for level in (0.1, 0.01, 0.001):
        seen = sum(bound <= math.log(level) for bound in bounds) / rounds
        assert seen <= level + 3 * math.sqrt(level / rounds)


def test_nothing_above_expectation_is_no_evidence() -> None:
    """0 nats."""
    assert upper_tail(4, 40, 0.1) == upper_tail(0, 0, 0.1) == upper_tail(0, 40, 0.1) == 0.0


def test_many_values_at_once_are_in_the_buckets_of_each() -> None:
    """At every edge, around it, and beyond both ends."""
    values = [-5, 0, *(2**n + step for n in range(45) for step in (-1, 0, 1)), *(lower_edge(b) for b in range(352))]
    assert buckets_of(np.array(values, np.int64)).tolist() == [bucket_of(value) for value in values]


@given(st.lists(st.integers(16, 10**6), min_size=1, max_size=200), st.integers(16, 10**6))
def test_the_share_above_a_value_is_right_to_its_bucket(values: list[int], value: int) -> None:
    """Between the share of values in higher buckets and that of values in its own or a higher one."""
    found = share_above(dict(histogram_of(values).items()), value)
    buckets = [bucket_of(each) for each in values]
    above = sum(each > bucket_of(value) for each in buckets) / len(values)
    within = sum(each >= bucket_of(value) for each in buckets) / len(values)
    assert above - 1e-9 <= found <= within + 1e-9
