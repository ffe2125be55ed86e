"""High volume by session, user, API key and address; ordinary jobs; and what the budget promises."""

import math
from collections import Counter

import msgspec
import numpy as np
import pytest

from detectors.config import DetectConfig
from detectors.exceedances import WEEK_S, Exceedances
from detectors.finding import Finding
from detectors.volume_book import ADOPT_S
from tests.sim.layout import Layout, lay_out
from tests.sim.pipe import run
from tests.sim.traffic import Traffic

DAY_S = 86_400
OTHERS = ("block_rate", "campaign", "latency", "probing", "token_length")
ONLY = DetectConfig.model_validate({name: {"enabled": False} for name in OTHERS})


def told(traffic: Traffic, heartbeat_ms: int = 1_000) -> list[Finding]:
    return run(lay_out(traffic.events, Layout(partitions=4, heartbeat_ms=heartbeat_ms)), ONLY).findings


def as_keys(traffic: Traffic, begin: int, users: int) -> None:
    """The flood's requests from event `begin` on come with one API key, spread over so many users."""
    for number, event in enumerate(traffic.events[begin:], begin):
        if event.session_id.startswith("s_9"):
            traffic.events[number] = msgspec.structs.replace(
                event, api_key="k_" + "7" * 32, user_id=f"u_{number % users:032x}"
            )


@pytest.mark.parametrize(("sessions", "kind"), [(1, "session"), (8, "user")])
def test_one_session_is_told_itself_and_many_as_their_user(sessions: int, kind: str) -> None:
    """The entity is what has most of the flood, and one flood is one finding."""
    traffic = Traffic(31)
    traffic.calm(0, 60)
    traffic.flood(60, sessions=sessions)
    traffic.calm(72, 20)
    found = told(traffic)
    assert {each.entity.kind for each in found} == {kind}
    assert len({each.uid for each in found}) == 1
    assert found[-1].counts["requests"] > 600


def test_a_flood_by_another_session_is_not_told_of_the_session_before() -> None:
    """One session's flood; in the next window ten times as much by another of the same user: that is the user's."""
    traffic = Traffic(30, rate=1.0)
    traffic.calm(0, 1_300)
    traffic.flood(610, 100, requests=900)
    begin = len(traffic.events)
    traffic.flood(1_210, 200, requests=4_000)
    for number, event in enumerate(traffic.events[begin:], begin):
        traffic.events[number] = msgspec.structs.replace(event, session_id="s_950")
    traffic.calm(1_300, 300)
    opened = [each for each in told(traffic) if each.state == "open"]
    assert [each.entity.kind for each in opened] == ["session", "user"]
    assert "/" not in opened[1].entity.id


@pytest.mark.parametrize(
    ("users", "decoy", "kinds"), [(60, False, {"api_key"}), (60, True, {"api_key", "session"}), (1, False, {"session"})]
)
def test_a_key_that_many_users_share_is_told_and_one_users_key_is_not(users: int, decoy: bool, kinds: set[str]) -> None:
    """Sixty users of fifteen requests each, in four partitions: only their key shows it, and a user with another key
    who floods as much at the same time explains nothing of it."""
    traffic = Traffic(32)
    traffic.calm(0, 60)
    begin = len(traffic.events)
    traffic.flood(60)
    as_keys(traffic, begin, users)
    keys = [f"k_{number:032x}" for number in range(30)]
    for number, event in enumerate(traffic.events):
        if not event.api_key:
            traffic.events[number] = msgspec.structs.replace(event, api_key=keys[number % 30])
    begin = len(traffic.events)
    traffic.flood(60, user=701, requests=900 * decoy)
    traffic.events[begin:] = [msgspec.structs.replace(event, api_key=keys[3]) for event in traffic.events[begin:]]
    traffic.calm(72, 20)
    assert {each.entity.kind for each in told(traffic)} == kinds


def test_a_job_that_runs_every_day_is_told_on_its_first_day_at_most() -> None:
    """Six hundred requests at the same hour on five days: from the second day on they are its past."""
    traffic = Traffic(33, rate=0.02)
    traffic.calm(0, 5 * DAY_S)
    for day in range(5):
        traffic.flood(day * DAY_S + 50_000, span_s=500, requests=600)
    days = Counter(int(each.first_seen_us / 1e6 - 1_800_000_000) // DAY_S for each in told(traffic, 20_000))
    assert set(days) == {0}


def test_a_client_that_is_busy_all_day_is_not_told_for_being_so() -> None:
    """The busiest of thirty users, with ten times the requests of the others, from the second day on."""
    traffic = Traffic(34, rate=0.05)
    traffic.calm(0, 2 * DAY_S)
    busy = Traffic(35, rate=0.5, users=1)
    busy.calm(0, 2 * DAY_S)
    traffic.events += [msgspec.structs.replace(event, user_id="u_" + "5" * 32) for event in busy.events]
    assert [each for each in told(traffic, 20_000) if each.first_seen_us / 1e6 > 1_800_000_000 + DAY_S] == []


@pytest.mark.parametrize(("a_week", "mean_milli"), [(4, 300), (20, 900)])
def test_honest_peaks_pass_the_threshold_as_often_as_the_budget_says(a_week: int, mean_milli: int) -> None:
    """Exponential peaks, two hundred tenants, weeks five to twelve: half an alarm a week and tenant, within a band of
    three standard deviations and a quarter for what the assumptions still weigh."""
    seed, budget, tenants, weeks = 3, 0.5, 200, 12
    print("seed", seed)
    rng = np.random.default_rng(seed)
    alarms = 0
    for _ in range(tenants):
        peaks = Exceedances(0, 500, 10)
        times = np.sort(rng.integers(0, weeks * WEEK_S, rng.poisson(a_week * weeks)))
        for number, (second, excess) in enumerate(
            zip(times.tolist(), rng.exponential(mean_milli, len(times)).tolist(), strict=True)
        ):
            peaks.settle(second, ADOPT_S, budget)
            alarms += second > 4 * WEEK_S and round(excess) >= peaks.excess_bar_milli(second, budget)
            peaks.peak(f"u{number}", second, round(excess))
    wanted = budget * tenants * (weeks - 4)
    print("alarms", alarms, "wanted", wanted)
    assert 0.6 * wanted < alarms < 1.25 * wanted + 3 * math.sqrt(wanted)


def test_a_flood_that_was_learned_does_not_raise_the_threshold_to_its_own_size() -> None:
    """Clipped: a peak of e**9 counts as one at the threshold of then."""
    peaks = Exceedances(0, 500, 10)
    before = peaks.excess_bar_milli(0, 0.5)
    peaks.peak("u", 0, 9_000)
    peaks.settle(ADOPT_S, ADOPT_S, 0.5)
    assert peaks.peaks == 1
    assert before <= peaks.excess_bar_milli(ADOPT_S, 0.5) < 2 * before
