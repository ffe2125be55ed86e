"""The charts of block_rate: thresholds from their own past, usual rates by hour, and changes named before a spike."""

import math
import random

import pytest

from collector.event import Change, encode, from_timestamp_us
from detectors.block_rate import BlockRateTwo
from detectors.block_rate_charts import (
    DAY_S,
    SLOTS_A_WEEK,
    WEEK_S,
    Chart,
    Counts,
    History,
    cold_threshold,
    share_of,
    threshold_of,
)
from detectors.engine import PartitionEngine, TenantEngine
from detectors.finding import Finding
from detectors.rollup import Cell, Signal
from tests.detectors.test_demo import CONFIG
from tests.sim.layout import Layout, Logged, lay_out
from tests.sim.traffic import START_US, Traffic


@pytest.mark.parametrize("mean", [0.8, 1.3, 2.5])
def test_peaks_over_the_threshold_come_as_often_as_the_budget_says(mean: float) -> None:
    """Exponential maxima of any scale, four weeks learned: within a factor of three of the budget over forty draws."""
    rng = random.Random(51)  # noqa: S311 seeded on purpose
    print("seed 51")
    budget, over, weeks = 0.5, 0, 20
    for _ in range(40):
        past = [rng.expovariate(1 / mean) for _ in range(4 * SLOTS_A_WEEK)]
        threshold = threshold_of(past, 9.0, budget)
        over += sum(rng.expovariate(1 / mean) > threshold for _ in range(weeks * SLOTS_A_WEEK))
    assert budget / 3 < over / 40 / weeks < budget * 3


def test_without_a_week_of_maxima_the_cold_threshold_holds() -> None:
    """ln(rate x requests a week) + 1 for half an alarm a week over five charts' worth."""
    assert threshold_of([5.0] * (SLOTS_A_WEEK - 1), 9.0, 0.1) == 9.0
    assert cold_threshold(0.02, 50_000, share_of(0.5, 1, 6)) == pytest.approx(math.log(1_000) + 1)


def test_the_budget_is_a_tenants_and_split_over_his_keys() -> None:
    """Ten keys have a tenth each."""
    assert share_of(0.5, 10, 6) == pytest.approx(share_of(0.5, 1, 6) / 10)


def test_revisions_of_a_model_that_are_gone_have_no_share_of_the_budget() -> None:
    """Fifty-two of them, one after the other: the last one is watched as closely as the first."""
    thresholds = []
    for revisions in (1, 52):
        two = BlockRateTwo(CONFIG)
        for week in range(52 - revisions, 52):
            cell = Cell()
            cell.counts = {"requests": 100, "fresh_trials": 100, "distinct_trials": 100}
            two.second(START_US // 1_000_000 + week * 3 * WEEK_S, [("acme", f"m@{week}\nguard", cell)])
        thresholds.append({chart.threshold for chart in two._keys["acme\nm@51\nguard"].charts})
    assert thresholds[0] == thresholds[1]


def test_a_burst_is_not_the_new_normal_where_few_ask() -> None:
    """Two hundred requests a day, one in a hundred blocked, and on the eleventh day thirty blocks in ninety seconds:
    the charts fall for longer than a day, and still the usual rate is what it was."""
    rng = random.Random(53)  # noqa: S311 seeded on purpose
    print("seed 53")
    two = BlockRateTwo(CONFIG)
    alarms, usual = 0, []
    for day in range(14):
        asked = [(rng.randrange(DAY_S), rng.random() < 0.01) for _ in range(200)]
        asked += [(43_000 + 3 * number, True) for number in range(30)] if day == 10 else []
        for at_s, blocked in sorted(asked):
            second = START_US // 1_000_000 // DAY_S * DAY_S + day * DAY_S + at_s
            cell = Cell()
            cell.counts = {"requests": 1, "fresh_trials": 1, "distinct_trials": 1}
            if blocked:
                cell.counts |= {"blocks": 1, "fresh_blocks": 1, "distinct_blocks": 1}
                cell.weights = {"blocked": {f"u_{at_s % 10}": 1}, "counted": {f"u_{at_s % 10}": 1}}
                cell.samples = [(second * 1_000_000, str(second))]
            alarms += len(two.second(second, [("acme", "m\nguard", cell)]))
        usual.append(two._keys["acme\nm\nguard"].usual.streams["fresh"].overall(0.02, 20.0))
    assert alarms
    assert usual[-1] == pytest.approx(usual[9], rel=0.2)


def test_slots_without_traffic_count_as_quiet() -> None:
    """The maximum of a slot is kept when the next begins; empty slots are zero."""
    chart = Chart("fresh", 3.0, threshold=9.0)
    chart.turn(21_600)
    chart.aim(0.02)
    chart.add(21_600, 10, 5, 10)
    chart.turn(4 * 21_600)
    assert chart.maxima == [chart.sum, 0.0, 0.0]


def test_the_usual_rate_follows_the_hour_and_shrinks_to_the_day() -> None:
    """Much history: the hour's own rate. None: the prior."""
    counts = Counts.none()
    assert counts.at(3, 0.02, 20.0) == pytest.approx(0.02)
    for hour in range(24):
        counts.add(hour, 100_000, 8_000 if 8 <= hour < 16 else 1_000)
    assert counts.at(12, 0.02, 20.0) == pytest.approx(0.08, rel=0.05)
    assert counts.at(2, 0.02, 20.0) == pytest.approx(0.01, rel=0.05)


def test_a_weekly_swing_is_learned_where_there_is_enough_of_it_and_elsewhere_the_day_counts() -> None:
    """Sundays blocked five times as often: seen in a month of much traffic, hardly in one of little."""
    rates = {}
    for name, trials in (("much", 2_000), ("little", 50)):
        history = History.new()
        for hour in range(24 * 28):
            rate = 0.10 if hour // 24 % 7 == 3 else 0.02
            counts = {"fresh_trials": trials, "fresh_blocks": round(trials * rate)}
            history.add(1_440 * 7 * 2_800 + hour * 60, counts, 7 * 86_400)
        rates[name] = [history.streams["fresh"].at(24 * day + 12, 0.02, 20.0) for day in (3, 5)]
    assert rates["much"] == pytest.approx([0.10, 0.02], rel=0.15)
    assert rates["much"][0] - 0.03 > rates["little"][0] > rates["little"][1] + 0.01


def test_history_halves_in_its_half_life() -> None:
    """Day by day."""
    history = History.new()
    history.add(1_440 * 100, {"fresh_trials": 1_000}, 7 * 86_400)
    history.add(1_440 * 107, {}, 7 * 86_400)
    assert history.trials() == pytest.approx(500)


def test_a_spike_after_a_change_event_names_it_and_any_cut_of_the_log_says_the_same() -> None:
    """Attack or rollout: a guard's new version twenty seconds before."""
    traffic = Traffic(52)
    traffic.calm(0, 60)
    traffic.block_burst(60)
    traffic.calm(72, 10)
    log = lay_out(traffic.events, Layout(partitions=1, heartbeat_ms=1_000))[0]

    plain, changed = told(log, None, 50), told(log, 40, 50)
    assert "rollout" not in plain[0].summary
    assert "after a change of guard from injection 1 to injection 2: suspect the rollout" in changed[0].summary
    assert [each.summary for each in told(log, 40, 7)] == [each.summary for each in changed]
    for keys in ("api_keys", "token_keys", "proxy_secret", "signing_key"):  # whoever gets a key is no rollout
        assert [each.summary for each in told(log, 40, 50, keys)] == [each.summary for each in plain]


def told(log: list[Logged], change_s: int | None, batch: int, subject: str = "guard") -> list[Finding]:
    """Findings of block_rate, with a change record of a lane of its own before the second `change_s`."""
    one = PartitionEngine(CONFIG, topic="iw.events", partition=0, partitions=1)
    two = TenantEngine(CONFIG, partition=0, partitions=1)
    findings, signals = [], 0
    done = change_s is None
    for number, entry in enumerate(log):
        if not done and change_s is not None and entry.append_ms >= START_US // 1_000 + change_s * 1_000:
            done = True
            moment_us = START_US + change_s * 1_000_000
            change = Change(
                schema_version="1.0",
                event_id="change",
                timestamp=from_timestamp_us(moment_us),
                collector_id="other",
                boot="b",
                seq=0,
                tenant="acme",
                subject=subject,
                before="injection 1",
                after="injection 2",
            )
            assert encode(change)
            one.observe(change, append_ms=entry.append_ms, offset=2 * number)
        one.observe(entry.record, append_ms=entry.append_ms, offset=2 * number + 1)
        if number % batch == 0 or number == len(log) - 1:
            for rollup in one.take():
                signals += isinstance(rollup, Signal) and rollup.kind == "block_rate"
                two.observe(rollup)
            findings += two.take()
    assert signals == (change_s is not None and subject == "guard")
    return [each for each in findings if each.detector == "block_rate"]
