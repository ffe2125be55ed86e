"""token_length: completions longer than their kind has been so far, by one user again and again.

Method. For each completion the chance p of one at least as long, given model, adapter, prompt size and max_tokens: the
bucket's own counts, shrunk to the model's (and adapter's) whole distribution, whose upper tenth is continued by an
exponential tail in ln(tokens) (a Pareto tail; peaks over threshold, J. Pickands, Annals of Statistics 3, 1975): counts
alone can't go below one in the bucket's size. What the client broke off counts with what he had of it. Two charts a
user (CUSUM, E. S. Page, Biometrika 41, 1954):
- *rare*: a completion rarer than 1 in 1,000 adds -ln(1000 p), at most 5, so that one freak is never enough; each
  completion costs .01. For exponential gains at that rate and cost it reaches h with a chance of exp(-.9 h), so
  h = ln(completions a week / 1000 / false alarms a week) / .9. Finds who draws long answers among many others.
- *run*: each completion adds -ln p, at most 6, and costs 1.25. Finds answers that are all longish, or all cut at their
  limit (finish_reason=length), none of them rare. Lengths within a conversation go together (Spearman .62), so theory
  is no guide: the threshold is put on peaks over 6 of the tenant's own users (`exceedances.py`).
They fade with half-lives of one and eight hours, and share the budget. On its own a finding is medium: length alone
finds two thirds of the attacks at a precision of .4 (prevalence .1 %). It is high with a second signal: guards scored
more of these completions above `signal_score` than chance allows (binomial, 1 in 100); or *peers*: several other users
of this model, adapter and prompt size had a rare completion within the hour, too many for chance (1 in 10,000 at
twice the expected rate). One user alone against calm peers is what every finding says already, and no second
signal; many at once are one cause: a shared extraction, or a rollout, which the finding then names.

Cold start. Nothing before 100 completions of the model and adapter. First half hour: the threshold of runs is mostly
assumed. First day: a new kind of honest work with long answers is told once, and learned a day later. Long only.

Memory: about 2 KB a bucket, 300 bytes a user with evidence, 40 KB a model and adapter.
"""

import math
from typing import Final

import msgspec
import numpy as np

from detectors.chunk import Chunk, Groups, bits
from detectors.columns import Ints
from detectors.config import DetectConfig
from detectors.detector import Alarm, Card, Detector, StageOne, StageTwo, actor
from detectors.entities import Dump, EntityTable, Room
from detectors.exceedances import Exceedances
from detectors.histogram import Histogram, at_least, bucket_of, halve, lower_edge, total
from detectors.registry import Registry, Rows
from detectors.rollup import Cell, Extreme, Partial, Signal, add_all, earliest, merge_offsets
from detectors.time import SECOND_US
from detectors.token_length_told import (
    ADOPT_S,
    EXPONENT,
    PEERS_S,
    RUN_EDGE,
    Batch,
    Evidence,
    ModelState,
    Tail,
    alarm_of,
)

NAME: Final = "token_length"
RARE: Final = 1e-3
GAIN_MAX: Final = 5.0
COST: Final = 0.01
RUN_GAIN_MAX: Final = 6.0
RUN_COST: Final = 1.25
RUN_MAX: Final = 60.0
"""Most that is kept, so that an episode ends soon after its last long completion."""
RUN_UNTOLD: Final = 0.75
"""What one costs that was not passed on, or was ordinary: 1.25 less the mean of -ln p where that is below 1.25."""
RUN_HALF_LIVES: Final = 8
"""How much slower a run fades: ordinary completions end it."""
RUN_BEGINS: Final = 2.25
"""-ln p of a completion that may begin a run: most users have none, and nothing is kept of them."""
RUN_PEAKS_A_WEEK: Final = 10_000
RUN_MEAN_MILLI: Final = 2_700
"""Of independent exponential gains at that cost: 1 / .37, which solves 1 / (1 - x) = exp(1.25 x)."""
RUN_PRIOR_WEEKS: Final = 0.003
RUN_SETTLE_S: Final = 900
LONGEST: Final = 4
"""Completions passed on a second and bucket."""
WEEK_S: Final = 7 * 86_400
COMPLETIONS_A_WEEK_MIN: Final = 10_000.0
BATCH_S: Final = 10
BASELINE_MAX: Final = 200_000
RARE_MAX: Final = 4_096
"""Rare completions that wait to be adopted, a model; beyond that the oldest is dropped."""
TAIL_PRIOR: Final = 0.5
TAIL_PRIOR_CALLS: Final = 5
TAIL_SCALE_MIN: Final = 0.2
"""The tail is taken to be at least this heavy: a Pareto exponent of five."""


class TokenLengthOne(StageOne):
    """Counts lengths. The longest of a second go along with whose they are, and with how many completions their users
    had since they were last told, which under the empty bucket: that is what evidence must be weighed against."""

    def __init__(self, registry: Registry) -> None:
        self._since = registry.column(f"{NAME}.since", np.uint32)

    def events(self, chunk: Chunk) -> list[Partial | Signal]:
        columns = chunk.columns
        rows = np.flatnonzero(columns.delivered & (columns.response_tokens > 0))
        if not len(rows):
            return []
        tokens = columns.response_tokens // columns.choices
        prompt, limit = bits(columns.prompt_tokens), bits(columns.max_tokens)
        cells = Groups(rows, chunk.step[rows], columns.kind[rows], columns.adapter[rows], prompt[rows], limit[rows])
        lengths, longest = cells.histograms(tokens)[0], cells.largest(tokens, LONGEST)
        adapters = [columns.adapters[each] for each in cells.firsts(columns.adapter)]
        buckets = zip(cells.firsts(prompt), cells.firsts(limit), adapters, strict=True)
        told: list[Partial | Signal] = []
        for number, (place, bucket) in enumerate(zip(cells.places(chunk, NAME), buckets, strict=True)):
            extremes = [_extreme(chunk, tokens, row) for row in longest[number]]
            key = f"{place.model}\n{bucket[0]}.{bucket[1]}.{bucket[2]}"
            counts = {"completions": place.size}
            told.append(place.partial(key, counts=counts, histograms={"tokens": lengths[number]}, extremes=extremes))
        return told + self._weights(chunk, rows, np.array(sorted(row for found in longest for row in found), np.int64))

    def _weights(self, chunk: Chunk, rows: Rows, told_rows: Rows) -> list[Partial | Signal]:
        """Completions of each user who is told, since the last time: his events up to the end of the second."""
        named = rows[chunk.entity[rows] >= 0]
        users = Groups(named, chunk.entity[named])
        mine = told_rows[chunk.entity[told_rows] >= 0]
        seconds = Groups(mine, chunk.entity[mine], chunk.step[mine])
        steps = int(chunk.step[-1]) + 1
        code = chunk.entity[users.rows] * steps + chunk.step[users.rows]
        shown = seconds.rows[seconds.starts]
        entity, whose = chunk.entity[shown], chunk.entity[users.rows[users.starts]]
        place = np.searchsorted(whose, entity)
        so_far = np.searchsorted(code, entity * steps + chunk.step[shown], side="right") - users.starts[place]
        since = self._since.values
        counts = so_far + since[entity]
        again = np.flatnonzero(entity[1:] == entity[:-1]) + 1
        counts[again] = so_far[again] - so_far[again - 1]
        since[whose] = np.minimum(since[whose] + users.sizes, 2**31)
        since[entity] = users.sizes[place] - so_far  # of a user told twice the last is written last, and stays
        due: dict[tuple[int, int], dict[str, int]] = {}
        columns = shown, chunk.second[shown], chunk.columns.kind[shown], counts
        for row, second, kind, count in zip(*(column.tolist() for column in columns), strict=True):
            due.setdefault((second, kind), {})[chunk.actor(row)] = count
        models = Groups(rows, chunk.step[rows], chunk.columns.kind[rows])
        kinds = models.firsts(chunk.columns.kind)
        return [
            place.partial(f"{place.model}\n", weights={"completions": dict(sorted(due[place.second, kind].items()))})
            for place, kind in zip(models.places(chunk, NAME), kinds, strict=True)
            if (place.second, kind) in due
        ]


def _extreme(chunk: Chunk, tokens: Ints, row: int) -> Extreme:
    event = chunk.event(row)
    score = max((each.score for each in event.guardrail_results if each.decision != "error"), default=0.0)
    cut = int(event.finish_reason == "length")
    moment_us = int(chunk.columns.moment_us[row])
    return int(tokens[row]), moment_us, actor(event), event.event_id, round(1_000 * score), cut


class TokenLengthTwo(StageTwo):
    """Judges the longest completions of each merged second."""

    def __init__(self, config: DetectConfig) -> None:
        self._config = config.token_length
        self._models: dict[str, ModelState] = {}
        self._room = Room[str, ModelState](lambda model: max(model.first_s, model.peers.slot * PEERS_S))
        self._users: EntityTable[str, Evidence] = EntityTable(
            self._config.users_max, 16 * self._config.half_life_s * SECOND_US
        )
        self._refused_keys = 0

    @property
    def counters(self) -> dict[str, int]:
        return self._users.counters | {
            "models": len(self._models),
            "buckets": sum(len(model.buckets) for model in self._models.values()),
            "users": len(self._users),
            "refused_keys": self._refused_keys,
        }

    def second(self, second: int, cells: list[tuple[str, str, Cell]]) -> list[Alarm]:
        alarms: dict[str, Alarm] = {}
        for tenant, key, cell in cells:
            name, _, bucket = key.partition("\n")
            if not bucket:
                self._weigh(f"{tenant}\n{name}", cell.weights["completions"])
                continue
            prompt, limit, adapter = bucket.split(".", 2)
            model = self._model(f"{tenant}\n{name}\n{adapter}", second)
            if model is None:
                continue
            self._settle(model, second)
            completions = cell.counts["completions"]
            model.completions += completions
            model.peers.add(second, prompt, completions)
            lengths = dict(cell.histograms["tokens"])
            for alarm in self._judge(model, second, (tenant, name, f"{prompt}.{limit}"), cell, lengths):
                alarms[alarm.entity.id] = alarm
            self._wait(model, second, f"{prompt}.{limit}", lengths)
        return [alarms[user] for user in sorted(alarms)]

    def _model(self, key: str, second: int) -> ModelState | None:
        model = self._models.get(key)
        if model is None:
            if len(self._models) >= self._config.keys_max and not self._room.made(self._models, second):
                self._refused_keys += 1
                return None
            runs = Exceedances(second, RUN_MEAN_MILLI, RUN_PEAKS_A_WEEK, RUN_PRIOR_WEEKS)
            model = self._models[key] = ModelState(first_s=second, runs=runs)
        return model

    def _judge(
        self, model: ModelState, second: int, where: tuple[str, str, str], cell: Cell, lengths: Histogram
    ) -> list[Alarm]:
        """Adds up evidence; takes rare completions out of `lengths`, so that they are not learned at once."""
        tenant, name, bucket_key = where
        told: dict[str, Evidence] = {}
        for tokens, moment_us, user, event_id, score_milli, cut in cell.extremes[:LONGEST]:
            chance = self._chance(model, bucket_key, tokens)
            suspected = score_milli > 1_000 * self._config.signal_score
            if model.tail is not None:
                model.scored += 1
                model.suspected += suspected
            gain = -math.log(chance)
            if gain <= RUN_COST:
                break
            if chance < RARE:
                bucket = bucket_of(tokens)
                lengths[bucket] -= 1
                model.rare = [*model.rare, (second, bucket_key, bucket)][-RARE_MAX:]
            evidence = self._evidence(f"{tenant}\n{name}\n{user}", second, gain) if user else None
            if evidence is None:
                continue
            told[user] = evidence
            evidence.longest = max(evidence.longest, tokens)
            evidence.tokens += tokens
            evidence.completions += 1
            evidence.suspected += suspected
            evidence.cut = evidence.cut + 1 if cut else 0
            evidence.samples = earliest([*evidence.samples, (moment_us, event_id)])
            evidence.offsets = dict(evidence.offsets)
            merge_offsets(evidence.offsets, cell.offsets)
            if chance < RARE:
                evidence.rare += 1
                evidence.sum += min(gain + math.log(RARE), GAIN_MAX)
                model.peers.rare(bucket_key.partition(".")[0], user)
        alarms = []
        bars = self._threshold(model, second), self._run_threshold(model, second)
        for user, evidence in told.items():
            if evidence.run > RUN_EDGE and (not evidence.peaked or user in model.runs.waiting):
                evidence.peaked = True
                model.runs.peak(user, second, round(1_000 * (evidence.run - RUN_EDGE)))
            if evidence.sum >= bars[0] or evidence.run >= bars[1]:
                alarms.append(alarm_of(model, evidence, second, (tenant, name, user), bars))
        return alarms

    def _weigh(self, model: str, completions: dict[str, int]) -> None:
        """Every completion costs, at the next one that is told: until then nothing could have come of it."""
        for user, count in completions.items():
            evidence = self._users.get(f"{model}\n{user}")
            if evidence is not None:
                evidence.unpaid += count

    def _evidence(self, name: str, second: int, gain: float) -> Evidence | None:
        """The user's charts after this completion; None where there is nothing to keep."""
        moment_us = second * SECOND_US
        evidence = self._users.get(name)
        if evidence is None or (evidence.sum <= 0 and evidence.run <= 0):
            if gain < RUN_BEGINS:
                return None
            evidence = Evidence(0.0, moment_us, moment_us)
        fade = 0.5 ** ((moment_us - evidence.last_us) / (self._config.half_life_s * SECOND_US))
        evidence.sum = max(evidence.sum * fade - COST * evidence.unpaid, 0.0)
        run = evidence.run * fade ** (1 / RUN_HALF_LIVES) - RUN_UNTOLD * max(evidence.unpaid - 1, 0)
        if run <= 0 and evidence.sum <= 0 and evidence.completions:
            evidence = Evidence(0.0, moment_us, moment_us)
        if run <= 0:
            evidence.peaked = False
        evidence.run = min(max(run, 0.0) + min(gain, RUN_GAIN_MAX) - RUN_COST, RUN_MAX)
        evidence.unpaid = 0
        evidence.last_us = moment_us
        self._users.put(name, moment_us, evidence)
        return evidence

    def _chance(self, model: ModelState, bucket_key: str, tokens: int) -> float:
        """P(a completion at least this long), 1 where too little is known."""
        tail = model.tail
        if tail is None:
            return 1.0
        if tokens > tail.edge:
            whole = tail.share * math.exp(-math.log(tokens / tail.edge) / tail.scale)
        else:
            whole = (at_least(model.whole, bucket_of(tokens)) + 0.5) / (total(model.whole) + 1)
        own = model.buckets.get(bucket_key, {})
        shrink = self._config.shrink_calls
        return (at_least(own, bucket_of(tokens)) + shrink * whole) / (total(own) + shrink)

    def _threshold(self, model: ModelState, second: int) -> float:
        often = RARE * self._a_week(model, second) / (self._config.budget_per_week / 2)
        return max(math.log(often) / EXPONENT, 2 * GAIN_MAX)

    def _a_week(self, model: ModelState, second: int) -> float:
        return max(model.completions / max(second - model.first_s + 1, 60) * WEEK_S, COMPLETIONS_A_WEEK_MIN)

    def _run_threshold(self, model: ModelState, second: int) -> float:
        return RUN_EDGE + model.runs.excess_bar_milli(second, self._run_budget(model, second)) / 1_000

    def _run_budget(self, model: ModelState, second: int) -> float:
        """What the other chart leaves: it has half, and with its least threshold often needs much less."""
        used = RARE * self._a_week(model, second) * math.exp(-EXPONENT * self._threshold(model, second))
        return self._config.budget_per_week - min(used, self._config.budget_per_week / 2)

    def _wait(self, model: ModelState, second: int, bucket_key: str, lengths: Histogram) -> None:
        index = second // BATCH_S
        if not model.waiting or model.waiting[-1].index != index:
            model.waiting.append(Batch(index, {}))
        add_all(model.waiting[-1].buckets.setdefault(bucket_key, {}), lengths)

    def _settle(self, model: ModelState, second: int) -> None:
        """What is old enough is learned, and the tail fitted anew."""
        model.runs.settle(second, RUN_SETTLE_S, self._run_budget(model, second))
        learned = False
        while model.waiting and (model.waiting[0].index + 1) * BATCH_S <= second - self._config.settle_s:
            for key, lengths in model.waiting.pop(0).buckets.items():
                self._learn(model, key, lengths)
                learned = True
        while model.rare and model.rare[0][0] <= second - ADOPT_S:
            _, key, bucket = model.rare.pop(0)
            self._learn(model, key, {bucket: 1})
            learned = True
        if learned:
            model.tail = self._fit(model.whole)

    def _learn(self, model: ModelState, key: str, lengths: Histogram) -> None:
        if key not in model.buckets and len(model.buckets) >= self._config.keys_max:
            self._refused_keys += 1
        else:
            add_all(model.buckets.setdefault(key, {}), lengths)
            if total(model.buckets[key]) > BASELINE_MAX:
                model.buckets[key] = halve(model.buckets[key])
        add_all(model.whole, lengths)
        if total(model.whole) > BASELINE_MAX:
            model.whole = halve(model.whole)

    def _fit(self, whole: Histogram) -> Tail | None:
        count = total(whole)
        if count < self._config.baseline_calls_min:
            return None
        above = 0
        edge_bucket = max(whole)
        for bucket in sorted(whole, reverse=True):
            if above + whole[bucket] > self._config.tail_share * count and above:
                break
            above += whole[bucket]
            edge_bucket = bucket
        edge = max(lower_edge(edge_bucket), 1)
        excess = math.fsum(
            n * math.log(lower_edge(bucket + 1) / edge) for bucket, n in sorted(whole.items()) if bucket >= edge_bucket
        )
        scale = (excess + TAIL_PRIOR * TAIL_PRIOR_CALLS) / (above + TAIL_PRIOR_CALLS)
        return Tail(edge, (above + 0.5) / (count + 1), max(scale, TAIL_SCALE_MIN))

    def snapshot(self) -> bytes:
        return _encoder.encode((self._models, self._users.dump(), self._refused_keys))

    def restore(self, raw: bytes) -> None:
        self._models, users, self._refused_keys = _decoder.decode(raw)
        self._users.load(users)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[dict[str, ModelState], Dump[str, Evidence], int])

DETECTOR: Final = Detector(
    card=Card(
        name=NAME,
        version="5",
        atlas=["AML.T0024.002", "AML.T0034.001", "AML.T0057"],
        owasp=["LLM10", "LLM02"],
        runbook=[
            "Does the user normally ask for long answers (reports, code)? Compare with the user's earlier days.",
            "Did an output guard score these answers, or did they end with finish_reason=length? Then look for a dump.",
            "Is the cost unusual too, and are other users sending the same prompt family?",
        ],
        key=["tenant", "model", "bucket"],
        window_s=16 * 3_600,
        lookback_s=3_600,
    ),
    reads=frozenset({"delivered", "prompt_tokens", "response_tokens", "max_tokens", "choices", "adapter"}),
    enabled=lambda config: config.token_length.enabled,
    stage_one=lambda _, registry: TokenLengthOne(registry),
    stage_two=TokenLengthTwo,
)
