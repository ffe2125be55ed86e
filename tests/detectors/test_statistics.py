"""Properties of the statistics: false alarms under the null hypothesis stay within what theory allows."""

import math
import random

import numpy as np
import pytest

from detectors.block_rate_charts import Chart
from detectors.config import DetectConfig
from tests.bench.probing_clients import NOVEL, RESENT, Client
from tests.bench.probing_log import only_probing, passed

PROMPTS = 200
CLIENTS = 400


def honest_clients(rate: float, prompt: int, seed: int) -> list[Client]:
    """Clients of whom each prompt is blocked independently at `rate`, a minute apart."""
    rng = np.random.default_rng(seed)
    at_s = np.arange(PROMPTS, dtype=np.float64) * 60.0
    kinds = np.full(PROMPTS, prompt)
    kinds[0] = NOVEL
    return [Client("null", 1.0, at_s + number * 1e-3, kinds, rng.random(PROMPTS) < rate) for number in range(CLIENTS)]


def excursions_told(clients: list[Client], threshold: float) -> int:
    """Runs of evidence, from nothing back to nothing, of which stage 1 sent a signal."""
    settings = {"threshold": threshold, "record_share": 0.0, "swing": 1.0, "slow_extra": 1e6}
    config = DetectConfig.model_validate(only_probing() | {"probing": settings})
    signals = passed(clients, range(len(clients)), config).signals
    return len({(each.entity.id, each.first_seen_us) for each in signals if each.kind == "probing"})


@pytest.mark.parametrize("threshold", [3.5, 5.0])
def test_probing_tells_honest_clients_no_more_often_than_the_likelihood_ratio_allows(threshold: float) -> None:
    """Under the assumed rate a run begun at any prompt passes h with probability exp(-h) at most (Ville's inequality):
    three standard deviations are allowed on top, and some must be told, or the test would show nothing."""
    seed = 1
    print("seed", seed)
    told = excursions_told(honest_clients(0.02, NOVEL, seed), threshold)
    bound = CLIENTS * PROMPTS * math.exp(-threshold)
    print("told", told, "bound", bound)
    assert 0 < told <= bound + 3 * math.sqrt(bound)


def test_one_prompt_sent_again_and_again_is_no_evidence_however_often_it_is_blocked() -> None:
    """A job that is always blocked: two hundred requests, one distinct prompt, no signal."""
    assert excursions_told(honest_clients(0.97, RESENT, 2), 5.0) == 0


def test_a_rate_that_was_learned_is_no_evidence_on_later_days() -> None:
    """A client blocked half of the time is told on the first day and, once learned, on no other."""
    rng = random.Random(3)  # noqa: S311 seeded on purpose
    at_s = np.concatenate([day * 86_400.0 + np.arange(300) * 2.0 for day in range(6)])
    blocked = np.array([rng.random() < 0.5 for _ in at_s])
    client = Client("job", 1.0, at_s, np.full(len(at_s), NOVEL), blocked)
    config = DetectConfig.model_validate(only_probing())
    signals = passed([client], [0], config).signals
    days = {int((each.last_seen_us / 1e6) // 86_400) for each in signals if each.kind == "probing"}
    first = int(min(each.last_seen_us for each in signals) / 1e6) // 86_400
    assert days == {first}


@pytest.mark.parametrize("ratio", [2.0, 3.0, 6.0])
def test_a_chart_of_independent_trials_alarms_no_more_often_than_its_threshold_allows(ratio: float) -> None:
    """The mean time to a false alarm of a CUSUM with threshold h is at least exp(h) trials (G. Lorden, "Procedures for
    reacting to a change in distribution", Ann. Math. Statist. 42, 1971): three standard deviations on top."""
    seed, trials, rate, threshold = 7, 60_000, 0.02, 4.0
    print("seed", seed)
    blocks = np.random.default_rng(seed).random(trials) < rate
    chart = Chart("fresh", ratio, threshold=threshold)
    chart.aim(rate)
    alarms = 0
    for second, blocked in enumerate(blocks.tolist()):
        chart.add(second, 1, int(blocked), 1)
        if chart.sum >= threshold:
            alarms += 1
            chart.sum = 0.0
    bound = trials * math.exp(-threshold)
    print("alarms", alarms, "bound", bound)
    assert 0 < alarms <= bound + 3 * math.sqrt(bound)
