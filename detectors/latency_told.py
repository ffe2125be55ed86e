"""What `latency` keeps of a tenant x model, and the words and figures of its alarms."""

import math
from typing import Final

from msgspec import Struct, field

from detectors.config import LatencyConfig
from detectors.detector import Alarm, contributors
from detectors.finding import CONTRIBUTORS_MAX, Contributor, Entity, Statistic
from detectors.histogram import quantile
from detectors.rollup import Sample, earliest, merge_offsets
from detectors.spot import Spot
from detectors.strata import Step, Stratum, standardised
from detectors.time import SECOND_US

WEEK_S: Final = 7 * 86_400
HEAVY_SHARE: Final = 40
"""Percent of the prompt tokens from which one user is held to be the cause of a queue."""
PARTS: Final = {
    "day": "an unusual level for this hour of the day",
    "week": "an unusual level for this hour of the week",
    "mean12": "an unusual mean of 12 windows",
    "mean24": "an unusual mean of 24 windows",
    "jump": "a sudden rise of the median",
    "tail": "a sudden rise of the 95th percentile",
    "slowest": "a sudden rise in how many calls are slow beside the others",
}


class KeyState(Struct):
    """What is known of one tenant x model."""

    first_s: int
    baseline: dict[str, Stratum] = {}
    steps: list[Step] = []
    history: list[float] = []
    """ln(observed / expected median) of past windows that were not slow."""
    history_index: int = 0
    learned_steps: int = 0
    """Steps that `baseline` remembers."""
    slow_since_s: int | None = None
    spot: Spot = field(default_factory=Spot)
    spot_index: int = -1
    """The last step that a window of `spot` has taken in."""


class Judgement(Struct):
    """One window against what was expected of it, times in µs."""

    calls: int
    steps: list[Step]
    observed_us: float
    expected_us: float
    tail_ratio: float
    """Of the 95th percentiles; 0 where calls are too few for one."""
    slow_share: float
    """See `spot.Seen`."""
    chance_ln: float

    @property
    def ratio(self) -> float:
        return self.observed_us / max(self.expected_us, 1.0)


class Cause(Struct, frozen=True):
    """Where the time went, and whose requests these were."""

    part: str
    part_ms: float
    grown_ms: float
    top: list[Contributor]
    share: int
    """Percent of the prompt tokens that the first of `top` sent."""
    users: int
    offsets: dict[int, tuple[int, int]]
    samples: list[Sample]

    @property
    def reading(self) -> str:
        """Which of the usual causes it looks like."""
        if self.part == "generation":
            return "a slow model or host"
        if self.share >= HEAVY_SHARE:
            return "one user's heavy requests, perhaps meant to exhaust the model"
        return "a load peak of many users" if self.part == "the queue" else "longer inputs of many users"

    @property
    def named(self) -> str:
        """Who, in words, where anybody is known."""
        return f"; {self.top[0].entity.id} sent {self.share} % of the prompt tokens" if self.top else ""


def cause_of(baseline: dict[str, Stratum], steps: list[Step], last: list[Step]) -> Cause:
    """Of `steps` the users, of the `last` of them the part of the median call that grew most."""
    tokens: dict[str, int] = {}
    offsets: dict[int, tuple[int, int]] = {}
    for step in steps:
        merge_offsets(offsets, step.offsets)
        for user, count in step.prompt_tokens.items():
            tokens[user] = tokens.get(user, 0) + count
    grown: dict[str, float] = {}
    for metric in ("total", "ttft", "queue"):
        observed, expected = standardised(baseline, last, metric)
        grown[metric] = (quantile(observed, 0.5) - quantile(expected, 0.5)) / 1_000
    parts = {
        "the queue": grown["queue"],
        "reading the prompt": grown["ttft"] - grown["queue"],
        "generation": grown["total"] - grown["ttft"],
    }
    name = max(sorted(parts), key=lambda part: parts[part])
    top = contributors(tokens, "prompt tokens", CONTRIBUTORS_MAX)
    share = 100 * top[0].amount // max(sum(tokens.values()), 1) if top else 0
    samples = earliest(sample for step in steps for sample in step.samples)
    return Cause(name, parts[name], grown["total"], top, share, len(tokens), offsets, samples)


def slow_alarm(
    state: KeyState, where: tuple[str, str], windows: tuple[Judgement, Judgement], needed: float, config: LatencyConfig
) -> Alarm:
    """Two adjoining windows were slow, by size and by chance."""
    before, last = windows
    tenant, model = where
    step_s = step_of(config)
    steps = [*before.steps, *last.steps]
    cause = cause_of(state.baseline, steps, last.steps)
    span_s = (last.steps[-1].index - before.steps[0].index + 1) * step_s
    end_s = (last.steps[-1].index + 1) * step_s
    per_token, usual_per_token = standardised(state.baseline, last.steps, "per_token")
    age_s = end_s - state.first_s
    return Alarm(
        tenant=tenant,
        entity=Entity(kind="model", id=model),
        model=model,
        at_us=end_s * SECOND_US,
        first_seen_us=before.steps[0].index * step_s * SECOND_US,
        last_seen_us=end_s * SECOND_US,
        severity="high" if max(last.ratio, last.tail_ratio) >= 2 * config.ratio_min else "medium",
        confidence="medium" if age_s < WEEK_S else "high",
        statistic=Statistic(
            name="median latency, standardised by prompt size and answer length",
            observed=round(last.observed_us / 1_000, 3),
            baseline=round(last.expected_us / 1_000, 3),
            threshold=round(last.expected_us * needed / 1_000, 3),
            unit="ms",
            improbability=round(-(last.chance_ln + before.chance_ln) / math.log(10), 2),
        ),
        counts={
            "calls": last.calls + before.calls,
            "span_s": span_s,
            "users": cause.users,
            "per_token_us": round(quantile(per_token, 0.5)),
            "usual_per_token_us": round(quantile(usual_per_token, 0.5)),
        },
        summary=(
            f"{model} took {last.observed_us / 1_000:.0f} ms at the median of {last.calls} calls,"
            f" {last.ratio:.1f} times the expected {last.expected_us / 1_000:.0f} ms, for {span_s} s;"
            f" {cause.part} grew most, by {cause.part_ms:.0f} of {cause.grown_ms:.0f} ms{cause.named}:"
            f" it looks like {cause.reading}"
        ),
        offsets=cause.offsets,
        samples=cause.samples,
        contributors=cause.top,
        cold_start=cold_start(age_s),
        peak_speaks=True,
    )


def unusual_alarm(
    state: KeyState, where: tuple[str, str], window: Judgement, told: tuple[str, float, float], config: LatencyConfig
) -> Alarm:
    """A window that its own past makes improbable: `told` is the statistic, -log10 p, and what is needed."""
    statistic, found, needed = told
    tenant, model = where
    step_s = step_of(config)
    cause = cause_of(state.baseline, window.steps, window.steps)
    begin_s, end_s = window.steps[0].index * step_s, (window.steps[-1].index + 1) * step_s
    age_s = end_s - state.first_s
    return Alarm(
        tenant=tenant,
        entity=Entity(kind="model", id=model),
        model=model,
        at_us=end_s * SECOND_US,
        first_seen_us=begin_s * SECOND_US,
        last_seen_us=end_s * SECOND_US,
        severity="medium" if window.ratio >= config.ratio_min else "low",
        confidence="low" if age_s < WEEK_S else "medium",
        statistic=Statistic(
            name=f"peaks over threshold: {PARTS[statistic]}",
            observed=round(found, 3),
            baseline=0.0,
            threshold=round(needed, 3),
            unit="-log10 p",
            improbability=round(found, 2),
        ),
        counts={
            "calls": window.calls,
            "span_s": end_s - begin_s,
            "users": cause.users,
            "median_us": round(window.observed_us),
            "usual_median_us": round(window.expected_us),
        },
        summary=(
            f"{model} shows {PARTS[statistic]}: {window.observed_us / 1_000:.0f} ms at the median of {window.calls}"
            f" calls where {window.expected_us / 1_000:.0f} ms are usual; {cause.part} changed most{cause.named}:"
            f" it looks like {cause.reading}"
        ),
        offsets=cause.offsets,
        samples=cause.samples,
        contributors=cause.top,
        cold_start=cold_start(age_s),
        peak_speaks=True,
    )


def step_of(config: LatencyConfig) -> int:
    """Seconds of a step: a fifth of a window."""
    return max(1, config.window_s // 5)


def cold_start(age_s: int) -> str:
    """What a key so young can't know."""
    if age_s < 86_400:
        return "Less than a day of baseline: the daily swing of load is not known yet."
    return "Less than a week of baseline: the weekly swing of load is not known yet." if age_s < WEEK_S else ""
