"""Limits: never more than said in any minute, whole again soon after, bounded whatever keys come."""

import random
from collections import deque

import pytest

from collector.identity_config import LimitsConfig
from collector.limits import Limit, LimitReached, Limits


def test_no_minute_has_more_than_the_limit_and_none_is_kept_from_it_for_long() -> None:
    """Requests at random moments: an exact log of a minute never holds more; after 65 quiet seconds all are free."""
    seed = random.randrange(10**6)  # noqa: S311  # no secret
    print("seed", seed)
    rng = random.Random(seed)  # noqa: S311  # no secret
    limits, now_s, log = Limits(LimitsConfig(requests_per_minute=30)), rng.uniform(0, 1e6), deque[float]()
    refused = 0
    for _ in range(5_000):
        now_s += rng.choice([0.0, 0.01, 0.5, 2.5, 8.0])
        while log and log[0] <= now_s - 60:
            log.popleft()
        after_s = _refused_for_s(limits, now_s)
        if after_s:
            refused += 1
            assert 1 <= after_s <= 65
            assert len([moment for moment in log if moment > now_s + after_s - 60]) < 30
        else:
            log.append(now_s)
            assert len(log) <= 30
    assert refused > 100
    for _ in range(30):
        limits.admit("k", None, now_s + 65)


def _refused_for_s(limits: Limits, now_s: float) -> int:
    """0 where the request was let in."""
    try:
        limits.admit("k", None, now_s).release()
    except LimitReached as reached:
        return reached.retry_after_s
    return 0


def test_tokens_count_when_an_answer_ends() -> None:
    """What is in flight may go over; then nothing comes in until the minute is past."""
    limits = Limits(LimitsConfig(tokens_per_minute=100))
    first, second = limits.admit("k", None, 0), limits.admit("k", None, 0)
    first.spend(90, 1)
    limits.admit("k", None, 2)
    second.spend(90, 3)
    second.release()
    with pytest.raises(LimitReached, match="100 tokens a minute") as caught:
        limits.admit("k", None, 4)
    assert (caught.value.reason, caught.value.retry_after_s) == ("token_limit", 61)
    limits.admit("k", None, 65)


def test_one_key_s_limit_is_not_another_s() -> None:
    """Own limits go before the default, a field at a time; None of them: no meter at all."""
    limits = Limits(LimitsConfig(requests_per_minute=1, concurrent=5))
    for _ in range(5):
        limits.admit("a", Limit(requests_per_minute=0), 0)
    with pytest.raises(LimitReached, match="at a time"):
        limits.admit("a", Limit(requests_per_minute=0), 0)
    limits.admit("b", None, 0)
    with pytest.raises(LimitReached, match="requests a minute"):
        limits.admit("b", None, 0)
    free = Limits(LimitsConfig())
    lease = free.admit("a", Limit(body_bytes_max=7), 0)
    lease.spend(1, 0)
    lease.release()
    assert (lease.body_bytes_max, len(free)) == (7, 0)


def test_a_place_is_given_back_once() -> None:
    """Releasing twice must not make room for two; spending after it still counts."""
    limits = Limits(LimitsConfig(concurrent=1, tokens_per_minute=10))
    lease = limits.admit("k", None, 0)
    lease.release()
    lease.release()
    limits.admit("k", None, 0)
    with pytest.raises(LimitReached):
        limits.admit("k", None, 0)
    lease.spend(10, 0)
    with pytest.raises(LimitReached, match="at a time"):
        limits.admit("k", None, 0)


def test_a_flood_of_keys_takes_bounded_room_and_harms_no_key_in_use() -> None:
    """Idle ones go, also behind a stream that has run for hours; where all are in use a new one is refused."""
    limits = Limits(LimitsConfig(requests_per_minute=1, concurrent=1, keys_max=100))
    stream = limits.admit("stream", None, 0)
    for n in range(10_000):
        limits.admit(f"k{n}", None, n).release()
        assert len(limits) <= 100
    with pytest.raises(LimitReached, match="at a time"):
        limits.admit("stream", None, 10_000)
    stream.release()
    held = Limits(LimitsConfig(concurrent=1, keys_max=10))
    leases = [held.admit(f"k{n}", None, 0) for n in range(10)]
    for _ in range(50):
        with pytest.raises(LimitReached) as caught:
            held.admit("late", None, 1_000)
    assert (caught.value.reason, caught.value.retry_after_s) == ("limits_full", 60)
    leases[7].release()
    for _ in range(5):
        try:
            held.admit("late", None, 1_000)
        except LimitReached:
            continue
        break
    else:
        pytest.fail("a key that is idle again makes no room")
