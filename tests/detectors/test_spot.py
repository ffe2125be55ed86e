"""Peaks over threshold: its false alarms under the null, what it tells, how long it is silent, what it keeps."""

import math
import random

import msgspec
import pytest

from detectors.spot import REST, REST_SUDDEN, STATISTICS, WARM, Residual, Spot, Tail


def judged(spot: Spot, values: list[float], begin: int = 0) -> list[dict[str, float]]:
    """One window a minute under a steady load."""
    return [spot.judge(y, None, (begin + minute) // 60 % 168, 3.0) for minute, y in enumerate(values)]


def calm(seed: int, windows: int) -> list[float]:
    """A tenth of spread around what is expected."""
    rng = random.Random(seed)  # noqa: S311 seeded on purpose
    return [rng.gauss(0, 0.1) for _ in range(windows)]


def test_a_tail_says_of_its_own_past_about_what_is_true() -> None:
    """Of 40,000 exponential values one in a thousand is told as such: within 0.5 and 2 in a thousand."""
    rng = random.Random(1)  # noqa: S311 seeded on purpose
    tail, told = Tail(), 0
    for number in range(44_000):
        value = rng.expovariate(1.0)
        told += number >= 4_000 and tail.improbability(value) >= 3
        tail.learn(value)
    assert 20 <= told <= 80


@pytest.mark.parametrize("seed", range(5))
def test_calm_is_rarely_improbable(seed: int) -> None:
    """3,000 windows of noise: none beyond 10^-6, at most nine beyond 10^-4 (.3 a statistic are due)."""
    print("seed", seed)
    found = [max(told.values()) for told in judged(Spot(), calm(seed, 3_000)) if told]
    assert sum(value >= 4 for value in found) <= 9
    assert max(found) < 6


@pytest.mark.parametrize("seed", range(5))
def test_a_doubling_is_told_by_its_second_window_and_once(seed: int) -> None:
    """ln 2 more from then on: the level at once, the jump with the second window, then silence."""
    print("seed", seed)
    spot = Spot()
    judged(spot, calm(seed, 1_000))
    found = judged(spot, [y + math.log(2) for y in calm(seed + 100, 10)], 1_000)
    assert found[0]["level"] >= 5
    assert found[1]["jump"] >= 5
    assert found[1]["jump"] > found[0].get("jump", 0.0)


def test_an_episode_is_told_once_and_again_only_where_it_is_half_as_bad_again() -> None:
    """Sudden changes rest 20 windows, lasting ones 100, each family for itself."""
    spot = Spot(windows=1_000)
    assert spot.tells("level", 6.0, 5.0)
    assert not spot.tells("mean", 8.9, 5.0)
    assert spot.tells("jump", 6.0, 5.0)
    assert spot.tells("drift", 9.1, 5.0)
    assert not spot.tells("level", 4.9, 5.0)
    spot.windows += REST_SUDDEN
    assert spot.tells("tail", 6.0, 5.0)
    assert not spot.tells("level", 6.0, 5.0)
    spot.windows += REST
    assert spot.tells("level", 6.0, 5.0)


def test_nothing_is_said_while_warm() -> None:
    """Not even of a thousandfold."""
    values = [*calm(3, WARM - 1), 7.0]
    assert not any(judged(Spot(), values))


def test_the_hour_of_the_day_is_learned() -> None:
    """A swing of a factor of two between night and day leaves a residual of a tenth after a week."""
    residual = Residual()
    hours = [hour for hour in range(24 * 21) for _ in range(20)]
    left = [residual.of(0.35 * math.sin(2 * math.pi * hour / 24), hour % 168, 3.0) for hour in hours]
    assert max(abs(value) for value in left[-24 * 20 :]) < 0.1


def test_a_restored_key_goes_on_the_same_and_stays_small() -> None:
    """MessagePack and back after every hundred windows; at most 12 KB after 5,000."""
    plain, restored = Spot(), Spot()
    values = calm(4, 5_000)
    for begin in range(0, 5_000, 100):
        part = values[begin : begin + 100]
        assert judged(plain, part, begin) == judged(restored, part, begin)
        raw = msgspec.msgpack.encode(restored)
        restored = msgspec.msgpack.decode(raw, type=Spot)
    assert restored == plain
    assert len(raw) < 12_000
    assert set(plain.tails) <= set(STATISTICS)
