"""What a latency finding says of its cause, and changes that are told against a model's own past."""

import math

import msgspec
import numpy as np
import pytest

from detectors.config import DetectConfig
from detectors.finding import Finding
from detectors.latency import LatencyTwo
from detectors.latency_told import KeyState
from tests.bench.detection_pipe import SECOND_US, Floats, calls_of, passed
from tests.detectors.test_findings import findings_of
from tests.sim.traffic import Traffic

START_US = 1_800_000_000 * SECOND_US
CONFIG = DetectConfig.model_validate(
    {name: {"enabled": False} for name in ("block_rate", "probing", "token_length")}
    | {"latency": {"window_s": 5, "min_calls": 20}}
)
CALLS, SLOW_FROM = 1_200, 900


def told(queue_ms: float, reading_ms: float, generation_ms: float, heavy_users: int) -> Finding:
    """Two minutes at ten a second; in the last quarter each part takes longer, `heavy_users` sending most tokens."""
    rng = np.random.default_rng(1)
    slow = np.arange(CALLS) >= SLOW_FROM
    noise: Floats = rng.lognormal(0, 0.1, CALLS)
    queue = (2 + slow * queue_ms) * noise
    ttft = queue + (50 + slow * reading_ms) * noise
    latency = ttft + (150 + slow * generation_ms) * noise
    user = np.where(slow & (rng.random(CALLS) < 0.7), rng.integers(0, heavy_users, CALLS), 100 + np.arange(CALLS) % 40)
    moment = START_US + np.arange(CALLS) * SECOND_US // 10
    return passed(calls_of(moment, latency, ttft_ms=ttft, queue_ms=queue, user=user), CONFIG)[0]


@pytest.mark.parametrize(
    ("grown", "heavy_users", "cause"),
    [
        ((900, 0, 0), 1, "one user's heavy requests, perhaps meant to exhaust the model"),
        ((900, 0, 0), 50, "a load peak of many users"),
        ((0, 900, 0), 50, "longer inputs of many users"),
        ((0, 0, 900), 1, "a slow model or host"),
    ],
)
def test_a_finding_says_what_it_looks_like(grown: tuple[float, float, float], heavy_users: int, cause: str) -> None:
    """Queue, reading and generation apart; one user with most of the prompt tokens is named as the cause of a queue."""
    found = told(*grown, heavy_users)
    assert found.summary.endswith(f"it looks like {cause}")


def test_a_model_so_slow_that_clients_give_up_is_told() -> None:
    """Ten times as slow for a minute; whoever has waited .4 s goes with what he has of the answer by then."""
    traffic = Traffic(3)
    for begin_s, span_s, slow in ((0, 120, 1.0), (120, 60, 10.0), (180, 30, 1.0)):
        traffic.calm(begin_s, span_s, slow=slow)
    for number, event in enumerate(traffic.events):
        if event.latency_ms > 400:
            had = int(event.response_tokens * 400 / event.latency_ms)
            traffic.events[number] = msgspec.structs.replace(
                event, status="aborted", latency_ms=400.0, response_tokens=had
            )
    found = [each for each in findings_of(traffic) if each.detector == "latency"]
    assert [each.state for each in found[:1]] == ["open"]
    assert found[0].statistic.observed > 2 * found[0].statistic.baseline


def test_a_slow_window_before_two_days_of_silence_is_no_new_normal() -> None:
    """What was usual before is so afterwards: a model that comes back four times as slow is told as slow."""
    rng = np.random.default_rng(4)
    before, after = np.arange(12_000) / 10, 2 * 86_400 + np.arange(1_200) / 10
    slow = np.concatenate([np.where(before >= 1_190, 5, 1), np.full(len(after), 4)])
    moment = (START_US + np.concatenate([before, after]) * SECOND_US).astype(np.int64)
    found = passed(calls_of(moment, 200 * rng.lognormal(0, 0.1, len(slow)) * slow), CONFIG)
    late = [each for each in found if each.first_seen_us > START_US + 86_400 * SECOND_US]
    assert late[-1].statistic.name.startswith("median latency")
    assert late[-1].statistic.observed > 3 * late[-1].statistic.baseline


def test_half_of_a_doubling_is_told_after_two_days_of_its_own_past() -> None:
    """Half as slow again: no doubling, so only the past shows it; the finding says which statistic, at low severity."""
    rng = np.random.default_rng(2)
    per_window, windows = 20, 2 * 288 + 10
    at = np.repeat(np.arange(windows), per_window)
    moment = START_US + (at * 300 + 240) * SECOND_US + np.arange(len(at))
    latency = 400 * rng.lognormal(0, 0.2, len(at)) * np.where(at >= 2 * 288, 1.5, 1.0)
    config = CONFIG.model_copy(
        update={"latency": CONFIG.latency.model_copy(update={"window_s": 300, "min_calls": per_window})}
    )
    found = [
        each for each in passed(calls_of(moment, latency), config) if each.first_seen_us > START_US + 86_400_000_000
    ]
    late = [each for each in found if each.first_seen_us >= START_US + 2 * 86_400 * SECOND_US]
    assert late[0].severity == "low"
    assert late[0].statistic.name.startswith("peaks over threshold: ")
    assert late[0].statistic.improbability > late[0].statistic.threshold > math.log10(2_016)
    assert late[0].cold_start.startswith("Less than a week")


def test_a_model_that_is_seldom_called_is_judged_by_windows_of_up_to_an_hour() -> None:
    """At one call a minute, a doubling is told within two windows of nearly an hour."""
    rng = np.random.default_rng(3)
    minutes = np.arange(24 * 60)
    latency = 400 * rng.lognormal(0, 0.2, len(minutes)) * np.where(minutes >= 20 * 60, 2.5, 1.0)
    seldom = {"latency": {"window_s": 60, "min_calls": 50}}
    config = CONFIG.model_copy(update={"latency": DetectConfig.model_validate(seldom).latency})
    found = passed(calls_of(START_US + minutes * 60 * SECOND_US, latency), config)
    (opened,) = (each for each in found if each.state == "open")
    hours_late = (opened.updated_us - START_US) / (3_600 * SECOND_US) - 20
    assert 0 < hours_late < 2.1


def test_a_key_keeps_no_more_steps_than_two_windows_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call in each step for three hours: 120 steps are kept, of the 600 that windows may look back to."""
    kept: list[int] = []
    learn = LatencyTwo._learn

    def learned(two: LatencyTwo, state: KeyState, index: int, window_steps: int, *, slow: bool) -> None:
        learn(two, state, index, window_steps, slow=slow)
        kept.append(len(state.steps))

    monkeypatch.setattr(LatencyTwo, "_learn", learned)
    at = np.arange(3 * 300)
    config = CONFIG.model_copy(update={"latency": CONFIG.latency.model_copy(update={"window_s": 60, "min_calls": 50})})
    passed(calls_of(START_US + at * 12 * SECOND_US, np.full(len(at), 400.0)), config)
    assert (len(kept), max(kept)) == (len(at), 120)
