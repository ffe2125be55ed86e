"""Stretches of time and their buckets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards.config import RANGES_S
from dashboards.window import BadWindow, Window, asked, between, last

NOW_MS = 1_790_002_817_345


@pytest.mark.parametrize("name", RANGES_S)
def test_a_relative_range_ends_with_its_last_whole_bucket(name: str) -> None:
    """The newest bucket drawn is complete, and there are at most 120 of them."""
    window = last(name, NOW_MS)
    step_ms = window.bucket_s * 1000
    assert window.to_ms <= NOW_MS < window.to_ms + step_ms
    assert window.to_ms - window.from_ms == RANGES_S[name] * 1000
    assert window.from_ms % step_ms == 0
    assert 40 <= window.buckets <= 120


@given(st.integers(0, 2**41), st.integers(1, 400 * 86_400_000))
def test_fixed_ends_are_widened_to_whole_buckets(start: int, length: int) -> None:
    """What was asked for lies inside; every moment inside has a bucket, counted from 0."""
    window = between(start, start + length)
    assert window.from_ms <= start < start + length <= window.to_ms
    assert window.buckets <= 122
    assert window.bucket(window.from_ms) == 0
    assert window.bucket(window.to_ms - 1) == window.buckets - 1
    assert 0 <= window.share(start) <= 1
    assert all(0 <= share <= 1 for share, _ in window.ticks())


def test_times_in_an_address_are_iso_8601_and_utc_by_default() -> None:
    """With a zone, without one, with `to` left out."""
    window = asked({"from": "2026-09-21T14:00:00Z", "to": "2026-09-21T16:00:00+01:00"}, "1h", NOW_MS)
    assert (window.from_ms, window.to_ms) == (1_789_999_200_000, 1_790_002_800_000)
    assert asked({"from": "2026-09-21T14:00", "to": "2026-09-21 15:00"}, "1h", NOW_MS) == window
    assert asked({"from": "2026-09-21T14:00"}, "1h", NOW_MS).to_ms >= NOW_MS
    assert window.address() == {"from": "2026-09-21T14:00:00Z", "to": "2026-09-21T15:00:00Z"}
    assert asked({}, "1h", NOW_MS).address() == {"range": "1h"}


@pytest.mark.parametrize(
    "query",
    [
        {"range": "1y"},
        {"range": "1h' OR 1=1"},
        {"from": "yesterday"},
        {"from": "9" * 4_000},
        {"from": "2026-09-21T15:00Z", "to": "2026-09-21T14:00Z"},
        {"from": "0001-01-01T00:00Z", "to": "2026-09-21T14:00Z"},
        {"to": "2026-09-21T14:00Z"},
        {"from": "2020-01-01T00:00Z", "to": "2026-09-21T14:00Z"},
    ],
)
def test_a_time_that_cant_be_shown_is_refused_in_one_sentence(query: dict[str, str]) -> None:
    """The sentence says what to write; it does not repeat what was written."""
    with pytest.raises(BadWindow) as refused:
        asked(query, "1h", NOW_MS)
    assert len(str(refused.value)) < 120
    assert str(refused.value).endswith(".")


def test_hours_of_the_axis_are_round() -> None:
    """Six hours have a label each hour, a week one a day or two."""
    hours = Window(1_789_981_200_000, 1_790_002_800_000, 180).ticks()
    assert [label for _, label in hours] == ["09:00", "10:00", "11:00", "12:00", "13:00", "14:00"]
    assert [label for _, label in last("7d", NOW_MS).ticks()] == ["16 Sep", "18 Sep", "20 Sep"]
