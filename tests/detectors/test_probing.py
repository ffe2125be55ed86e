"""The parts of `probing`: what a prompt weighs, the evidence of weeks, and what is told while a tenant is new."""

import math
import random

import msgspec
import numpy as np
import pytest

from detectors.config import DetectConfig, ProbingConfig
from detectors.episodes import replay_command
from detectors.finding import Entity
from detectors.probing import DETECTOR
from detectors.probing_evidence import SLOW_GAP_US, Slow, Taken, gains, mixture_ratio, slow_stepped
from detectors.probing_told import COLD_TENANT, ProbingTwo
from detectors.prompts import Known, Prompt, seen_before
from detectors.rollup import Cell, Signal
from detectors.time import SECOND_US
from tests.detectors.test_contract import Halves, alarms_of
from tests.sim.traffic import Traffic

CONFIG = ProbingConfig()
DAY_S = 86_400


def signal(user: str, second: int, nats: float) -> Signal:
    """What stage 1 would say of a stranger with so much evidence."""
    counts = {"prompts": 9, "distinct": 9, "blocks": 8, "own_rate_ppm": 20_000, "past_prompts": 0, "slow": 0}
    counts |= {"bar_milli": 5_500, "most_milli": round(nats * 1_000), "known_s": second - 60}
    entity = Entity(kind="session", id=f"{user}/s_1")
    moment_us = second * SECOND_US
    return Signal(
        0, second, "acme", "probing", f"session\n{entity.id}", entity, "m@1", moment_us - 50 * SECOND_US, moment_us,
        round(nats * 1_000), 0, counts, [(moment_us, "e")], 1, 9,
    )  # fmt: skip


def two() -> ProbingTwo:
    """The second half, to which the tenant is new at second 1,000."""
    half = ProbingTwo(DetectConfig())
    assert list(half.second(1_000, [("acme", "\n", Cell())])) == []
    return half


def test_while_a_tenant_is_new_few_clients_are_told_on_more_evidence_and_the_rest_is_counted() -> None:
    """The first five that pass the higher bar, again and again; from the fourth day on everybody."""
    half = two()
    weak = CONFIG.threshold + CONFIG.cold_extra - 0.1
    assert half.signal(signal("u_weak", 2_000, weak)) == []
    told = [bool(half.signal(signal(f"u_{number}", 2_000 + number, 12.0))) for number in range(8)]
    assert told == [True] * CONFIG.cold_clients_max + [False] * 3
    (again,) = half.signal(signal("u_0", 3_000, 12.0))
    assert (again.statistic.threshold, again.confidence) == (9.5, "medium")
    assert again.cold_start.startswith(COLD_TENANT)
    assert half.counters == {"withheld": 4}
    restored = ProbingTwo(DetectConfig())
    restored.restore(half.snapshot())
    assert restored.signal(signal("u_7", 3_001, 12.0)) == []
    (later,) = restored.signal(signal("u_7", 1_000 + CONFIG.cold_s, weak))
    assert (later.statistic.threshold, COLD_TENANT in later.cold_start) == (5.5, False)


def test_a_tenant_seen_by_another_partition_later_is_not_new_again() -> None:
    """Its first second stays the first."""
    half = two()
    list(half.second(1_000 + CONFIG.cold_s, [("acme", "\n", Cell())]))
    assert half.signal(signal("u_1", 1_001 + CONFIG.cold_s, 5.0))


def test_a_replay_begins_where_the_client_was_first_seen_or_four_days_before() -> None:
    """Whichever is earlier: his whole past counts, and the tenant must not look new."""
    half = two()
    now_s = 20 * DAY_S
    for known_s, begin_s in ((5 * DAY_S, 5 * DAY_S), (now_s - 60, now_s - 50 - 4 * DAY_S)):
        said = signal("u_1", now_s, 9.0)
        said.counts["known_s"] = known_s
        (alarm,) = half.signal(said)
        command = replay_command("probing", alarm, alarm.first_seen_us, 0)
        stamp = np.datetime_as_string(np.datetime64(begin_s, "s"))
        assert f"--from {stamp}Z" in command, command


def test_the_first_rewordings_of_what_was_blocked_weigh_less_than_other_prompts() -> None:
    """To the block less than a third, to the pass no more; a client with a past of blocks is given more of both."""
    passed, blocked, again_passed, again_blocked = gains(CONFIG, (0, 0))
    assert blocked == pytest.approx(math.log(10))
    assert 0 < again_blocked < blocked / 3
    assert passed < 0
    assert again_passed < 0
    assert gains(CONFIG, (1_000, 300))[1] < blocked / 2


def test_the_evidence_of_weeks_is_wrong_no_more_often_than_a_likelihood_ratio_may_be() -> None:
    """Honest clients whose rates follow the assumed distribution pass h with probability exp(-h) at most (Ville's
    inequality): three standard deviations are allowed on top, and some must pass, or the test would show nothing."""
    seed, clients = 5, 4_000
    print("seed", seed)
    rng = np.random.default_rng(seed)
    rates = rng.beta(CONFIG.prior_shape, CONFIG.prior_shape * (1 / CONFIG.prior_rate - 1), clients)
    told = 0
    for rate in rates.tolist():
        blocks = np.cumsum(rng.random(30) < rate).tolist()
        told += any(blocks[-1] and mixture_ratio(n + 1, k, (0, 0), CONFIG) >= 3.0 for n, k in enumerate(blocks))
    bound = clients * math.exp(-3.0)
    assert 0 < told <= bound + 3 * math.sqrt(bound)


def test_the_evidence_of_weeks_has_a_ceiling_for_who_is_always_blocked_by_half() -> None:
    """A red-team job is one of the few that are: a thousand blocks say hardly more than a hundred."""
    hundred, thousand = (mixture_ratio(n, n / 2, (0, 0), CONFIG) for n in (100, 1_000))
    assert thousand < hundred < 10


def test_one_prompt_an_hour_is_looked_at() -> None:
    """Sixty in a minute count once, a day apart each; a rewording never."""
    slow: Slow | None = None
    for number in range(60):
        slow = slow_stepped(slow, Taken(number * SECOND_US, number, "e", "s", True, True, False), (0, 0), CONFIG)
    assert slow is not None
    assert (slow.looks, slow.blocked) == (1, 60)
    slow = slow_stepped(slow, Taken(SLOW_GAP_US + 60, 61, "e", "s", True, True, True), (0, 0), CONFIG)
    assert slow is not None
    assert slow.looks == 1


def test_what_is_known_of_prompts_says_what_comparing_them_all_says() -> None:
    """The table in one piece against one by one, with repeats, near repeats and sketches of another size."""
    seed = 7
    print("seed", seed)
    rng = np.random.default_rng(seed)
    known, listed = Known(), list[Prompt]()
    sketches = [rng.bytes(256) for _ in range(12)]
    for number in range(400):
        sketch = bytearray(sketches[int(rng.integers(12))])
        for slot in rng.choice(64, int(rng.integers(0, 6)), replace=False).tolist():
            sketch[4 * slot] ^= 1
        prompt = Prompt(f"d{int(rng.integers(60))}", bytes(sketch) if number % 5 else b"")
        new = not seen_before(prompt, listed, 0.95)
        assert known.admit(prompt, 64, 0.95) == new
        if new:
            listed = [*listed, prompt][-64:]


def test_what_is_held_against_a_users_only_session_parts_from_what_is_held_against_him_with_the_next_one() -> None:
    """Kept once or, as after every restart, twice: the same signals and the same state, session by session."""
    seed = 9
    print("seed", seed)
    rng = random.Random(seed)  # noqa: S311 seeded on purpose
    traffic = Traffic(seed, rate=20, users=8, block_rate=0.3)
    traffic.calm(0, 40)
    events = [
        msgspec.structs.replace(event, session_id=rng.choice(["s_1", "s_1", "s_1", "s_1", "s_2", ""]))
        for event in traffic.events
    ]
    plain, restarted = Halves(DETECTOR), Halves(DETECTOR)
    alarms = alarms_of(plain, events)
    assert {alarm.entity.kind for alarm in alarms} == {"session", "user"}
    assert alarms_of(restarted, events, restart=True) == alarms
    assert restarted.ones[0][0].snapshot() == plain.ones[0][0].snapshot()
