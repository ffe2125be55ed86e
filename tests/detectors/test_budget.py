"""The alert budget: what it compiles to, and what is left alone."""

import pytest
from pydantic import ValidationError

from detectors.budget import BUDGET, PARTS, explain, per_week
from detectors.config import DetectConfig


def test_the_default_budget_is_what_the_defaults_are_for() -> None:
    """Writing the default changes no setting."""
    assert DetectConfig(alert_budget=BUDGET) == DetectConfig()


def test_half_the_budget_makes_every_detector_stricter() -> None:
    """Each detector's setting moves to the side of fewer alarms, and by as much as it says."""
    usual, strict = DetectConfig(), DetectConfig(alert_budget="1.25 per week per tenant")
    assert strict.block_rate.budget_per_week == usual.block_rate.budget_per_week / 2
    assert strict.latency.budget_per_week == usual.latency.budget_per_week / 2
    assert strict.token_length.budget_per_week == usual.token_length.budget_per_week / 2
    assert strict.volume.budget_per_week == usual.volume.budget_per_week / 2
    assert strict.probing.threshold == pytest.approx(usual.probing.threshold + 1.626, abs=0.01)
    assert strict.campaign.users_min == usual.campaign.users_min + 1
    assert all(part.compiled for part in explain(strict))


@pytest.mark.parametrize(("times", "nats"), [(0.5, 7.14), (1, 5.52), (10, 3.61), (50, 2.3), (5_000, 2.3)])
def test_the_threshold_of_probing_follows_what_was_measured_and_goes_no_lower(times: float, nats: float) -> None:
    """Within a twentieth of a nat of the simulation; above fifty times the budget nothing was measured."""
    config = DetectConfig(alert_budget=f"{2.5 * times} per week per tenant")
    assert config.probing.threshold == pytest.approx(nats, abs=0.05)


def test_the_smallest_budget_that_can_be_written_is_one() -> None:
    """It compiles to settings that are allowed, and is told as compiled."""
    assert all(part.compiled for part in explain(DetectConfig(alert_budget="0.000001 per month per tenant")))


def test_a_setting_of_the_operators_own_stays() -> None:
    """And is told apart."""
    config = DetectConfig.model_validate(
        {"alert_budget": "1 per month per tenant", "probing": {"threshold": 6.3}, "latency": {"budget_per_week": 2.0}}
    )
    assert (config.probing.threshold, config.latency.budget_per_week) == (6.3, 2.0)
    assert {part.detector for part in explain(config) if not part.compiled} == {"probing", "latency"}


@pytest.mark.parametrize("text", ["", "1", "0 per week per tenant", "-1 per week per tenant", "1 per year per tenant"])
def test_a_budget_of_another_form_is_refused_in_one_sentence(text: str) -> None:
    """It says how one is written."""
    with pytest.raises(ValidationError, match="such as `1 per week per tenant`"):
        DetectConfig(alert_budget=text)


def test_days_weeks_and_months_are_one_scale_and_the_shares_are_the_whole() -> None:
    """In false alarms a week."""
    assert per_week("1 per day per tenant") == pytest.approx(7)
    assert per_week("4.348 per month per tenant") == pytest.approx(1, abs=1e-3)
    assert sum(part.share for part in PARTS) == pytest.approx(1)
