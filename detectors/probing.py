"""probing: a session, or a user over sessions, tries variations of a prompt until one passes.

Method. A one-sided CUSUM of log-likelihood ratios on *distinct* prompts: how much likelier is this run of verdicts from
a client of whom a quarter is blocked than from this client as it was on days before today? A prompt that the user sent
before (equal digest, or MinHash similarity of at least .95) weighs nothing, so a retried or re-sent prompt is no
evidence. Evidence fades with a half-life of 24 h, so one an hour still adds up. Threshold 13.3: measured in simulation,
0.01 % of benign sessions. Sources: E. S. Page, Biometrika 41, 1954; A. Wald, "Sequential Analysis", 1947.

A session is told first; its user only when no session of his is told, that is, when he spreads it over sessions.
Without blocks there is no evidence: a guard that stops nothing lets this detector see nothing.

Cold start. First day: every client is compared with an assumed 2 %, which costs about five times the false alarms (a
red-team client, a cron job that is always blocked). First week: clients seen on few days are still close to that.

Memory: 21 bytes a user; 300 a user and session with evidence, and at most 16 prompts of 350 bytes such a user.
"""

import math
from collections import Counter
from itertools import pairwise
from typing import Final, NamedTuple, TypeAlias

import msgspec
import numpy as np
from msgspec import Struct

from collector.event import AuditEvent
from detectors.chunk import Chunk
from detectors.config import DetectConfig
from detectors.detector import Alarm, Card, Detector, StageOne, StageTwo, actor, actor_entity, contributors
from detectors.entities import Dump, EntityTable
from detectors.finding import Entity, Statistic
from detectors.prompts import Prompt, prompt_of, seen_before
from detectors.registry import Registry, Rows
from detectors.rollup import Partial, Sample, Signal, earliest
from detectors.time import SECOND_US

NAME: Final = "probing"
DAY_S: Final = 86_400
SESSION_TOLD_US: Final = 3_600 * SECOND_US
"""How long a told session keeps its user from being told for the same thing."""
COLD_START: Final = "Few prompts on earlier days: compared with an assumed block rate."
SUM_MAX: Final = 3.0
"""Most evidence kept, in thresholds: how long an episode can outlast its last block is bounded."""


class Taken(NamedTuple):
    """An event and its place."""

    moment_us: int
    event: AuditEvent
    offset: int


class Suspicion(Struct):
    """The evidence against a session or a user, since it was last zero."""

    sum: float = 0.0
    last_us: int = 0
    start_us: int = 0
    prompts: int = 0
    distinct: int = 0
    blocked: int = 0
    samples: list[Sample] = []
    first_offset: int = 0
    last_offset: int = 0


class Client(Struct):
    """The evidence against a user and his sessions; kept while there is any."""

    whole: Suspicion | None = None
    sessions: dict[str, Suspicion] = {}
    known: list[Prompt] = []
    session_told_us: int = 0


SESSIONS_MAX: Final = 32
"""Sessions under suspicion a user; beyond that the one with the least evidence is dropped: the user's own sum stays."""
UNDER_SUSPICION: Final = 1
BLOCKED_NOW: Final = 2
SUSPECTED_HALF_LIVES: Final = 8
"""How long a user who came under suspicion is among the last to be forgotten."""
KEY_BYTES: Final = 16
GAINS_MAX: Final = 4_096


class ProbingOne(StageOne):
    """All of it: a user's requests are all in one partition.

    Most users have no evidence against them: their prompts are only counted, in columns, all at once."""

    def __init__(self, config: DetectConfig, registry: Registry) -> None:
        self._config = config.probing
        self._registry = registry
        self._suspects: EntityTable[bytes, Client] = EntityTable(
            self._config.suspects_max, self._config.idle_s * SECOND_US
        )
        self._gains: dict[tuple[int, int], tuple[float, float]] = {}
        self._day = registry.column(f"{NAME}.day", np.uint32)
        self._past_prompts = registry.column(f"{NAME}.past_prompts", np.uint32)
        self._past_blocks = registry.column(f"{NAME}.past_blocks", np.uint32)
        self._prompts = registry.column(f"{NAME}.prompts", np.uint32)
        self._blocks = registry.column(f"{NAME}.blocks", np.uint32)
        self._flag = registry.column(f"{NAME}.flag", np.uint8)

    @property
    def counters(self) -> dict[str, int]:
        return self._suspects.counters | {"suspects": len(self._suspects)}

    def events(self, chunk: Chunk) -> list[Partial | Signal]:
        told: list[Partial | Signal] = []
        day = np.clip(chunk.second // DAY_S, 1, 2**32 - 1)
        for begin, end in pairwise([0, *(np.flatnonzero(np.diff(day)) + 1).tolist(), len(chunk)]):
            told += self._of_a_day(chunk, begin, end, int(day[begin]))
        return told

    def _of_a_day(self, chunk: Chunk, begin: int, end: int, day: int) -> list[Partial | Signal]:
        columns = chunk.columns
        rows = np.arange(begin, end)
        rows = rows[columns.judged[begin:end] & (chunk.entity[begin:end] >= 0)]
        entity = chunk.entity[rows]
        self._turn(entity, day)
        blocked = entity[columns.blocked[rows]]
        self._flag.values[blocked] |= BLOCKED_NOW
        closer = self._flag.values[entity] != 0
        self._flag.values[blocked] &= UNDER_SUSPICION
        np.add.at(self._prompts.values, entity[~closer], 1)
        rows, entity = rows[closer], entity[closer]
        keys = np.stack((columns.high[rows], columns.low[rows]), axis=1).tobytes()
        past = zip(self._past_prompts.values[entity].tolist(), self._past_blocks.values[entity].tolist(), strict=True)
        signals: dict[tuple[int, str, str], Signal] = {}
        prompts, blocks = Counter[int](), Counter[int]()
        for number, (row, who, before) in enumerate(zip(rows.tolist(), entity.tolist(), past, strict=True)):
            key = keys[KEY_BYTES * number : KEY_BYTES * (number + 1)]
            client = self._suspects.get(key)
            if client is None:
                if not columns.blocked[row]:
                    prompts[who] += 1
                    continue
                client = Client()
                self._flag.values[who] = UNDER_SUSPICION
                until_s = int(chunk.second[row]) + SUSPECTED_HALF_LIVES * self._config.half_life_s
                self._registry.suspect(who, until_s)
            taken = Taken(int(columns.moment_us[row]), chunk.event(row), int(columns.offset[row]))
            new, told = self._suspect(client, taken, before, chunk.partition)
            if new:
                prompts[who] += 1
                blocks[who] += taken.event.blocked
            if told is not None:
                signals[told.second, told.tenant, told.key] = told
            if client.whole is not None:
                self._suspects.put(key, taken.moment_us, client)
            else:
                self._suspects.drop(key)
                self._flag.values[who] = 0
        for counted, column in ((prompts, self._prompts), (blocks, self._blocks)):
            whose = np.fromiter(counted, np.int64, len(counted))
            column.values[whose] += np.fromiter(counted.values(), np.uint32, len(counted))
        return list(signals.values())

    def _turn(self, entity: Rows, day: int) -> None:
        """A new day for those who were last seen on another."""
        entity = np.unique(entity[self._day.values[entity] != day])
        self._past_prompts.values[entity] += self._prompts.values[entity]
        self._past_blocks.values[entity] += self._blocks.values[entity]
        self._prompts.values[entity] = self._blocks.values[entity] = 0
        self._day.values[entity] = day

    def _suspect(
        self, client: Client, taken: Taken, past: tuple[int, int], partition: int
    ) -> tuple[bool, Signal | None]:
        """Whether the prompt was a new one, and what is to be told."""
        event = taken.event
        prompt = prompt_of(event)
        new = not seen_before(prompt, client.known, self._config.same_prompt)
        if new:
            client.known = [*client.known, prompt][-self._config.prompts_max :]
        gain = self._gain(past, blocked=event.blocked) if new else 0.0
        client.whole = self._step(client.whole, taken, gain, new=new)
        if event.session_id:
            session = self._step(client.sessions.pop(event.session_id, None), taken, gain, new=new)
            if session is not None:
                client.sessions[event.session_id] = session
        if client.whole is None:
            client.known, client.sessions = [], {}
        elif len(client.sessions) > SESSIONS_MAX:
            del client.sessions[min(client.sessions, key=lambda name: (client.sessions[name].sum, name))]
        return new, self._tell(client, taken, past, partition) if new and event.blocked else None

    def _rate(self, prompts: int, blocks: int) -> float:
        """The client's own block rate on days before today, at least the assumed one."""
        config = self._config
        usual = (blocks + config.prior_rate * config.prior_prompts) / (prompts + config.prior_prompts)
        return max(config.prior_rate, usual)

    def _gain(self, past: tuple[int, int], *, blocked: bool) -> float:
        """What a distinct prompt weighs; the last answers are kept, since most clients have the same past: none."""
        gains = self._gains.get(past)
        if gains is None:
            usual = min(self._rate(*past), 0.9)
            attack = min(max(self._config.attack_rate, 2.5 * usual), 0.95)
            if len(self._gains) >= GAINS_MAX:
                self._gains.clear()
            gains = self._gains[past] = math.log((1 - attack) / (1 - usual)), math.log(attack / usual)
        return gains[blocked]

    def _step(self, suspicion: Suspicion | None, taken: Taken, gain: float, *, new: bool) -> Suspicion | None:
        """The evidence after this request; None when it is back to nothing."""
        event, moment_us = taken.event, taken.moment_us
        if suspicion is None:
            if gain <= 0:
                return None
            suspicion = Suspicion(last_us=moment_us, start_us=moment_us, first_offset=taken.offset)
        fade = 0.5 ** ((moment_us - suspicion.last_us) / (self._config.half_life_s * SECOND_US))
        suspicion.sum = min(suspicion.sum * fade + gain, SUM_MAX * self._config.threshold)
        if suspicion.sum <= 0:
            return None
        suspicion.last_us, suspicion.last_offset = moment_us, taken.offset
        suspicion.first_offset = min(suspicion.first_offset, taken.offset)
        suspicion.prompts += 1
        suspicion.distinct += new
        if event.blocked:
            suspicion.blocked += 1
            suspicion.samples = earliest([*suspicion.samples, (moment_us, event.event_id)])
        return suspicion

    def _tell(self, client: Client, taken: Taken, past: tuple[int, int], partition: int) -> Signal | None:
        threshold, event = self._config.threshold, taken.event
        session = client.sessions.get(event.session_id)
        if session is not None and session.sum >= threshold:
            client.session_told_us = taken.moment_us
            entity = Entity(kind="session", id=f"{actor(event)}/{event.session_id}")
            return self._signal(session, entity, event, past, partition)
        told = client.session_told_us and taken.moment_us - client.session_told_us <= SESSION_TOLD_US
        if not told and client.whole is not None and client.whole.sum >= threshold:
            return self._signal(client.whole, actor_entity(actor(event)), event, past, partition)
        return None

    def _signal(
        self, seen: Suspicion, entity: Entity, event: AuditEvent, past: tuple[int, int], partition: int
    ) -> Signal:
        return Signal(
            partition=partition,
            second=seen.last_us // SECOND_US,
            tenant=event.tenant,
            kind=NAME,
            key=f"{entity.kind}\n{entity.id}",
            entity=entity,
            model=event.model_version,
            first_seen_us=seen.start_us,
            last_seen_us=seen.last_us,
            observed_milli=round(seen.sum * 1_000),
            baseline_milli=0,
            counts={
                "prompts": seen.prompts,
                "distinct": seen.distinct,
                "blocks": seen.blocked,
                "own_rate_ppm": round(self._rate(*past) * 1e6),
                "past_prompts": past[0],
            },
            samples=list(seen.samples),
            first_offset=seen.first_offset,
            last_offset=seen.last_offset,
        )

    def snapshot(self) -> bytes:
        return _encoder.encode(self._suspects.dump())

    def restore(self, raw: bytes) -> None:
        self._suspects.load(_decoder.decode(raw))


class ProbingTwo(StageTwo):
    """Makes an alarm of each signal."""

    def __init__(self, config: DetectConfig) -> None:
        self._config = config.probing

    def signal(self, signal: Signal) -> list[Alarm]:
        counts, threshold = signal.counts, self._config.threshold
        evidence = signal.observed_milli / 1_000
        cold = counts["past_prompts"] < self._config.prior_prompts
        span_s = (signal.last_seen_us - signal.first_seen_us) // SECOND_US + 1
        who = "Session" if signal.entity.kind == "session" else "Client"
        user = signal.entity.id.partition("/")[0]
        usual = "an unknown client is assumed to have" if cold else "this client had before today"
        return [
            Alarm(
                tenant=signal.tenant,
                entity=signal.entity,
                model=signal.model,
                at_us=(signal.second + 1) * SECOND_US,
                first_seen_us=signal.first_seen_us,
                last_seen_us=signal.last_seen_us,
                severity="high" if evidence >= 1.5 * threshold else "medium",
                confidence="medium" if cold else "high",
                statistic=Statistic(
                    name="log-likelihood ratio of distinct prompts",
                    observed=evidence,
                    baseline=0.0,
                    threshold=threshold,
                    unit="nats",
                    improbability=round(evidence / math.log(10), 2),
                ),
                counts=counts,
                summary=(
                    f"{who} {signal.entity.id} sent {counts['distinct']} different prompts in {span_s} s, and guards"
                    f" blocked {counts['blocks']} requests; {usual} {counts['own_rate_ppm'] / 1e4:.1f} % blocked"
                ),
                offsets={signal.partition: (signal.first_offset, signal.last_offset)},
                samples=signal.samples,
                contributors=contributors({user: counts["blocks"]}, "blocked requests", 1),
                cold_start=COLD_START if cold else "",
            )
        ]


_encoder = msgspec.msgpack.Encoder()
_Clients: TypeAlias = Dump[bytes, Client]
_decoder = msgspec.msgpack.Decoder(_Clients)

DETECTOR: Final = Detector(
    card=Card(
        name=NAME,
        version="2",
        atlas=["AML.T0051.000", "AML.T0054", "AML.T0040"],
        owasp=["LLM01"],
        runbook=[
            "Did a prompt pass right after the blocked ones? Look at this session's answered requests first.",
            "Is it a red-team job, a test or a cron job of your own? Then acknowledge it; its past is learned.",
            "Look for the same prompt family from other users: one attacker may hold several accounts.",
        ],
        key=["tenant", "user", "session"],
        window_s=30 * 86_400,
        lookback_s=86_400,
    ),
    reads=frozenset({"judged", "blocked"}),
    enabled=lambda config: config.probing.enabled,
    stage_one=ProbingOne,
    stage_two=ProbingTwo,
)
