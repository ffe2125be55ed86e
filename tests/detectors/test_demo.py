"""The demo in simulation, from cold: four campaigns are found, nothing else is, and calm stays silent."""

from collections import Counter

import pytest

from detectors.config import DetectConfig, LatencyConfig
from detectors.finding import Finding
from tests.sim.campaigns import DEMO, four_campaigns
from tests.sim.layout import Layout, lay_out
from tests.sim.pipe import run
from tests.sim.traffic import Traffic

CONFIG = DetectConfig(latency=LatencyConfig(window_s=5, min_calls=20))
LONG_ANSWERS_USERS = 3


def episodes(findings: list[Finding]) -> dict[str, int]:
    """How many episodes each detector raised."""
    return dict(Counter({each.uid: each.detector for each in findings}.values()))


def raised(traffic: Traffic, seed: int) -> list[Finding]:
    layout = Layout(partitions=4, heartbeat_ms=1_000, seed=seed)
    return run(lay_out(traffic.events, layout), CONFIG, batch=500, seed=seed).findings


LONG, SOAK = pytest.mark.long, pytest.mark.soak
SEEDS = [*range(4), *(pytest.param(seed, marks=LONG if seed < 12 else SOAK) for seed in range(4, 20))]


@pytest.mark.parametrize("seed", SEEDS)
def test_all_four_campaigns_are_found_from_cold_and_nothing_else(seed: int) -> None:
    """A minute of calm, four campaigns of twelve seconds: one episode each, token_length one a user."""
    print("seed", seed)
    wanted = dict.fromkeys(DEMO, 1) | {"token_length": LONG_ANSWERS_USERS}
    assert episodes(raised(four_campaigns(seed), seed)) == wanted


@pytest.mark.parametrize("seed", range(20, 25))
@pytest.mark.parametrize(
    ("which", "wanted"),
    [
        ("b", {"block_rate": 1}),
        ("r", {"probing": 1}),
        ("l", {"latency": 1}),
        ("t", {"token_length": LONG_ANSWERS_USERS}),
    ],
)
def test_each_campaign_alone_raises_its_own_detector_only(which: str, wanted: dict[str, int], seed: int) -> None:
    """None of the four, as staged here, is told twice under two names."""
    print("seed", seed)
    assert episodes(raised(four_campaigns(seed, which=which), seed)) == wanted


@pytest.mark.parametrize("seed", SEEDS)
def test_calm_raises_nothing_in_half_an_hour(seed: int) -> None:
    """Seven requests a second by thirty users, 1 % blocked, with the demo's short windows."""
    print("seed", seed)
    traffic = Traffic(seed)
    traffic.calm(0, 1_800)
    assert raised(traffic, seed) == []


@pytest.mark.parametrize(("rate", "span_s"), [(5.0, 10.0), (10.0, 15.0)])
def test_the_campaigns_are_found_at_other_rates_and_lengths(rate: float, span_s: float) -> None:
    """Five to ten requests a second, ten to fifteen seconds."""
    for seed in range(30, 35):
        print("seed", seed)
        found = episodes(raised(four_campaigns(seed, span_s=span_s, rate=rate), seed))
        assert set(found) == set(DEMO), seed
