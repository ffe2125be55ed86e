"""Few users or many: what stage 1 tells of how much a user asks, and what stage 2 makes of it."""

import random
from collections import Counter

import msgspec
import pytest

from collector.event import AuditEvent
from detectors.block_rate_asked import LATER, TIMES, Asked, Asking
from detectors.block_rate_charts import Chart
from detectors.block_rate_told import Announced, Blocks, Spike, alarm_of, asked_since, by_few, change_of, heard_later
from detectors.chunk import Chunk
from detectors.registry import Registry
from tests.detectors.test_contract import seconds
from tests.sim.traffic import Traffic


def test_what_a_user_asked_is_counted_alike_however_the_events_are_cut() -> None:
    """Against a count by hand: running numbers, the last eight seconds, three requests after a block."""
    traffic = Traffic(61, rate=20.0)
    traffic.calm(0, 40)
    traffic.block_burst(10, 25, prompts=60, users=12)
    traffic.events.sort(key=lambda event: (event.timestamp, event.event_id))
    wanted = by_hand(traffic.events)
    assert len(wanted) > 60
    for step in (1, 7, 100):
        registry = Registry(1_000)
        asking = Asking(registry, "x")
        found: dict[str, Asked | int] = {}
        for _, columns in seconds(traffic.events, step=step):
            chunk = Chunk(columns, 0, registry)
            asked, later = asking.see(chunk, columns.verdict_event, columns.verdict_blocked)
            found |= {chunk.event(event).event_id: told for event, told in [*asked.items(), *later.items()]}
        assert found == wanted


def by_hand(events: list[AuditEvent]) -> dict[str, Asked | int]:
    """Event id to what is told with it."""
    totals: Counter[str] = Counter()
    marks: dict[str, int] = {}
    times: dict[str, list[int]] = {}
    told: dict[str, Asked | int] = {}
    for event in events:
        user = event.user_id
        totals[user] += 1
        times.setdefault(user, []).append(int(event.timestamp.timestamp()))
        if event.blocked:
            marks[user] = totals[user]
            told[event.event_id] = Asked(totals[user], times[user][-TIMES:])
        elif user in marks and totals[user] - marks[user] in LATER:
            told[event.event_id] = totals[user]
    return told


def spike(history: list[tuple[str, bool]], usual: float = 0.02) -> tuple[Spike, list[Blocks]]:
    """A chart that began with the first of these requests, one a second, each by a user and blocked or not."""
    totals: Counter[str] = Counter()
    times: dict[str, list[int]] = {}
    recent: list[Blocks] = []
    marks: dict[str, int] = {}
    for second, (user, blocked) in enumerate(history, 1_000):
        totals[user] += 1
        times[user] = [*times.get(user, []), second][-TIMES:]
        if blocked:
            marks[user] = totals[user]
            one, asked, seen = {user: 1}, {user: totals[user]}, {user: times[user]}
            recent.append(Blocks(second, 1, 1, one, one, asked, seen, {}, [(second, str(second))], {}))
        elif user in marks and totals[user] - marks[user] in LATER:
            heard_later(recent, {user: totals[user]})
    chart = Chart("distinct", 3.0, sum=9.0, start_s=1_000, requests=len(history))
    return Spike("acme", "m\ng", chart, 1_000 + len(history), usual, usual, cold=False), recent


@pytest.mark.parametrize("seed", range(5))
def test_three_who_are_blocked_at_most_requests_are_few_and_a_small_crowd_is_not(seed: int) -> None:
    """Forty users, four of whom ask half of all; the same number of blocks."""
    rng = random.Random(seed)  # noqa: S311 seeded on purpose
    users = [f"u_{number}" for number in range(40)]
    weights = [10 if number < 4 else 1 for number in range(40)]
    calm = [(user, False) for user in rng.choices(users, weights, k=120)]
    crowd = list(calm)
    for place in rng.sample(range(120), 12):
        crowd[place] = (crowd[place][0], True)
    attack = list(calm)
    for number, place in enumerate(sorted(rng.sample(range(120), 18))):
        attack[place] = (f"u_attacker{number % 3}", number % 3 != number // 6)
    assert not by_few(*spike(crowd))
    assert by_few(*spike(attack))


@pytest.mark.parametrize(("days", "cold", "said"), [(0, True, 2), (5, False, 1), (7, False, 0)])
def test_a_spike_of_the_first_week_says_what_it_can_not_know(days: int, cold: bool, said: int) -> None:
    """Before 1,000 requests that the rate is assumed, for a week that the threshold is: confidence is medium."""
    told, recent = spike([("u_a", True), ("u_b", True)] * 6)
    chart = msgspec.structs.replace(told.chart, maxima=[1.0] * (4 * days), threshold=8.0)
    alarm = alarm_of(msgspec.structs.replace(told, chart=chart, cold=cold), recent, [], 3_600)
    assert (alarm.cold_start.count(":"), alarm.confidence) == (said, "medium" if said else "high")


@pytest.mark.parametrize("subject", ["guard", "model", "adapter", "template"])
def test_the_last_change_within_an_hour_before_a_spike_is_named_and_no_other(subject: str) -> None:
    """Whatever changed: from an hour before the first block to the alarm."""
    old, new = Announced(1_000, "guard", "a", "b"), Announced(2_000, subject, "one", "two")
    named = f", after a change of {subject} from one to two: suspect the rollout"
    assert change_of([old, new], 5_000, 5_060, 3_600) == named
    assert change_of([new], 5_601, 5_660, 3_600) == ""
    assert change_of([new], 1_900, 1_999, 3_600) == ""
    assert change_of([msgspec.structs.replace(new, before="")], 2_000, 2_000, 3_600) == (
        f", after a change of {subject}: suspect the rollout"
    )


def test_users_whose_requests_are_not_known_are_no_few() -> None:
    """Nobody's requests: of blocks without a name, or by users that stage 1 had no room for, nothing is concluded."""
    told, recent = spike([("u_a", True), ("u_b", True)] * 6 + [("u_c", False)] * 100)
    assert by_few(told, recent)
    unknown = [msgspec.structs.replace(seen, asked={}, times={}) for seen in recent]
    assert asked_since(unknown, 0) == {}
    assert not by_few(told, unknown)
