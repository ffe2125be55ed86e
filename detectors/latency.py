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

Beside it every window is compared with this key's own past by peaks over threshold (`detectors/spot.py`): hour of the
week, load, seven statistics sharing the budget. That finds a doubling that the noise hides from the rule above, smaller
changes, and calls that became faster. The finding says which part grew (queue, reading, generation), whether one user's
heavy requests or a load peak fits, and which statistic spoke.

Baseline: past steps, two windows late, none of a slow window; halved every two weeks. A level that lasts a day is
normal.

Replay. A key younger than four weeks is replayed to the byte; of an older one the baseline holds some of what is
further back, so figures may differ in their last digits.

Cold start. Nothing in the first five windows. First day: no daily swing is known, so a daily load peak that doubles the
median is told; nothing is judged against the past. First week: no weekly swing.

Memory: a key holds at most 120 steps with calls (twice `min_calls`, if that is more) and 128 strata, about 300 KB when
busy, and 12 KB of its past.
"""

import math
from typing import Final

import msgspec
import numpy as np

from detectors.chunk import Chunk, Groups, bits
from detectors.config import DetectConfig
from detectors.detector import Alarm, Card, Detector, StageOne, StageTwo
from detectors.entities import Room
from detectors.histogram import quantile, share_above, upper_tail
from detectors.latency_told import WEEK_S, Judgement, KeyState, slow_alarm, step_of, unusual_alarm
from detectors.rollup import Cell, Partial, Signal, earliest, first, merge_offsets
from detectors.spot import STATISTICS, Seen
from detectors.strata import STRATA_MAX, Step, Stratum, above, forget, known, standardised

NAME: Final = "latency"
METRICS: Final = ("total", "ttft", "queue", "per_token")
STEPS: Final = 5
"""Steps in a window."""
STEPS_MAX: Final = 300
"""Steps to which a window may grow while calls are few: an hour of steps of 12 s."""
STEPS_KEPT: Final = 120
"""Steps with calls that a key keeps, where `min_calls` asks for no more."""
HISTORY_MAX: Final = 120
HISTORY_MIN: Final = 5
SPREAD_FLOOR: Final = 0.02
MEMORY_STEPS: Final = 100_800
"""Steps with calls that a baseline remembers before it halves them: two weeks of steps of 12 s. Not calls, of which a
busy model has as many in minutes."""
PAST_S: Final = 86_400
"""Age from which a key's own past is judged by."""


class LatencyOne(StageOne):
    """Sorts calls into strata, those too that the client broke off, by what he had of the answer.

    Whose prompts they were is told once a model, under the empty stratum."""

    def __init__(self, config: DetectConfig) -> None:
        self._users_max = config.contributors_max

    def events(self, chunk: Chunk) -> list[Partial | Signal]:
        columns = chunk.columns
        rows = np.flatnonzero(columns.delivered)
        if not len(rows):
            return []
        step, kind = chunk.step[rows], columns.kind[rows]
        prompt, answer = bits(columns.prompt_tokens) // 2, bits(columns.response_tokens) // 2
        strata = Groups(rows, step, kind, prompt[rows], answer[rows])
        times = columns.latency_ms, columns.ttft_ms, columns.queue_ms, columns.ms_per_output_token
        metrics = strata.histograms(*times, factor=1_000)
        shapes = zip(strata.firsts(prompt), strata.firsts(answer), strict=True)
        told: list[Partial | Signal] = []
        for number, (place, shape) in enumerate(zip(strata.places(chunk, NAME), shapes, strict=True)):
            histograms = {name: found[number] for name, found in zip(METRICS, metrics, strict=True) if found[number]}
            key = f"{place.model}\n{shape[0]}.{shape[1]}"
            told.append(place.partial(key, counts={"calls": place.size}, histograms=histograms))
        models = Groups(rows, step, kind)
        heaviest = models.heaviest(chunk, columns.prompt_tokens, self._users_max)
        for number, place in enumerate(models.places(chunk, NAME)):
            samples = chunk.samples(models.first_members(number))
            told.append(place.partial(f"{place.model}\n", weights={"prompt_tokens": heaviest[number]}, samples=samples))
        return told


class LatencyTwo(StageTwo):
    """Windows over merged seconds."""

    def __init__(self, config: DetectConfig) -> None:
        self._config = config.latency
        self._users_max = config.contributors_max
        self._step_s = step_of(self._config)
        self._steps_kept = max(STEPS_KEPT, 2 * self._config.min_calls)
        """Two windows' calls need no more steps, however few there are in each."""
        self._keys: dict[tuple[str, str], KeyState] = {}
        self._room = Room[tuple[str, str], KeyState](self._seen_s)
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
                if len(self._keys) >= self._config.keys_max and not self._room.made(self._keys, second):
                    self._refused_keys += 1
                    continue
                state = self._keys[tenant, model] = KeyState(first_s=second)
            self._add(state, stratum, cell)
        return []

    def _seen_s(self, state: KeyState) -> int:
        return state.steps[-1].index * self._step_s if state.steps else state.first_s

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
            goes_on = any(step.slow for step in state.steps if step.index > index - 2 * STEPS_MAX)
            for step in last.steps:
                step.slow = True
            if state.slow_since_s is None or not goes_on:
                state.slow_since_s = index * self._step_s
            both = before is not None and self._slow(state, before)
            if before is not None and both and last.chance_ln + before.chance_ln <= self._chance_ln:
                needed = self._needed(state)
                alarm = slow_alarm(state, (tenant, model), (before, last), needed, self._config)
        elif last is not None:
            state.slow_since_s = None
            if index >= state.history_index + STEPS:
                state.history = [*state.history, math.log(max(last.ratio, 1e-3))][-HISTORY_MAX:]
                state.history_index = index
        unusual = self._judge_past(state, (tenant, model), index)
        alarm = unusual if alarm is None else alarm
        self._learn(state, index, STEPS if last is None else index - last.steps[0].index + 1, slow=slow)
        return alarm

    def _judge_past(self, state: KeyState, where: tuple[str, str], index: int) -> Alarm | None:
        """Against the key's own past, once a window; windows follow each other and take in what calls are due."""
        if index // STEPS == state.spot_index // STEPS and (index + 1) % STEPS:
            return None
        steps = [step for step in state.steps if step.index > max(state.spot_index, index - STEPS_MAX)]
        calls = sum(stratum.calls for step in steps for key, stratum in step.strata.items())
        if calls < self._config.min_calls and steps and index - steps[0].index < STEPS_MAX - 1:
            return None
        state.spot_index = index
        window = self._compare(state, steps)
        if window.calls < self._config.min_calls or not window.expected_us:
            return None
        minutes = max(steps[-1].index - steps[0].index + 1, STEPS) * self._step_s / 60
        seen = Seen(
            math.log(max(window.observed_us, 1.0) / max(window.expected_us, 1.0)),
            math.log(max(window.tail_ratio, 1e-3)) if window.tail_ratio else None,
            window.slow_share,
            index * self._step_s // 3_600 % 168,
            math.log1p(calls / minutes),
        )
        age_s = index * self._step_s - state.first_s
        square = state.spot.trusts_square(age_s)
        found = state.spot.judge(seen, math.log(self._config.ratio_min) / 2, square=square)
        if not found or age_s < PAST_S:
            return None
        windows_a_week = state.spot.windows * WEEK_S / age_s
        needed = math.log10(windows_a_week * len(STATISTICS) / self._config.budget_per_week)
        state.spot.note(age_s, needed)
        told = [name for name in sorted(found) if state.spot.tells(name, found[name], needed)]
        if not told:
            return None
        statistic = max(told, key=lambda name: found[name])
        told_of = (statistic, found[statistic], needed)
        return unusual_alarm(state, where, window, told_of, self._config)

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
        observed_us, expected_us = quantile(observed, 0.5), quantile(expected, 0.5)
        tail = slow_share = 0.0
        if calls >= self._config.tail_calls:
            high_us = quantile(expected, 0.95)
            tail = quantile(observed, 0.95) / max(high_us, 1.0)
            far_us = math.sqrt(self._config.ratio_min) * high_us
            slow_share = share_above(observed, observed_us * far_us / max(expected_us, 1.0))
        return Judgement(calls, steps, observed_us, expected_us, tail, slow_share, chance_ln)

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

    def _learn(self, state: KeyState, index: int, window_steps: int, *, slow: bool) -> None:
        """Steps two windows old enter the baseline unless they were slow; those too old for any window go.

        A level lasts as long as windows are slow: one before a silence is no level of days."""
        lasted_s = index * self._step_s - state.slow_since_s if slow and state.slow_since_s is not None else 0
        if lasted_s >= self._config.adopt_s:
            state.baseline, state.history, state.slow_since_s, state.learned_steps = {}, [], None, 0
            for step in state.steps:
                step.slow = step.learned = False
        too_many = len(state.steps) - self._steps_kept
        for number, step in enumerate(state.steps):
            due = step.index <= index - 2 * window_steps or number < too_many
            if due and not step.learned and not step.slow:
                step.learned = True
                for key, stratum in sorted(step.strata.items()):
                    if key in state.baseline or len(state.baseline) < STRATA_MAX:
                        state.baseline.setdefault(key, Stratum()).absorb(stratum)
                state.learned_steps += 1
                if state.learned_steps >= MEMORY_STEPS:
                    state.baseline = forget(state.baseline)
                    state.learned_steps >>= 1
        too_old = sum(step.index <= index - 2 * STEPS_MAX for step in state.steps)
        del state.steps[: max(too_old, too_many)]

    def snapshot(self) -> bytes:
        return _encoder.encode((list(self._keys.items()), self._refused_keys, self._open))

    def restore(self, raw: bytes) -> None:
        keys, self._refused_keys, self._open = _decoder.decode(raw)
        self._keys = dict(keys)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[list[tuple[tuple[str, str], KeyState]], int, int | None])

DETECTOR: Final = Detector(
    card=Card(
        name=NAME,
        version="9",
        atlas=["AML.T0029", "AML.T0034.001"],
        owasp=["LLM10"],
        runbook=[
            "Which part grew? Queue: too much work at once; reading: long inputs; generation: model or host.",
            "Do the named users send most of the prompt tokens? Then limit them before scaling out.",
            "Did a model, adapter or engine version change just before, or does another tenant share the host?",
        ],
        key=["tenant", "model", "stratum"],
        window_s=600,
        lookback_s=28 * 86_400,
    ),
    reads=frozenset(
        {"delivered", "prompt_tokens", "response_tokens", "latency_ms", "ttft_ms", "queue_ms", "ms_per_output_token"}
    ),
    enabled=lambda config: config.latency.enabled,
    stage_one=lambda config, _: LatencyOne(config),
    stage_two=LatencyTwo,
)
