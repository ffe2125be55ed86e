"""Block rate and campaign with one signal off in turn, on few tenants and campaigns: what each is good for.

    .venv/bin/python -m tests.bench.detection --data DIR --only ablations --json

The same simulation, seeds and deployed path as the parts `block` and `campaign`, smaller; thresholds are compiled anew
from the same budget, so what a signal is worth shows in how soon and how rightly a shift is told.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from collector.minhash import MinHash
from detectors import campaign, campaign_families
from detectors.campaign_families import Families
from tests.bench import detection_block, detection_campaign
from tests.bench.blocked_log import served_rates

TENANTS: Final = 4
TEST_DAYS: Final = 14
INSTANTS: Final = 2
CAMPAIGNS: Final = 6
MONTHS: Final = 3
BLOCK: Final[dict[str, dict[str, Any]]] = {
    "all signals": {},
    "a user's blocks all count for many": {"fresh_s": 1},
    "a user's prompts all count for few": {"distinct_s": 1},
    "one ratio, 3": {"ratios": (3.0,)},
    "one user may make a spike": {"top_user_share_max": 1.0},
}


def block(data: Path, seed: int, *, quick: bool) -> dict[str, Any]:
    """By what is off: false alarms, and the shifts by many and by few."""
    rates = served_rates(data)
    if not rates:
        return {"about": "the data has no traces"}
    days, count = (2, 1) if quick else (TEST_DAYS, TENANTS)
    told = {}
    for name, changed in BLOCK.items():
        settings = detection_block.ONLY.block_rate.model_copy(update=changed)
        config = detection_block.ONLY.model_copy(update={"block_rate": settings})
        tenants = [
            detection_block.tenant_of(number, seed, rates[number % len(rates)], config, days=days, instants=INSTANTS)
            for number in range(count)
        ]
        kinds = {kind: detection_block.shift_of(tenants, kind) for kind in ("many 3x", "few 3x")}
        false = float(np.mean([tenant.false / (days / 7) for tenant in tenants]))
        told[name] = {"false_alarms_a_week": round(false, 3), "told_right": detection_block.told_right(tenants)} | kinds
    return told | {"about": f"{count} tenants, {days} days after four weeks, {INSTANTS} instants each"}


@contextmanager
def _without(name: str) -> Iterator[None]:
    """The campaign detector with one of its means off."""
    kept = campaign.SPREAD, campaign_families.commonest, campaign.CampaignTwo._like  # put back below
    if name == "no bar above a family's past":
        campaign.SPREAD = 0.0  # type: ignore[misc]
    elif name == "a family is its first prompt":
        campaign_families.commonest = lambda sketches: sketches[0]
    elif name == "families are not joined":
        campaign.CampaignTwo._like = _never  # type: ignore[method-assign]
    try:
        yield
    finally:
        campaign.SPREAD, campaign_families.commonest, campaign.CampaignTwo._like = kept  # type: ignore[misc, method-assign]


def _never(self: campaign.CampaignTwo, known: Families, row: int) -> None:  # in a method's place
    return None


def campaigns(data: Path, seed: int, *, quick: bool) -> dict[str, Any]:
    """By what is off: false campaigns a month, and incidents of campaigns with 30 % of words replaced."""
    if not (data / "prompts").is_dir():
        return {"about": "the data has no prompts"}
    attacks, benign = detection_campaign.prompts_of(data)
    words = [word for text in benign for word in text.split()]
    minhash = MinHash(b"bench")
    quiet = [minhash.encode(text) for text in benign]
    months, count = (1, 1) if quick else (MONTHS, CAMPAIGNS)
    size = detection_campaign.USERS * detection_campaign.PROMPTS_A_USER
    told: dict[str, Any] = {}
    for name in (
        "all signals",
        "no bar above a family's past",
        "a family is its first prompt",
        "families are not joined",
    ):
        rng = np.random.default_rng([seed, 78])
        with _without(name):
            false = [detection_campaign.month(rng, quiet) for _ in range(months)]
            runs = []
            for _ in range(count):
                text = attacks[int(rng.integers(len(attacks)))]
                made = [minhash.encode(detection_campaign.variant(text, 0.3, words, rng)) for _ in range(size)]
                runs.append(detection_campaign.campaign_of(rng, quiet, made))
        told[name] = {
            "false_campaigns_a_month": round(float(np.mean(false)), 3),
            "found": round(float(np.mean([run["incidents"] > 0 for run in runs])), 3),
            "one_incident": round(float(np.mean([run["incidents"] == 1 for run in runs])), 3),
            "episodes_mean": round(float(np.mean([run["episodes"] for run in runs])), 2),
            "users_named_median": float(np.median([run["users"] for run in runs])),
        }
    return told | {"about": f"{months} months, {count} campaigns with 30 % of words replaced"}


def measure(data: Path, seed: int, *, quick: bool) -> dict[str, Any]:
    """Raw figures."""
    return {"campaign": campaigns(data, seed, quick=quick), "block_rate": block(data, seed, quick=quick)}


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:  # no figure of the table is theirs
    """None: no row of the table asks for them."""
    return []
