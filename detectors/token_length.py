"""token_length: completions longer than their kind has been so far, by one user again and again.

Method. For each completion the chance p of one at least as long, given model, prompt size and max_tokens: the bucket's
own counts, shrunk to the model's whole distribution, whose upper tenth is continued by an exponential tail in
ln(tokens) (a Pareto tail; peaks over threshold, J. Pickands, Annals of Statistics 3, 1975): counts alone can't go below
one in the bucket's size. A completion rarer than 1 in 1,000 is evidence of -ln(1000 p), at most 5, so that one freak is
never enough; each completion of the user costs .01, and evidence halves in an hour. For exponential gains at that rate
and cost a CUSUM reaches h with a chance of exp(-.9 h), so h = ln(completions a week / 1000 / false alarms a week) / .9.
Lengths within a conversation go together (Spearman .62), so p-values are capped, not multiplied out. The finding is
never more than medium on its own: length alone finds half of the attacks at a precision of .6 (prevalence .1 %). It is
high where a guard scored one of the rare completions above `signal_score`: the second signal, told by stage 1 with the
longest. How many of the last ones in a row were cut at their limit (finish_reason=length) is told too.

Cold start. Nothing before 100 completions of the model. First day: a new kind of honest work with long answers is told
once, and learned a day later. Long only; many users with one long completion each are not seen.

Memory: about 2 KB a bucket, 200 bytes a user with evidence.
"""

import math
from typing import Final

import msgspec
import numpy as np

from detectors.chunk import Chunk, Groups, bits
from detectors.columns import Ints
from detectors.config import DetectConfig
from detectors.detector import Alarm, Card, Detector, StageOne, StageTwo, actor
from detectors.entities import Dump, EntityTable
from detectors.histogram import Histogram, at_least, bucket_of, halve, lower_edge, total
from detectors.registry import Registry, Rows
from detectors.rollup import EXTREMES_MAX, Cell, Extreme, Partial, Signal, add_all, earliest, merge_offsets
from detectors.time import SECOND_US
from detectors.token_length_told import ADOPT_S, EXPONENT, Batch, Evidence, ModelState, Tail, alarm_of

NAME: Final = "token_length"
RARE: Final = 1e-3
GAIN_MAX: Final = 5.0
COST: Final = 0.01
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
        rows = np.flatnonzero(columns.ok & (columns.response_tokens > 0))
        if not len(rows):
            return []
        tokens = columns.response_tokens // columns.choices
        prompt, limit = bits(columns.prompt_tokens) // 2, bits(columns.max_tokens)
        cells = Groups(rows, chunk.step[rows], columns.kind[rows], prompt[rows], limit[rows])
        lengths, longest = cells.histograms(tokens), cells.largest(tokens, EXTREMES_MAX)
        buckets = zip(cells.firsts(prompt), cells.firsts(limit), strict=True)
        told: list[Partial | Signal] = []
        for number, (place, bucket) in enumerate(zip(cells.places(chunk, NAME), buckets, strict=True)):
            extremes = [_extreme(chunk, tokens, row) for row in longest[number]]
            key = f"{place.model}\n{bucket[0]}.{bucket[1]}"
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
        begin = dict(zip(users.firsts(chunk.entity), users.starts.tolist(), strict=True))
        since = self._since.values
        due: dict[tuple[int, int], dict[str, int]] = {}
        counted: dict[int, int] = {}
        for row in seconds.firsts(np.arange(len(chunk))):
            entity, second = int(chunk.entity[row]), int(chunk.second[row])
            end = int(np.searchsorted(code, entity * steps + chunk.step[row], side="right"))
            so_far = end - begin[entity]
            count = so_far - counted[entity] if entity in counted else so_far + int(since[entity])
            counted[entity] = so_far
            weights = due.setdefault((second, int(chunk.columns.kind[row])), {})
            weights[chunk.actor(row)] = count
        sizes = dict(zip(begin, users.sizes.tolist(), strict=True))
        entities = np.fromiter(begin, np.int64, len(begin))
        totals = np.fromiter(sizes.values(), np.int64, len(sizes))
        since[entities] = np.minimum(since[entities] + totals, 2**31)
        for entity, so_far in counted.items():
            since[entity] = sizes[entity] - so_far
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
            name, _, bucket_key = key.partition("\n")
            model = self._models.get(f"{tenant}\n{name}")
            if model is None:
                if len(self._models) >= self._config.keys_max:
                    self._refused_keys += 1
                    continue
                model = self._models[f"{tenant}\n{name}"] = ModelState(first_s=second)
            if not bucket_key:
                self._weigh(f"{tenant}\n{name}", cell.weights["completions"])
                continue
            self._settle(model, second)
            model.completions += cell.counts["completions"]
            lengths = dict(cell.histograms["tokens"])
            for alarm in self._judge(model, second, (tenant, name, bucket_key), cell, lengths):
                alarms[alarm.entity.id] = alarm
            self._wait(model, second, bucket_key, lengths)
        return [alarms[user] for user in sorted(alarms)]

    def _judge(
        self, model: ModelState, second: int, where: tuple[str, str, str], cell: Cell, lengths: Histogram
    ) -> list[Alarm]:
        """Adds up evidence; takes rare completions out of `lengths`, so that they are not learned at once."""
        tenant, name, bucket_key = where
        alarms = []
        told: dict[str, Evidence] = {}
        for tokens, _, user, event_id, score_milli, cut in cell.extremes:
            chance = self._chance(model, bucket_key, tokens)
            if chance >= RARE:
                break
            bucket = bucket_of(tokens)
            lengths[bucket] -= 1
            model.rare = [*model.rare, (second, bucket_key, bucket)][-RARE_MAX:]
            if user:
                gain = min(-math.log(chance / RARE), GAIN_MAX)
                told[user] = self._add(f"{tenant}\n{name}\n{user}", second, (gain, tokens, event_id), cell)
                told[user].suspected += score_milli > 1_000 * self._config.signal_score
                told[user].cut = told[user].cut + 1 if cut else 0
        threshold = self._threshold(model, second)
        for user, evidence in told.items():
            if evidence.sum >= threshold:
                alarms.append(alarm_of(model, evidence, second, (tenant, name, user), threshold))
        return alarms

    def _weigh(self, model: str, completions: dict[str, int]) -> None:
        """Every completion costs, at the next rare one: until then nothing could have come of it."""
        for user, count in completions.items():
            evidence = self._users.get(f"{model}\n{user}")
            if evidence is not None:
                evidence.unpaid += count

    def _add(self, name: str, second: int, rare: tuple[float, int, str], cell: Cell) -> Evidence:
        gain, tokens, event_id = rare
        moment_us = second * SECOND_US
        past = self._users.get(name)
        evidence = past if past is not None and past.sum > 0 else Evidence(0.0, moment_us, moment_us)
        evidence.sum *= 0.5 ** ((moment_us - evidence.last_us) / (self._config.half_life_s * SECOND_US))
        evidence.sum = max(evidence.sum - COST * evidence.unpaid, 0.0) + gain
        evidence.unpaid = 0
        evidence.last_us = moment_us
        evidence.count += 1
        evidence.tokens += tokens
        evidence.longest = max(evidence.longest, tokens)
        evidence.samples = earliest([*evidence.samples, (moment_us, event_id)])
        evidence.offsets = dict(evidence.offsets)
        merge_offsets(evidence.offsets, cell.offsets)
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
        a_week = max(model.completions / max(second - model.first_s + 1, 60) * WEEK_S, COMPLETIONS_A_WEEK_MIN)
        return max(math.log(RARE * a_week / self._config.budget_per_week) / EXPONENT, 2 * GAIN_MAX)

    def _wait(self, model: ModelState, second: int, bucket_key: str, lengths: Histogram) -> None:
        index = second // BATCH_S
        if not model.waiting or model.waiting[-1].index != index:
            model.waiting.append(Batch(index, {}))
        add_all(model.waiting[-1].buckets.setdefault(bucket_key, {}), lengths)

    def _settle(self, model: ModelState, second: int) -> None:
        """What is old enough is learned, and the tail fitted anew."""
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
        version="3",
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
    reads=frozenset({"ok", "prompt_tokens", "response_tokens", "max_tokens", "choices"}),
    enabled=lambda config: config.token_length.enabled,
    stage_one=lambda _, registry: TokenLengthOne(registry),
    stage_two=TokenLengthTwo,
)
