"""probing: a session, or a user over sessions, tries variations of a prompt until one passes.

Method. Log-likelihood ratios of *distinct* prompts (`probing_evidence.py`): how much likelier is this run of verdicts
from a client of whom one in five is blocked than from this client as he was before the run began? A prompt sent before
(equal digest, or MinHash similarity of at least .95) weighs nothing, so a retried or re-sent prompt is no evidence. One
that rewords what was blocked within five minutes is compared with an assumed three in ten of honest people's rewordings
blocked: a misunderstood question that is asked three times more is hardly more than one block. A fourth rewording in a
row weighs as any other prompt. Evidence fades with a half-life of a day, so one an hour still adds up. What goes on for
20 h, or for 64 prompts, is learned as usual, and half of the evidence goes. A client who came close to the bar on
earlier days without being an attacker has a higher one. For who tries once a day there is a second statistic over
weeks, which learns nothing on the way and looks at one prompt an hour. In simulation it finds most of them who have an
honest past where guards block two attempts in three, few strangers, and hardly anybody where they block one in ten.

A session is told first; its user only when no session of his is told, that is, when he spreads it over sessions.
Without blocks there is no evidence: a guard that stops nothing lets this detector see nothing. Pace and guard scores
are not used, and what they would add was not measured.

Cold start. A stranger is compared with an assumed 2 %. While a tenant is new (three days) only five of its clients are
told, the first ones, on four nats more. The rest is counted as withheld, an attacker among them too. A red-team job
looks like an attack until 64 prompts of it were learned.

Memory: 41 bytes a user; 900 a user and 300 a session with evidence, and at most 17 prompts of 410 bytes such a user.
"""

from itertools import chain
from typing import Final, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from detectors.chunk import Chunk
from detectors.config import DetectConfig
from detectors.detector import Card, Detector, StageOne, actor, actor_entity
from detectors.entities import Dump, EntityTable
from detectors.finding import Entity
from detectors.probing_evidence import EVIDENCE_MAX, Client, Suspicion, Taken, gains, slow_stepped, stepped
from detectors.probing_told import NAME, Place, ProbingTwo, signal_of
from detectors.prompts import likeness, session_and_prompt
from detectors.registry import Registry, Rows
from detectors.rollup import Partial, Signal
from detectors.text import Text
from detectors.time import SECOND_US

LEARN_S: Final = 20 * 3_600
"""Evidence that goes on for so long is learned as the client's usual rate: less than a day, so that a daily job that is
blocked by right is told once, and long enough to find who tries once an hour."""
RECORD_KEPT: Final = 0.8
"""Of the difference to the newest, each time a client is learned."""
SESSION_TOLD_US: Final = 3_600 * SECOND_US
"""How long a told session keeps its user from being told for the same thing."""
SESSIONS_MAX: Final = 32
"""Sessions under suspicion a user; beyond that the one with the least evidence is dropped: the user's own sum stays."""
UNDER_SUSPICION: Final = 1
BLOCKED: Final = np.uint8(2)
"""Beside it, while a chunk is looked through."""
ONE: Final = np.uint32(1)
"""Of the column's own type: `np.add.at` takes many times as long with another."""
SUSPECTED_HALF_LIVES: Final = 8
"""How long a user who came under suspicion is among the last to be forgotten."""
KEY: Final = np.dtype("V16")
NOBODY: Final = "\n"
"""User and session of what is said of a tenant."""
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
        self._tenants: set[str] = set()
        self._sum_max = max(EVIDENCE_MAX, 2 * self._config.threshold)
        self._half_life_us = self._config.half_life_s * SECOND_US
        self._retry_us = self._config.retry_s * SECOND_US
        self._gains: dict[tuple[int, int], tuple[float, float, float, float]] = {}
        self._prompts = registry.column(f"{NAME}.prompts", np.uint32)
        self._blocks = registry.column(f"{NAME}.blocks", np.uint32)
        self._flag = registry.column(f"{NAME}.flag", np.uint8)
        self._awake_s = registry.column(f"{NAME}.awake_s", np.uint32)
        self._known_s = registry.column(f"{NAME}.known_s", np.uint32)
        self._usual = registry.column(f"{NAME}.usual", np.uint32, 4)
        self._record = registry.column(f"{NAME}.record", np.float32, 2)

    @property
    def counters(self) -> dict[str, int]:
        return self._suspects.counters | {"suspects": len(self._suspects)}

    def events(self, chunk: Chunk) -> list[Partial | Signal]:
        columns = chunk.columns
        rows = np.flatnonzero(columns.judged & (chunk.entity >= 0))
        entity, second = chunk.entity[rows], chunk.second[rows]
        strange = np.flatnonzero(self._known_s.values[entity] == 0)[::-1]
        self._known_s.values[entity[strange]] = np.clip(second[strange], 1, 2**32 - 1)
        closer = (self._flag.values[entity] != 0) & (second >= self._awake_s.values[entity])
        blocks = np.flatnonzero(columns.blocked[rows])
        if len(blocks):
            closer[self._since_block(entity, blocks)] = True
        np.add.at(self._prompts.values, entity[~closer], ONE)
        return [*self._new_tenants(chunk), *self._closer(chunk, rows[closer])]

    def _since_block(self, entity: Rows, blocks: Rows) -> Rows:
        """Where events are of clients blocked in this chunk, from the first block on: until then there is nothing
        against them. The few clients are marked for a moment, since looking each event up among them takes longer."""
        flag, whose = self._flag.values, entity[blocks]
        flag[whose] |= BLOCKED
        near = np.flatnonzero(flag[entity] & BLOCKED)
        flag[whose] &= ~BLOCKED
        who, firsts = np.unique(whose, return_index=True)
        return near[near >= blocks[firsts[np.searchsorted(who, entity[near])]]]

    def _new_tenants(self, chunk: Chunk) -> list[Partial]:
        """A mark at the first event of each tenant that this partition did not know."""
        kinds = chunk.columns.kinds
        if all(tenant in self._tenants for tenant, _ in kinds):
            return []
        found = []
        kind, rows = np.unique(chunk.columns.kind, return_index=True)
        for number in np.argsort(rows).tolist():
            tenant, row = kinds[kind[number]][0], int(rows[number])
            if tenant in self._tenants or len(self._tenants) >= self._config.tenants_max:
                continue
            self._tenants.add(tenant)
            offset = int(chunk.columns.offset[row])
            second = int(chunk.second[row])
            found.append(Partial(chunk.partition, second, tenant, NAME, NOBODY, {}, {}, {}, [], [], offset, offset))
        return found

    def _closer(self, chunk: Chunk, rows: Rows) -> list[Signal]:
        """Requests of users with evidence, and blocked ones, each in its turn."""
        if not len(rows):
            return []
        columns, entity = chunk.columns, chunk.entity[rows]
        keys = np.stack((columns.high[rows], columns.low[rows]), axis=1).view(KEY).ravel().tolist()
        whose = entity.tolist()
        prompts, blocks = self._prompts.values[entity].tolist(), self._blocks.values[entity].tolist()
        past = {who: (asked, stopped) for who, asked, stopped in zip(whose, prompts, blocks, strict=True)}
        """Prompts and blocks of each client so far."""
        signals: dict[tuple[int, str, str], Signal] = {}
        flags: dict[int, tuple[int, int]] = {}
        told_of = zip(
            rows.tolist(),
            whose,
            keys,
            chunk.second[rows].tolist(),
            columns.moment_us[rows].tolist(),
            columns.offset[rows].tolist(),
            columns.blocked[rows].tolist(),
            strict=True,
        )
        for row, who, key, second, moment_us, offset, blocked in told_of:
            client, counted = self._suspects.get(key), past[who]
            if not blocked and (client is None or second < client.awake_s):
                past[who] = counted[0] + 1, counted[1]
                continue
            if client is None:
                client = self._suspected(who, second)
            self._learn(client, second, counted)
            taken = self._taken(client, chunk, row, moment_us, offset, blocked=blocked)
            self._suspect(client, taken, counted)
            if taken.new and not taken.retry:
                past[who] = counted[0] + 1, counted[1] + blocked
            if taken.new and blocked:
                told = self._tell(client, taken, chunk.event(row), chunk.partition, int(self._known_s.values[who]))
                if told is not None:
                    signals[told.second, told.tenant, told.key] = told
            flags[who] = self._keep(client, key, who, moment_us)
        seen = np.fromiter(past, np.int64, len(past))
        self._prompts.values[seen], self._blocks.values[seen] = _columns(past)
        if flags:
            seen = np.fromiter(flags, np.int64, len(flags))
            self._flag.values[seen], self._awake_s.values[seen] = _columns(flags)
        return list(signals.values())

    def _suspected(self, who: int, now_s: int) -> Client:
        """A client against whom there was nothing, with what he is compared with."""
        self._registry.suspect(who, now_s + SUSPECTED_HALF_LIVES * self._config.half_life_s)
        prompts, blocks, usual_s, since = self._usual.values[who].tolist()
        record, peak = self._record.values[who].tolist()
        return Client(usual=(prompts, blocks), usual_s=usual_s, since=since, record=record, peak=peak)

    def _keep(self, client: Client, key: bytes, who: int, moment_us: int) -> tuple[int, int]:
        """In the table while there is evidence; else in columns. Returns his flag, and from when it counts."""
        if client.suspected:
            self._suspects.put(key, moment_us, client)
            return UNDER_SUSPICION, min(client.awake_s, 2**32 - 1)
        self._suspects.drop(key)
        self._usual.values[who] = (*client.usual, client.usual_s, client.since)
        self._record.values[who] = (client.record, client.peak)
        return 0, 0

    def _learn(self, client: Client, now_s: int, counted: tuple[int, int]) -> None:
        """What has gone on for long, or for many prompts, is usual. Half of the evidence stays: it was against a client
        as he was known before."""
        daily = now_s - client.usual_s >= LEARN_S
        if not daily and client.since < self._config.learn_prompts:
            return
        if daily:
            client.usual_s = now_s
            client.record = max(client.peak, client.peak + (client.record - client.peak) * RECORD_KEPT)
            client.peak = 0.0
        client.usual, client.since = counted, 0
        client.part()
        for suspicion in (client.whole, *client.sessions.values()):
            if suspicion is not None:
                suspicion.sum /= 2

    def _taken(self, client: Client, chunk: Chunk, row: int, moment_us: int, offset: int, *, blocked: bool) -> Taken:
        """The request against what is remembered of the client's prompts."""
        session, prompt = session_and_prompt(chunk.columns.raws[row])
        last, retry = client.last_blocked, False
        new = client.known.admit(prompt, self._config.prompts_max, self._config.same_prompt)
        if new:
            rewording = (
                last is not None
                and moment_us - client.last_blocked_us <= self._retry_us
                and likeness(prompt, last) >= self._config.like_prompt
            )
            client.retries = client.retries + 1 if rewording else 0
            retry = rewording and client.retries <= self._config.retries_max
        event_id = ""
        if blocked:
            client.last_blocked, client.last_blocked_us = prompt, moment_us
            event_id = chunk.event(row).event_id
        return Taken(moment_us, offset, event_id, session, blocked, new, retry)

    def _suspect(self, client: Client, taken: Taken, counted: tuple[int, int]) -> None:
        """The evidence after this request."""
        gain = self._gain(client.usual)[2 * taken.retry + taken.blocked] if taken.new else 0.0
        before, name = client.whole, taken.session
        apart = before is not None and client.sessions.get(name) is not before
        if apart:
            client.part()
        client.slow = slow_stepped(client.slow, taken, counted, self._config)
        client.whole = whole = stepped(before, taken, gain, self._half_life_us, self._sum_max)
        if whole is None:
            client.sessions = {}
            return
        client.since += taken.new
        client.peak = max(client.peak, whole.sum)
        if apart and name:
            self._suspect_session(client, taken, gain)
        elif before is None and name:
            client.sessions = {name: whole}

    def _suspect_session(self, client: Client, taken: Taken, gain: float) -> None:
        """The same of one of his sessions, where he has others."""
        sessions = client.sessions
        session = stepped(sessions.pop(taken.session, None), taken, gain, self._half_life_us, self._sum_max)
        if session is not None:
            sessions[taken.session] = session
        if len(sessions) > SESSIONS_MAX:
            del sessions[min(sessions, key=lambda name: (sessions[name].sum, name))]

    def _gain(self, usual: tuple[int, int]) -> tuple[float, float, float, float]:
        """The last answers are kept, since most clients have the same past: none."""
        found = self._gains.get(usual)
        if found is None:
            if len(self._gains) >= GAINS_MAX:
                self._gains.clear()
            found = self._gains[usual] = gains(self._config, usual)
        return found

    def _tell(self, client: Client, taken: Taken, event: Text, partition: int, known_s: int) -> Signal | None:
        """The session, else the user: what has most evidence over its bar."""
        raised = self._config.record_share * client.record
        session = client.sessions.get(event.session_id)
        extras: list[tuple[Suspicion | None, float]] = [
            (session, raised),
            (client.whole, raised),
            (client.slow, self._config.slow_extra),
        ]
        over = [(seen.sum - extra, extra, seen) for seen, extra in extras if seen is not None]
        most, extra, seen = max(over, key=lambda each: each[0])
        if most < self._config.threshold:
            return None
        entity, who = actor_entity(actor(event)), actor(event)
        if session is not None and session.sum >= self._config.threshold + raised:
            client.session_told_us = taken.moment_us
            entity, seen, extra = Entity(kind="session", id=f"{who}/{event.session_id}"), session, raised
        elif client.session_told_us and taken.moment_us - client.session_told_us <= SESSION_TOLD_US:
            return None
        place = Place(entity, event, partition, known_s)
        return signal_of(seen, client, self._config.threshold + extra, most, place, self._config)

    def snapshot(self) -> bytes:
        return _encoder.encode((self._suspects.dump(), sorted(self._tenants)))

    def restore(self, raw: bytes) -> None:
        dumped, tenants = _decoder.decode(raw)
        for _, _, client in dumped[0]:
            client.known.fit(self._config.same_prompt)
        self._suspects.load(dumped)
        self._tenants = set(tenants)


def _columns(pairs: dict[int, tuple[int, int]]) -> NDArray[np.uint32]:
    """The first ones of all pairs, and the second ones."""
    return np.fromiter(chain.from_iterable(pairs.values()), np.uint32, 2 * len(pairs)).reshape(-1, 2).T


_encoder: Final = msgspec.msgpack.Encoder()
_Dumped: TypeAlias = tuple[Dump[bytes, Client], list[str]]
_decoder: Final = msgspec.msgpack.Decoder(_Dumped)

DETECTOR: Final = Detector(
    card=Card(
        name=NAME,
        version="6",
        atlas=["AML.T0051.000", "AML.T0054", "AML.T0040"],
        owasp=["LLM01"],
        runbook=[
            "Did a prompt pass right after the blocked ones? Look at this session's answered requests first.",
            "Is it a red-team job, a test or a cron job of your own? Then acknowledge it; its past is learned.",
            "Look for the same prompt family from other users: one attacker may hold several accounts.",
        ],
        key=["tenant", "user", "session"],
        window_s=30 * 86_400,
        lookback_s=4 * 86_400,
    ),
    reads=frozenset({"judged", "blocked"}),
    enabled=lambda config: config.probing.enabled,
    stage_one=ProbingOne,
    stage_two=ProbingTwo,
)
