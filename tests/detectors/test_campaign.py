"""Campaigns: one prompt family by many users is told once; what only looks like one is not."""

import random

import pytest

from detectors.campaign import COLD_PAST, COLD_TENANT, CampaignTwo
from detectors.campaign_families import MEMBERS_MAX, commonest, sketch_of
from detectors.finding import Entity, Finding
from detectors.rollup import Signal
from tests.detectors.test_demo import CONFIG
from tests.sim.layout import Layout, lay_out
from tests.sim.pipe import run
from tests.sim.traffic import Traffic, sketch


def campaigns(traffic: Traffic, partitions: int = 4) -> list[Finding]:
    layout = Layout(partitions=partitions, heartbeat_ms=1_000)
    return [each for each in run(lay_out(traffic.events, layout), CONFIG).findings if each.detector == "campaign"]


def blocked(second: int, user: str, family: str) -> Signal:
    """A blocked prompt with this sketch."""
    return Signal(
        partition=0,
        second=second,
        tenant="acme",
        kind="campaign",
        key=f"{second}\n{second}\n{family}",
        entity=Entity(kind="user", id=user),
        model="m",
        first_seen_us=second * 1_000_000,
        last_seen_us=second * 1_000_000,
        observed_milli=0,
        baseline_milli=0,
        counts={},
        samples=[(second * 1_000_000, str(second))],
        first_offset=second,
        last_offset=second,
    )


def test_variants_of_one_prompt_by_thirty_users_are_one_finding() -> None:
    """Two thirds of the shingles are kept; over 1, 4 and 16 partitions the same."""
    traffic = Traffic(40)
    traffic.calm(0, 30)
    traffic.spread(30)
    traffic.calm(42, 10)
    told = [campaigns(traffic, partitions) for partitions in (1, 4, 16)]
    assert {each.uid for each in told[0]} == {told[0][0].uid}
    assert told[0][-1].counts["users"] == 30
    assert told[0][-1].cold_start
    assert [[each.counts for each in found] for found in told[1:]] == [[each.counts for each in told[0]]] * 2


@pytest.mark.parametrize(("users_a_day", "told_later"), [(6, False), (20, False), (60, True)])
def test_a_form_letter_that_was_always_blocked_is_no_campaign_until_many_more_send_it(
    users_a_day: int, told_later: bool
) -> None:
    """Twelve days of one prompt that a guard mistakes, by 6 or 20 users a day; or by 20, and on the last day by 60."""
    family = sketch(set(range(60)))
    two = CampaignTwo(CONFIG)
    days_told: dict[int, int] = {}
    for day in range(12):
        users = users_a_day if users_a_day < 60 or day == 11 else 20
        for number in range(users):
            second = 1_800_000_000 + day * 86_400 + number * (80_000 // users)
            days_told[day] = days_told.get(day, 0) + len(two.signal(blocked(second, f"u_{day}_{number}", family)))
    assert [day for day in range(8, 12) if days_told[day]] == ([11] if told_later else [])
    assert (days_told[0] > 0) == (users_a_day >= 20)


def test_a_campaign_of_the_first_week_says_that_the_usual_is_hardly_known() -> None:
    """On the second day, the fifth and the ninth, each of another family by twenty users."""
    two = CampaignTwo(CONFIG)
    two.signal(blocked(1_800_000_000, "u", sketch(set(range(60)))))
    said = []
    for day in (1, 4, 8):
        family = sketch(set(range(1_000 * day, 1_000 * day + 60)))
        seconds = range(1_800_000_000 + 86_400 * day, 1_800_000_020 + 86_400 * day)
        alarms = [alarm for second in seconds for alarm in two.signal(blocked(second, f"u_{second}", family))]
        said.append((alarms[0].cold_start, alarms[0].confidence))
    assert said == [(COLD_TENANT, "medium"), (COLD_PAST, "medium"), ("", "high")]


def test_many_users_with_prompts_of_their_own_are_no_campaign() -> None:
    """A burst of blocks without a common prompt is block_rate's."""
    traffic = Traffic(41)
    traffic.calm(0, 30)
    traffic.block_burst(30, users=40)
    assert campaigns(traffic) == []


def test_one_user_with_a_hundred_variants_is_no_campaign() -> None:
    """He is probing's."""
    traffic = Traffic(42)
    traffic.calm(0, 30)
    traffic.probe(30, prompts=100, hit=1.0)
    assert campaigns(traffic) == []


def test_the_commonest_slots_come_close_to_the_prompt_that_variants_were_made_from() -> None:
    """Variants are .25 to .45 alike; their family's sketch is much closer to the origin than they are."""
    rng = random.Random(43)  # noqa: S311 seeded on purpose
    origin = set(range(10**6, 10**6 + 60))
    variants = []
    for number in range(MEMBERS_MAX):
        kept = set(rng.sample(sorted(origin), 38))
        made = sketch_of(sketch(kept | {10**8 + number * 100 + step for step in range(22)}))
        assert made is not None
        variants.append(made)
    whole = sketch_of(sketch(origin))
    assert whole is not None

    def alike(one: bytes, other: bytes) -> int:
        return sum(one[at : at + 4] == other[at : at + 4] for at in range(0, 256, 4))

    assert alike(commonest(variants), whole) > max(alike(variant, whole) for variant in variants)


def test_a_sketch_of_another_size_or_no_base64_is_none() -> None:
    """It is passed over rather than guessed at."""
    assert [sketch_of(text) for text in ("", "!!!", "AAAA", "A" * 1_024)] == [None] * 4
