"""The registry of users: rows are stable and their own, evictions are fair, counted, and the same after a restart."""

import random

import msgspec
import numpy as np
import pytest

from detectors.columns import columns_of
from detectors.registry import NOBODY, Registry
from tests.sim.traffic import Traffic


def told(registry: Registry, names: list[int], at_s: int = 1) -> list[int]:
    """The rows of made-up users, all seen in one second."""
    high, low = np.array(names, np.uint64), np.array(names, np.uint64) ^ np.uint64(12345)
    moment_us = np.full(len(names), at_s * 1_000_000, np.int64)
    return list(registry.rows(high, low, moment_us, np.ones(len(names), bool)).tolist())


@pytest.mark.parametrize("seed", range(3))
def test_a_user_keeps_his_row_however_many_come(seed: int) -> None:
    """Against a dict, over growth, with strangers and acquaintances mixed and repeated."""
    print("seed", seed)
    rng = random.Random(seed)  # noqa: S311 seeded on purpose
    registry, known = Registry(50_000), dict[int, int]()
    for second in range(60):
        names = [rng.randrange(20_000) for _ in range(rng.randrange(1, 1_000))]
        for name, row in zip(names, told(registry, names, second + 1), strict=True):
            assert known.setdefault(name, row) == row
    assert registry.live == len(known) == len(set(known.values()))


def test_nobody_has_no_row() -> None:
    """Events without an actor are all nobody's."""
    registry = Registry(100)
    keys, named = np.zeros(3, np.uint64), np.array([False, True, False])
    rows = registry.rows(keys, keys, np.ones(3, np.int64), named)
    assert (rows.tolist(), registry.live) == ([NOBODY, 0, NOBODY], 1)


def test_the_longest_unseen_go_first_and_suspects_last() -> None:
    """A flood of strangers pushes out strangers; the suspect goes only when nobody else is left, and it is counted."""
    registry = Registry(100)
    marks = registry.column("mark", np.int64)
    (suspect,) = told(registry, [7], 1)
    marks.values[suspect] = 77
    registry.suspect(suspect, until_s=1_000)
    for second in range(2, 40):
        told(registry, list(range(1_000 * second, 1_000 * second + 40)), second)
    (row,) = told(registry, [7], 40)
    assert marks.values[row] == 77
    assert registry.live <= 100
    assert registry.counters["evicted"] > 1_000
    assert registry.counters["evicted_with_evidence"] == 0
    told(registry, list(range(10**6, 10**6 + 100)), 50)
    assert registry.counters["evicted_with_evidence"] == 1
    assert marks.values[told(registry, [7], 2_000)[0]] == 0


def test_a_second_with_more_strangers_than_room_admits_the_first_and_counts_the_rest() -> None:
    """Nothing grows beyond its limit; the order of events decides."""
    registry = Registry(100)
    rows = told(registry, list(range(1, 251)))
    assert rows == [*range(100), *([NOBODY] * 150)]
    assert registry.counters["refused"] == 150


def test_a_loaded_registry_goes_on_as_the_old_one_would() -> None:
    """Rows, columns, order of eviction; a column that is new starts at zero."""
    one, other = Registry(100), Registry(100)
    for registry in (one, other):
        registry.column("n", np.int32, 2)
    fresh = other.column("fresh", np.int64)
    told(one, list(range(1, 90)))
    one.suspect(3, until_s=10**6)
    other.load(one.dump())
    for second in range(2, 30):
        names = list(range(second * 50, second * 50 + 60))
        assert told(one, names, second) == told(other, names, second)
    assert one.counters == other.counters
    assert not fresh.values[: other.live].any()


def test_keys_tell_tenants_and_kinds_of_actors_apart() -> None:
    """The same digits under another tenant or prefix are somebody else; a repeated actor is the same one, even where
    an odd name among the events sends all of them the slow way."""
    traffic = Traffic(1)
    traffic.calm(0, 3)
    event = traffic.events[0]

    def keys(*fields: dict[str, str]) -> list[tuple[int, int]]:
        events = [msgspec.structs.replace(event, **each) for each in fields]  # type: ignore[arg-type]
        numbers = np.zeros(len(events), np.int64)
        columns = columns_of(events, [b""] * len(events), numbers, numbers)
        return list(zip(columns.high.tolist(), columns.low.tolist(), strict=True))

    digits = "0123456789abcdef0123456789abcdef"
    user, tenant, key, odd, upper = (
        {"user_id": f"u_{digits}"},
        {"user_id": f"u_{digits}", "tenant": "other"},
        {"user_id": "", "api_key": f"k_{digits}"},
        {"user_id": "somebody"},
        {"user_id": f"u_{digits.upper()}"},
    )
    quick = keys(user, tenant, key, user)
    assert len(set(quick[:3])) == 3
    assert quick[3] == quick[0]
    slow = keys(user, tenant, key, odd, upper)
    assert slow[:3] == quick[:3]
    assert len(set(slow)) == 5
