"""What `token_length` keeps of a model and of a user, and the words and figures of its alarms."""

import math
from typing import Final

from msgspec import Struct

from detectors.detector import Alarm, actor_entity, contributors
from detectors.finding import Statistic
from detectors.histogram import Histogram, total
from detectors.rollup import Sample
from detectors.time import SECOND_US

EXPONENT: Final = 0.9
"""Solves E[exp(x gain)] = 1 for gains of Exp(1) with chance 1/1000 less .01: 1 / (1 - x) = 10."""
ADOPT_S: Final = 86_400
"""Age at which even rare completions enter the baseline."""


class Tail(Struct):
    """The model's whole distribution beyond its upper tenth: P(ln tokens > ln edge + x) = share exp(-x / scale)."""

    edge: int
    share: float
    scale: float


class Batch(Struct):
    """Ten seconds of lengths that wait to be learned."""

    index: int
    buckets: dict[str, Histogram]


class ModelState(Struct):
    """What is known of one tenant x model."""

    first_s: int
    completions: int = 0
    buckets: dict[str, Histogram] = {}
    whole: Histogram = {}
    tail: Tail | None = None
    waiting: list[Batch] = []
    rare: list[tuple[int, str, int]] = []
    """(second, bucket key, length bucket) of rare completions, not learned for a day."""


class Evidence(Struct):
    """A user's rare completions."""

    sum: float
    start_us: int
    last_us: int
    unpaid: int = 0
    """Completions whose cost is not taken off yet."""
    count: int = 0
    longest: int = 0
    tokens: int = 0
    suspected: int = 0
    """Rare completions whose guard score was above the configured one: the second signal."""
    cut: int = 0
    """How many of the last ones, in a row, were cut at their limit."""
    samples: list[Sample] = []
    offsets: dict[int, tuple[int, int]] = {}


def alarm_of(
    model: ModelState, evidence: Evidence, second: int, where: tuple[str, str, str], threshold: float
) -> Alarm:
    """A user's evidence has reached the threshold; `where` is tenant, model and user."""
    tenant, name, user = where
    edge = model.tail.edge if model.tail is not None else 0
    span_s = (evidence.last_us - evidence.start_us) // SECOND_US + 1
    cold = second - model.first_s < ADOPT_S
    second_signal = f"; guards suspected {evidence.suspected} of them" if evidence.suspected else ""
    return Alarm(
        tenant=tenant,
        entity=actor_entity(user),
        model=name,
        at_us=(second + 1) * SECOND_US,
        first_seen_us=evidence.start_us,
        last_seen_us=evidence.last_us + SECOND_US,
        severity="high" if evidence.suspected else "low" if cold else "medium",
        confidence="low" if cold else "high" if evidence.suspected else "medium",
        statistic=Statistic(
            name="rare completion lengths",
            observed=round(evidence.sum, 3),
            baseline=0.0,
            threshold=round(threshold, 3),
            unit="nats",
            improbability=round(EXPONENT * evidence.sum / math.log(10), 2),
        ),
        counts={
            "completions": evidence.count,
            "tokens": evidence.tokens,
            "longest_tokens": evidence.longest,
            "usual_p90_tokens": edge,
            "baseline_completions": total(model.whole),
            "guard_suspected": evidence.suspected,
            "cut_at_limit_in_a_row": evidence.cut,
        },
        summary=(
            f"User {user} got {evidence.count} completions of up to {evidence.longest} tokens in {span_s} s,"
            f" each rarer than 1 in 1,000; nine in ten of this model's are below {edge} tokens"
            f"{second_signal}"
        ),
        offsets=evidence.offsets,
        samples=evidence.samples,
        contributors=contributors({user: evidence.tokens}, "completion tokens", 1),
        cold_start="Less than a day of baseline: new kinds of honest work look unusual." if cold else "",
    )
