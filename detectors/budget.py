"""The alert budget: how many false alarms a tenant may get, and what that makes of each detector's settings.

`alert_budget = "1 per week per tenant"` is split over the detectors by fixed shares, and each share compiles into the
setting that decides how often its detector is wrong. A setting that the operator wrote himself stays as it is.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

if TYPE_CHECKING:
    from detectors.config import DetectConfig

BUDGET: Final = "2.5 per week per tenant"
WEEKS: Final = {"day": 1 / 7, "week": 1.0, "month": 365.25 / 12 / 7}
_FORM: Final = re.compile(r"(\d{1,6}(?:\.\d{1,6})?) per (day|week|month) per tenant")
NATS_A_DECADE: Final = (1.9, 5.4)
"""probing, in the simulation of `tests/bench/detection_probing.py`: ten times the false alarms took 1.9 nats off
(0.01 % of honest sessions at 5.52, 0.1 % at 3.61), half of them asked 1.62 more (0.005 % at 7.14), as if 5.4 for a
tenth: the rarer, the more of them are jobs with a bad day, whose evidence is large. Below half it is extrapolated."""
NATS_MIN: Final = 2.3
"""probing: the loosest that was measured, for fifty times the default (0.5 %). A larger budget asks no less."""


LEAST: Final = 1e-6
"""Of false alarms a week: a smaller budget asks for no fewer."""


class Part(Struct, frozen=True):
    """One detector's part of the budget."""

    detector: str
    share: float
    setting: str
    """What it compiles to, in the detector's table."""
    value: Callable[[float, float], Any]
    """Of its default, which is for `BUDGET`, and how many times that budget is asked for."""
    assumption: str


PARTS: Final = (
    Part(
        "block_rate",
        0.2,
        "budget_per_week",
        lambda default, times: max(round(default * times, 6), LEAST),
        "a tenant's keys share it; thresholds are peaks over threshold on each chart's own past, in the first week"
        " ln(assumed rate x requests a week) + 1",
    ),
    Part(
        "campaign",
        0.04,
        "users_min",
        lambda default, times: min(max(default + math.ceil(-math.log2(times)), 4), 64),
        "half the false campaigns ask one more user; the default is taken for one in ten weeks",
    ),
    Part(
        "latency",
        0.2,
        "budget_per_week",
        lambda default, times: max(round(default * times, 6), LEAST),
        "one model; with more, each has this many",
    ),
    Part(
        "probing",
        0.16,
        "threshold",
        lambda default, times: round(max(default - NATS_A_DECADE[times < 1] * math.log10(times), NATS_MIN), 2),
        "4,000 benign sessions a week and tenant, of which the default flags 0.01 %, as in simulation; below half of"
        " the default budget extrapolated, above fifty times it stays at 2.3, since nothing looser was measured",
    ),
    Part(
        "token_length",
        0.2,
        "budget_per_week",
        lambda default, times: max(round(default * times, 6), LEAST),
        "a completion is rare at 1 in 1,000, and rare ones of a user come apart",
    ),
    Part(
        "volume",
        0.2,
        "budget_per_week",
        lambda default, times: max(round(default * times, 6), LEAST),
        "how far clients exceed their own past falls off exponentially in its logarithm; in the first weeks assumed",
    ),
)


class Explained(Struct, frozen=True):
    """What the budget comes to for one detector."""

    detector: str
    enabled: bool
    budget_per_week: float
    """False alarms a week and tenant that are its share."""
    setting: str
    """`TABLE.NAME`."""
    value: float
    compiled: bool
    """Whether the value is what the budget compiles to; else the operator's."""
    assumption: str


def per_week(text: str) -> float:
    """False alarms a week and tenant. Raises `ValueError` for another form."""
    found = _FORM.fullmatch(text)
    if found is None or float(found[1]) <= 0:
        raise ValueError("alert_budget is `NUMBER per day|week|month per tenant`, such as `1 per week per tenant`")
    return float(found[1]) / WEEKS[found[2]]


def compiled(table: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The raw `[detect]` table with what its `alert_budget` compiles to, wherever nothing is written already.

    `defaults`: detector to its table of defaults. Raises `ValueError` for a budget of another form."""
    if not isinstance(table["alert_budget"], str):
        return table
    times = per_week(table["alert_budget"]) / per_week(BUDGET)
    made = dict(table)
    for part in PARTS:
        own = made.get(part.detector, {})
        if isinstance(own, dict) and part.setting not in own:
            made[part.detector] = own | {
                part.setting: part.value(getattr(defaults[part.detector], part.setting), times)
            }
    return made


def explain(config: "DetectConfig") -> list[Explained]:
    """Each detector's share, what it compiles to, and what is in force."""
    budget = per_week(config.alert_budget)
    told = []
    for part in PARTS:
        table = getattr(config, part.detector)
        wanted = part.value(getattr(type(table)(), part.setting), budget / per_week(BUDGET))
        value = float(getattr(table, part.setting))
        told.append(
            Explained(
                detector=part.detector,
                enabled=table.enabled,
                budget_per_week=round(budget * part.share, 6),
                setting=f"{part.detector}.{part.setting}",
                value=value,
                compiled=math.isclose(value, float(wanted), rel_tol=1e-6),
                assumption=part.assumption,
            )
        )
    return told
