"""probing: a session, or a user over sessions, tries variations of a prompt until one passes.

Method. A one-sided CUSUM of log-likelihood ratios on *distinct* prompts: how much likelier is this run of verdicts from
a client of whom three in ten are blocked than from this client as it was before the run began? A prompt that the user
sent before (equal digest, or MinHash similarity of at least .95) weighs nothing, so a retried or re-sent prompt is no
evidence. Evidence fades with a half-life of 24 h, so one an hour still adds up; against a user also with one of ten
days, told from twice the bar, for who tries for weeks. A client with a long past may be blocked half as often again as
usual before it counts. What goes on for 20 h is learned as usual, and half of the evidence goes.
Threshold: 0.01 % of honest sessions in the simulation of `tests/bench/detection_probing.py`. Sources: E. S. Page,
Biometrika 41, 1954; A. Wald, "Sequential Analysis", 1947.

A session is told first; its user only when no session of his is told, that is, when he spreads it over sessions.
Without blocks there is no evidence: a guard that stops nothing lets this detector see nothing. Pace and guard scores
are not used: bursts of honest batch jobs are as even as those of attackers.

Cold start. A stranger is compared with an assumed 2 %, and needs up to 1.4 times the evidence; that falls with the
square of what is known of him, to a quarter at 50 prompts. A red-team job looks like an attack on its first day.

Memory: 9 bytes a user; 600 a user and 300 a session with evidence, and at most 16 prompts of 350 bytes such a user.
"""

import math
from collections import Counter
from typing import Final, NamedTuple, TypeAlias

import msgspec
import numpy as np
from msgspec import Struct

from collector.event import AuditEvent
from detectors.chunk import Chunk
from detectors.config import DetectConfig, ProbingConfig
from detectors.detector import Alarm, Card, Detector, StageOne, StageTwo, actor, actor_entity, contributors
from detectors.entities import Dump, EntityTable
from detectors.finding import Entity, Statistic
from detectors.prompts import Prompt, prompt_of, seen_before
from detectors.registry import Registry
from detectors.rollup import Partial, Sample, Signal, earliest
from detectors.time import SECOND_US

NAME: Final = "probing"
LEARN_US: Final = 20 * 3_600 * SECOND_US
"""Evidence that goes on for so long is learned as the client's usual rate: less than a day, so that a daily job that is
blocked by right is told once, and long enough to find who tries once an hour."""
SESSION_TOLD_US: Final = 3_600 * SECOND_US
"""How long a told session keeps its user from being told for the same thing."""
COLD_START: Final = "Few earlier prompts: compared with an assumed block rate, and told only on more evidence."
EVIDENCE_MAX: Final = 20.0
"""Most evidence kept, in nats, or `HIGH_BARS` of the highest bar: how long an
episode can outlast its last block is bounded."""


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
    slow: Suspicion | None = None
    """The same with the long half-life."""
    sessions: dict[str, Suspicion] = {}
    known: list[Prompt] = []
    session_told_us: int = 0
    usual: tuple[int, int] = (0, 0)
    """Prompts and blocks that the client is compared with: all before `usual_us`."""
    usual_us: int = 0
    """When the evidence began, or, where it goes on for long, was last learned."""


SESSIONS_MAX: Final = 32
"""Sessions under suspicion a user; beyond that the one with the least evidence is dropped: the user's own sum stays."""
UNDER_SUSPICION: Final = 1
BLOCKED_NOW: Final = 2
SUSPECTED_HALF_LIVES: Final = 8
"""How long a user who came under suspicion is among the last to be forgotten."""
KEY_BYTES: Final = 16
PSEUDONYM_SHOWN: Final = 14
"""Characters of a pseudonym in a summary: its prefix and twelve."""
HIGH_BARS: Final = 1.2
"""Severity is high from so many bars."""
GAINS_MAX: Final = 4_096
SWING_PROMPTS: Final = 200
"""Prompts from which a client's past is firm enough that honest work may exceed it."""


def bar_of(config: ProbingConfig, prompts: int) -> float:
    """The evidence that is told, of a client with so many prompts in his past: the fewer, the more of it, since some
    strangers are often blocked by right (a red-team job on its first day)."""
    strange = config.prior_prompts / (prompts + config.prior_prompts)
    return config.threshold * (1 + config.stranger_extra * strange**2)


class ProbingOne(StageOne):
    """All of it: a user's requests are all in one partition.

    Most users have no evidence against them: their prompts are only counted, in columns, all at once."""

    def __init__(self, config: DetectConfig, registry: Registry) -> None:
        self._config = config.probing
        self._registry = registry
        self._suspects: EntityTable[bytes, Client] = EntityTable(
            self._config.suspects_max, self._config.idle_s * SECOND_US
        )
        self._sum_max = max(EVIDENCE_MAX, HIGH_BARS * self._config.threshold * (1 + self._config.stranger_extra))
        self._gains: dict[tuple[int, int], tuple[float, float]] = {}
        self._prompts = registry.column(f"{NAME}.prompts", np.uint32)
        self._blocks = registry.column(f"{NAME}.blocks", np.uint32)
        self._flag = registry.column(f"{NAME}.flag", np.uint8)

    @property
    def counters(self) -> dict[str, int]:
        return self._suspects.counters | {"suspects": len(self._suspects)}

    def events(self, chunk: Chunk) -> list[Partial | Signal]:
        columns = chunk.columns
        rows = np.flatnonzero(columns.judged & (chunk.entity >= 0))
        entity = chunk.entity[rows]
        blocked = entity[columns.blocked[rows]]
        self._flag.values[blocked] |= BLOCKED_NOW
        closer = self._flag.values[entity] != 0
        self._flag.values[blocked] &= UNDER_SUSPICION
        np.add.at(self._prompts.values, entity[~closer], 1)
        rows, entity = rows[closer], entity[closer]
        keys = np.stack((columns.high[rows], columns.low[rows]), axis=1).tobytes()
        past = zip(self._prompts.values[entity].tolist(), self._blocks.values[entity].tolist(), strict=True)
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
            if taken.moment_us - client.usual_us >= LEARN_US:
                client.usual_us = taken.moment_us
                self._learn(client)
                client.usual = (before[0] + prompts[who], before[1] + blocks[who])
            new, told = self._suspect(client, taken, client.usual, chunk.partition)
            if new:
                prompts[who] += 1
                blocks[who] += taken.event.blocked
            if told is not None:
                signals[told.second, told.tenant, told.key] = told
            if client.whole is not None or client.slow is not None:
                self._suspects.put(key, taken.moment_us, client)
            else:
                self._suspects.drop(key)
                self._flag.values[who] = 0
        for counted, column in ((prompts, self._prompts), (blocks, self._blocks)):
            whose = np.fromiter(counted, np.int64, len(counted))
            column.values[whose] += np.fromiter(counted.values(), np.uint32, len(counted))
        return list(signals.values())

    def _learn(self, client: Client) -> None:
        """Half of the evidence stays: it was against a client as he was known before."""
        for suspicion in (client.whole, *client.sessions.values()):
            if suspicion is not None:
                suspicion.sum /= 2

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
        client.whole = self._step(client.whole, taken, gain, self._config.half_life_s, new=new)
        client.slow = self._step(client.slow, taken, gain, self._config.slow_half_life_s, new=new)
        if event.session_id:
            before = client.sessions.pop(event.session_id, None)
            session = self._step(before, taken, gain, self._config.half_life_s, new=new)
            if session is not None:
                client.sessions[event.session_id] = session
        if client.whole is None and client.slow is None:
            client.known, client.sessions = [], {}
        elif len(client.sessions) > SESSIONS_MAX:
            del client.sessions[min(client.sessions, key=lambda name: (client.sessions[name].sum, name))]
        return new, self._tell(client, taken, past, partition) if new and event.blocked else None

    def _rate(self, prompts: int, blocks: int) -> float:
        """The client's own block rate so far, drawn towards the assumed one."""
        config = self._config
        return (blocks + config.prior_rate * config.prior_prompts) / (prompts + config.prior_prompts)

    def _gain(self, past: tuple[int, int], *, blocked: bool) -> float:
        """What a distinct prompt weighs; the last answers are kept, since most clients have the same past: none."""
        gains = self._gains.get(past)
        if gains is None:
            known = past[0] / (past[0] + SWING_PROMPTS)
            usual = (1 + (self._config.swing - 1) * known) * self._rate(*past)
            usual = min(max(self._config.prior_rate, usual), 0.9)
            attack = min(max(self._config.attack_rate, 2.5 * usual), 0.95)
            if len(self._gains) >= GAINS_MAX:
                self._gains.clear()
            gains = self._gains[past] = math.log((1 - attack) / (1 - usual)), math.log(attack / usual)
        return gains[blocked]

    def _step(
        self, suspicion: Suspicion | None, taken: Taken, gain: float, half_life_s: int, *, new: bool
    ) -> Suspicion | None:
        """The evidence after this request; None when it is back to nothing."""
        event, moment_us = taken.event, taken.moment_us
        if suspicion is None:
            if gain <= 0:
                return None
            suspicion = Suspicion(last_us=moment_us, start_us=moment_us, first_offset=taken.offset)
        fade = 0.5 ** ((moment_us - suspicion.last_us) / (half_life_s * SECOND_US))
        suspicion.sum = min(suspicion.sum * fade + gain, self._sum_max)
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
        bar, event = bar_of(self._config, past[0]), taken.event
        session = client.sessions.get(event.session_id)
        if session is not None and session.sum >= bar:
            client.session_told_us = taken.moment_us
            entity = Entity(kind="session", id=f"{actor(event)}/{event.session_id}")
            return self._signal(session, bar, entity, event, past, partition)
        if client.session_told_us and taken.moment_us - client.session_told_us <= SESSION_TOLD_US:
            return None
        seen, least = client.whole, bar
        slow_bar = bar * self._config.slow_factor
        if client.slow is not None and (seen is None or client.slow.sum / slow_bar > seen.sum / bar):
            seen, least = client.slow, slow_bar
        if seen is None or seen.sum < least:
            return None
        return self._signal(seen, least, actor_entity(actor(event)), event, past, partition)

    def _signal(  # noqa: PLR0917  # one of each thing that a signal is made of
        self, seen: Suspicion, bar: float, entity: Entity, event: AuditEvent, past: tuple[int, int], partition: int
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
                "own_rate_ppm": round(max(self._rate(*past), self._config.prior_rate) * 1e6),
                "past_prompts": past[0],
                "bar_milli": round(bar * 1_000),
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
        counts = dict(signal.counts)
        threshold = counts.pop("bar_milli") / 1_000
        evidence = signal.observed_milli / 1_000
        cold = counts["past_prompts"] < self._config.prior_prompts
        span_s = (signal.last_seen_us - signal.first_seen_us) // SECOND_US + 1
        who = "Session" if signal.entity.kind == "session" else "Client"
        user = signal.entity.id.partition("/")[0]
        usual = "an unknown client is assumed to have" if cold else "this client had before"
        name = "/".join(part[:PSEUDONYM_SHOWN] for part in signal.entity.id.split("/"))
        return [
            Alarm(
                tenant=signal.tenant,
                entity=signal.entity,
                model=signal.model,
                at_us=(signal.second + 1) * SECOND_US,
                first_seen_us=signal.first_seen_us,
                last_seen_us=signal.last_seen_us,
                severity="high" if evidence >= HIGH_BARS * threshold else "medium",
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
                    f"{who} {name} sent {counts['distinct']} different prompts in {span_s} s, and guards"
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
        version="3",
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
