"""latency: a model answers much slower than it did, per tenant x model, told apart from heavier requests.

Method. Calls are put in strata of prompt size and answer length (powers of four), with log-bucket histograms of total
time, time to first token, queue and time per token. A window is compared with what its own mix of strata should have
taken
(direct standardisation; J. L. Fleiss, "Statistical Methods for Rates and Proportions", 1973): heavy prompts don't
look like a slow model, and strata never seen before are left out. A window is slow when its median, or with enough
calls its 95th percentile, is twice the expected one, 20 ms more, and beyond four robust deviations of past windows. An
alarm needs two adjoining slow windows, and the chance of so many calls above the expected 90th percentile in both at
most the budget per step (Chernoff; two calls weigh as one, since calls of a window share the load). Under AR(1) noise
of sd .12 a doubling is 5.8 standard deviations: the size of the effect decides, not the p-value. Windows slide by a
fifth.

Baseline: past steps, two windows late, none of a slow window; halved when full. A level that lasts a day is normal.

Cold start. Nothing in the first five windows. First day: no daily swing is known, so a daily load peak that doubles the
median is told. First week: no weekly swing.

Memory: a key holds at most 120 steps and 128 strata, about 300 KB when busy.
"""

import math
from typing import Final

import msgspec
import numpy as np
from msgspec import Struct

from detectors.chunk import Chunk, Groups, bits
from detectors.config import DetectConfig
from detectors.detector import Alarm, Card, Detector, StageOne, StageTwo, contributors
from detectors.finding import CONTRIBUTORS_MAX, Entity, Statistic
from detectors.histogram import quantile, upper_tail
from detectors.rollup import Cell, Partial, Signal, earliest, first, merge_offsets
from detectors.strata import STRATA_MAX, Step, Stratum, above, known, standardised, teach
from detectors.time import SECOND_US

NAME: Final = "latency"
METRICS: Final = ("total", "ttft", "queue", "per_token")
STEPS: Final = 5
"""Steps in a window."""
STEPS_MAX: Final = 60
"""Steps to which a window may grow while calls are few."""
HISTORY_MAX: Final = 120
HISTORY_MIN: Final = 5
SPREAD_FLOOR: Final = 0.02
WEEK_S: Final = 7 * 86_400


class LatencyOne(StageOne):
    """Sorts answered calls into strata. Whose prompts they were is told once a model, under the empty stratum."""

    def __init__(self, config: DetectConfig) -> None:
        self._users_max = config.contributors_max

    def events(self, chunk: Chunk) -> list[Partial | Signal]:
        columns = chunk.columns
        rows = np.flatnonzero(columns.ok)
        if not len(rows):
            return []
        step, kind = chunk.step[rows], columns.kind[rows]
        prompt, answer = bits(columns.prompt_tokens) // 2, bits(columns.response_tokens) // 2
        strata = Groups(rows, step, kind, prompt[rows], answer[rows])
        metrics = [
            strata.histograms(values * 1_000)
            for values in (columns.latency_ms, columns.ttft_ms, columns.queue_ms, columns.ms_per_output_token)
        ]
        shapes = zip(strata.firsts(prompt), strata.firsts(answer), strict=True)
        told: list[Partial | Signal] = []
        for number, (place, shape) in enumerate(zip(strata.places(chunk, NAME), shapes, strict=True)):
            histograms = {name: found[number] for name, found in zip(METRICS, metrics, strict=True) if found[number]}
            key = f"{place.model}\n{shape[0]}.{shape[1]}"
            told.append(place.partial(key, counts={"calls": place.size}, histograms=histograms))
        models = Groups(rows, step, kind)
        heaviest = models.heaviest(chunk, columns.prompt_tokens, self._users_max)
        for number, place in enumerate(models.places(chunk, NAME)):
            samples = chunk.samples(models.members(number))
            told.append(place.partial(f"{place.model}\n", weights={"prompt_tokens": heaviest[number]}, samples=samples))
        return told


class KeyState(Struct):
    """What is known of one tenant x model."""

    first_s: int
    baseline: dict[str, Stratum] = {}
    steps: list[Step] = []
    history: list[float] = []
    """ln(observed / expected median) of past windows that were not slow."""
    history_index: int = 0
    slow_since_s: int | None = None


class Judgement(Struct):
    """One window against what was expected of it, times in µs."""

    calls: int
    steps: list[Step]
    observed_us: float
    expected_us: float
    tail_ratio: float
    chance_ln: float

    @property
    def ratio(self) -> float:
        return self.observed_us / max(self.expected_us, 1.0)


class LatencyTwo(StageTwo):
    """Windows over merged seconds."""

    def __init__(self, config: DetectConfig) -> None:
        self._config = config.latency
        self._users_max = config.contributors_max
        self._step_s = max(1, self._config.window_s // STEPS)
        self._keys: dict[tuple[str, str], KeyState] = {}
        self._refused_keys = 0
        self._open: int | None = None
        """The step that seconds go into now; the same for all keys."""
        steps_a_week = WEEK_S / self._step_s
        self._chance_ln = math.log(self._config.budget_per_week / steps_a_week)

    @property
    def counters(self) -> dict[str, int]:
        return {"keys": len(self._keys), "refused_keys": self._refused_keys}

    def second(self, second: int, cells: list[tuple[str, str, Cell]]) -> list[Alarm]:
        self._open = second // self._step_s
        for tenant, key, cell in cells:
            model, _, stratum = key.partition("\n")
            state = self._keys.get((tenant, model))
            if state is None:
                if len(self._keys) >= self._config.keys_max:
                    self._refused_keys += 1
                    continue
                state = self._keys[tenant, model] = KeyState(first_s=second)
            self._add(state, stratum, cell)
        return []

    def _add(self, state: KeyState, stratum: str, cell: Cell) -> None:
        if self._open is None:
            return
        if not state.steps or state.steps[-1].index != self._open:
            state.steps.append(Step(self._open))
        step = state.steps[-1]
        if stratum:
            if stratum in step.strata or len(step.strata) < STRATA_MAX:
                step.strata.setdefault(stratum, Stratum()).absorb(cell)
            return
        for user, tokens in first(cell.weights["prompt_tokens"], self._users_max).items():
            step.prompt_tokens[user] = step.prompt_tokens.get(user, 0) + tokens
        step.samples = earliest([*step.samples, *cell.samples])
        merge_offsets(step.offsets, cell.offsets)

    def advance(self, until_s: int) -> list[Alarm]:
        """Judges the open step of every key once it is over."""
        if self._open is None or (self._open + 1) * self._step_s > until_s:
            return []
        alarms = []
        for (tenant, model), state in sorted(self._keys.items()):
            if state.steps and state.steps[-1].index == self._open:
                alarm = self._judge(state, tenant, model)
                alarms += [alarm] if alarm is not None else []
        self._open = None
        return alarms

    def _judge(self, state: KeyState, tenant: str, model: str) -> Alarm | None:
        index = state.steps[-1].index
        last_step = state.steps[-1]
        last_step.prompt_tokens = first(last_step.prompt_tokens, self._users_max)
        last = self._window(state, index)
        before = self._window(state, last.steps[0].index - 1) if last is not None else None
        alarm = None
        slow = last is not None and self._slow(state, last)
        if last is not None and slow:
            for step in last.steps:
                step.slow = True
            if state.slow_since_s is None:
                state.slow_since_s = index * self._step_s
            both = before is not None and self._slow(state, before)
            if before is not None and both and last.chance_ln + before.chance_ln <= self._chance_ln:
                alarm = self._alarm(state, (tenant, model), last, before)
        elif last is not None:
            state.slow_since_s = None
            if index >= state.history_index + STEPS:
                state.history = [*state.history, math.log(max(last.ratio, 1e-3))][-HISTORY_MAX:]
                state.history_index = index
        self._learn(state, index, STEPS if last is None else index - last.steps[0].index + 1)
        return alarm

    def _window(self, state: KeyState, end: int) -> Judgement | None:
        """The shortest window that ends with step `end` and has enough calls to judge; None where there is none."""
        steps: list[Step] = []
        calls = 0
        for step in reversed(state.steps):
            if step.index > end:
                continue
            if step.index <= end - STEPS_MAX or (calls >= self._config.min_calls and step.index <= end - STEPS):
                break
            steps.append(step)
            calls += sum(stratum.calls for key, stratum in step.strata.items() if known(state.baseline, key))
        if calls < self._config.min_calls:
            return None
        return self._compare(state, steps[::-1])

    def _compare(self, state: KeyState, steps: list[Step]) -> Judgement:
        observed, expected = standardised(state.baseline, steps, "total")
        calls = round(math.fsum(observed.values()))
        limit = quantile(expected, 0.9)
        share = above(expected, limit) / max(math.fsum(expected.values()), 1.0)
        weigh = self._config.design_effect
        chance_ln = upper_tail(above(observed, limit) / weigh, calls / weigh, share)
        tail = 0.0
        if calls >= self._config.tail_calls:
            tail = quantile(observed, 0.95) / max(quantile(expected, 0.95), 1.0)
        return Judgement(calls, steps, quantile(observed, 0.5), quantile(expected, 0.5), tail, chance_ln)

    def _slow(self, state: KeyState, window: Judgement) -> bool:
        if len(state.history) < HISTORY_MIN or window.chance_ln >= math.log(0.05):
            return False
        grown_us = window.observed_us - window.expected_us
        median = window.ratio >= self._needed(state) and grown_us >= self._config.increase_min_ms * 1_000
        return median or window.tail_ratio >= self._needed(state)

    def _needed(self, state: KeyState) -> float:
        """The growth that matters: the configured one, or what past windows make unusual."""
        ordered = sorted(state.history)
        middle = ordered[len(ordered) // 2]
        deviations = sorted(abs(value - middle) for value in ordered)
        spread = max(1.4826 * deviations[len(deviations) // 2], SPREAD_FLOOR)
        return max(self._config.ratio_min, math.exp(middle + self._config.spread_factor * spread))

    def _learn(self, state: KeyState, index: int, window_steps: int) -> None:
        """Steps two windows old enter the baseline unless they were slow; those too old for any window go."""
        lasted_s = 0 if state.slow_since_s is None else index * self._step_s - state.slow_since_s
        if lasted_s >= self._config.adopt_s:
            state.baseline, state.history, state.slow_since_s = {}, [], None
            for step in state.steps:
                step.slow = step.learned = False
        for step in state.steps:
            if step.index <= index - 2 * window_steps and not step.learned and not step.slow:
                step.learned = True
                for key, stratum in sorted(step.strata.items()):
                    if key in state.baseline or len(state.baseline) < STRATA_MAX:
                        teach(state.baseline.setdefault(key, Stratum()), stratum)
        while state.steps and state.steps[0].index <= index - 2 * STEPS_MAX:
            state.steps.pop(0)

    def _alarm(self, state: KeyState, where: tuple[str, str], last: Judgement, before: Judgement) -> Alarm:
        tenant, model = where
        steps = [*before.steps, *last.steps]
        tokens: dict[str, int] = {}
        offsets: dict[int, tuple[int, int]] = {}
        for step in steps:
            merge_offsets(offsets, step.offsets)
            for user, count in step.prompt_tokens.items():
                tokens[user] = tokens.get(user, 0) + count
        span_s = (last.steps[-1].index - before.steps[0].index + 1) * self._step_s
        end_s = (last.steps[-1].index + 1) * self._step_s
        part, part_ms, grown_ms = self._part(state, last.steps)
        per_token, usual_per_token = standardised(state.baseline, last.steps, "per_token")
        top = contributors(tokens, "prompt tokens", CONTRIBUTORS_MAX)
        share = 100 * top[0].amount // max(sum(tokens.values()), 1) if top else 0
        ratio = max(last.ratio, last.tail_ratio)
        age_s = end_s - state.first_s
        named = f"; {top[0].entity.id} sent {share} % of the prompt tokens" if top else ""
        return Alarm(
            tenant=tenant,
            entity=Entity(kind="model", id=model),
            model=model,
            at_us=end_s * SECOND_US,
            first_seen_us=before.steps[0].index * self._step_s * SECOND_US,
            last_seen_us=end_s * SECOND_US,
            severity="high" if ratio >= 2 * self._config.ratio_min else "medium",
            confidence="medium" if age_s < WEEK_S else "high",
            statistic=Statistic(
                name="median latency, standardised by prompt size and answer length",
                observed=round(last.observed_us / 1_000, 3),
                baseline=round(last.expected_us / 1_000, 3),
                threshold=round(last.expected_us * self._needed(state) / 1_000, 3),
                unit="ms",
                improbability=round(-(last.chance_ln + before.chance_ln) / math.log(10), 2),
            ),
            counts={
                "calls": last.calls + before.calls,
                "span_s": span_s,
                "users": len(tokens),
                "per_token_us": round(quantile(per_token, 0.5)),
                "usual_per_token_us": round(quantile(usual_per_token, 0.5)),
            },
            summary=(
                f"{model} took {last.observed_us / 1_000:.0f} ms at the median of {last.calls} calls,"
                f" {last.ratio:.1f} times the expected {last.expected_us / 1_000:.0f} ms, for {span_s} s;"
                f" {part} grew most, by {part_ms:.0f} of {grown_ms:.0f} ms{named}"
            ),
            offsets=offsets,
            samples=earliest(sample for step in steps for sample in step.samples),
            contributors=top,
            cold_start=_cold_start(age_s),
            peak_speaks=True,
        )

    def _part(self, state: KeyState, steps: list[Step]) -> tuple[str, float, float]:
        """Which part of the median call grew most, by how many ms, of how many in all."""
        grown: dict[str, float] = {}
        for metric in ("total", "ttft", "queue"):
            observed, expected = standardised(state.baseline, steps, metric)
            grown[metric] = (quantile(observed, 0.5) - quantile(expected, 0.5)) / 1_000
        parts = {
            "the queue": grown["queue"],
            "reading the prompt": grown["ttft"] - grown["queue"],
            "generation": grown["total"] - grown["ttft"],
        }
        name = max(sorted(parts), key=lambda part: parts[part])
        return name, parts[name], grown["total"]

    def snapshot(self) -> bytes:
        return _encoder.encode((list(self._keys.items()), self._refused_keys, self._open))

    def restore(self, raw: bytes) -> None:
        keys, self._refused_keys, self._open = _decoder.decode(raw)
        self._keys = dict(keys)


def _cold_start(age_s: int) -> str:
    if age_s < 86_400:
        return "Less than a day of baseline: the daily swing of load is not known yet."
    return "Less than a week of baseline: the weekly swing of load is not known yet." if age_s < WEEK_S else ""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[list[tuple[tuple[str, str], KeyState]], int, int | None])

DETECTOR: Final = Detector(
    card=Card(
        name=NAME,
        version="2",
        atlas=["AML.T0029", "AML.T0034.001"],
        owasp=["LLM10"],
        runbook=[
            "Which part grew? Queue: too much work at once; reading: long inputs; generation: model or host.",
            "Do the named users send most of the prompt tokens? Then limit them before scaling out.",
            "Did a model, adapter or engine version change just before, or does another tenant share the host?",
        ],
        key=["tenant", "model", "stratum"],
        window_s=600,
        lookback_s=86_400,
    ),
    reads=frozenset(
        {"ok", "prompt_tokens", "response_tokens", "latency_ms", "ttft_ms", "queue_ms", "ms_per_output_token"}
    ),
    enabled=lambda config: config.latency.enabled,
    stage_one=lambda config, _: LatencyOne(config),
    stage_two=LatencyTwo,
)
