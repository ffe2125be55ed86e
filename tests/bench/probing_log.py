"""Simulated clients as a log of audit events, and that log through both stages: findings, and signals on the way."""

import base64
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from collector.event import AuditEvent, Goodbye, GuardResult, Hello, encode, from_timestamp_us
from detectors import rollup
from detectors.catalogue import detectors
from detectors.config import DetectConfig
from detectors.engine import PartitionEngine, TenantEngine
from detectors.finding import Finding
from detectors.rollup import Signal
from tests.bench.probing_clients import NOVEL, REWORDED, SAME, Client, Ints

START_S: Final = 1_800_000_000 - 1_800_000_000 % 86_400
SKETCHES: Final = 1 << 15
SEED_CHARACTERS: Final = 208
"""Of a rewording's sketch, taken from its seed: 39 of 64 slots, a similarity of .61."""
CHUNK: Final = 20_000
SECOND_US: Final = 1_000_000


@dataclass(frozen=True)
class Passed:
    """What came out of both stages."""

    findings: list[Finding]
    signals: list[Signal]
    events: int


def only_probing() -> dict[str, Any]:
    """Settings that switch every other detector off."""
    fields = DetectConfig.model_fields
    others = [each.card.name for each in detectors() if each.card.name in fields and each.card.name != "probing"]
    return {name: {"enabled": False} for name in others}


def user_of(number: int) -> str:
    """The pseudonym of client `number`."""
    return f"u_{hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()}"


def moments_us(client: Client) -> Ints:
    """When its events were closed, µs since the epoch."""
    return np.rint(client.at_s * SECOND_US).astype(np.int64) + START_S * SECOND_US


def passed(clients: Sequence[Client], numbers: Sequence[int], config: DetectConfig, *, told: bool = True) -> Passed:
    """All events of these clients, in order of time, through one partition; rollups pass through their wire form.
    Without `told`, signals only."""
    one = PartitionEngine(config, topic="iw.events", partition=0, partitions=1)
    two = TenantEngine(config, partition=0, partitions=1)
    findings: list[Finding] = []
    signals: list[Signal] = []
    events = 0
    for offset, raws, append_ms in _chunks(clients, numbers):
        events += len(raws)
        refused = one.observe_log(raws, append_ms, np.arange(offset, offset + len(raws)))
        if refused:
            raise ValueError(f"stage 1 refused {len(refused)} records: {refused[0][1]}")
        for each in one.take():
            sent = rollup.decode(rollup.encode(each))
            if isinstance(sent, Signal):
                signals.append(sent)
            if told:
                two.observe(sent)
        findings += two.take()
    return Passed(findings, signals, events)


def _chunks(clients: Sequence[Client], numbers: Sequence[int]) -> Iterator[tuple[int, list[bytes], Ints]]:
    """(first offset, raw records, append times in ms), a hello at the beginning and a goodbye an hour after the end."""
    moment = np.concatenate([moments_us(client) for client in clients])
    order = np.argsort(moment, kind="stable")
    moment = moment[order]
    columns = _Columns(clients, numbers, order)
    common: dict[str, Any] = {"schema_version": "1.0", "collector_id": "c", "boot": "b"}
    began_us, ended_us = int(moment[0]) - SECOND_US, int(moment[-1]) + 3_600 * SECOND_US
    hello = Hello(event_id="hello", timestamp=from_timestamp_us(began_us), seq=0, **common)
    yield 0, [encode(hello)], np.array([began_us // 1_000])
    for begin in range(0, len(moment), CHUNK):
        end = min(begin + CHUNK, len(moment))
        yield begin + 1, columns.raws(begin, end, moment[begin:end]), moment[begin:end] // 1_000
    last = Goodbye(event_id="goodbye", timestamp=from_timestamp_us(ended_us), seq=len(moment) + 1, **common)
    yield len(moment) + 1, [encode(last)], np.array([ended_us // 1_000])


class _Columns:
    """Numbers that each event's record is written from."""

    def __init__(self, clients: Sequence[Client], numbers: Sequence[int], order: Ints) -> None:
        sizes = [len(client.at_s) for client in clients]
        self.user = np.repeat(np.arange(len(clients)), sizes)[order]
        self.users = [user_of(number) for number in numbers]
        self.session = np.concatenate([client.sessions() for client in clients])[order]
        self.blocked = np.concatenate([client.blocked for client in clients])[order]
        starts = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
        prompt = np.concatenate([client.prompt for client in clients])
        place = np.arange(len(prompt))
        own = np.maximum.accumulate(np.where((prompt == NOVEL) | (prompt == REWORDED), place, starts))
        seed = np.maximum.accumulate(np.where(prompt == NOVEL, place, starts))
        self.text = np.where(prompt == SAME, own, place)[order]
        self.own, self.seed = own[order], seed[order]
        rng = random.Random(7)  # noqa: S311 seeded on purpose
        self.sketches = [base64.b64encode(rng.randbytes(256)).decode() for _ in range(SKETCHES)]
        self.parts = {blocked: _template(blocked=blocked) for blocked in (False, True)}

    def raws(self, begin: int, end: int, moment_us: Ints) -> list[bytes]:
        """The records of these events, by filling in a template that the event's own encoder made."""
        stamps = np.datetime_as_string(moment_us.astype("datetime64[us]")).tolist()
        found = []
        rows = zip(
            range(begin, end),
            stamps,
            self.user[begin:end].tolist(),
            self.session[begin:end].tolist(),
            self.blocked[begin:end].tolist(),
            self.text[begin:end].tolist(),
            ((self.own[begin:end] * 2_654_435_761) % SKETCHES).tolist(),
            ((self.seed[begin:end] * 2_654_435_761) % SKETCHES).tolist(),
            strict=True,
        )
        users, sketches, parts = self.users, self.sketches, self.parts
        for number, stamp, user, session, blocked, text, own, seed in rows:
            sketch = sketches[seed][:SEED_CHARACTERS] + sketches[own][SEED_CHARACTERS:]
            a, b, c, d, e, f, g = parts[blocked]
            who = f"{c}{number + 1}{d}{session}{e}{users[user]}{f}"
            found.append(f"{a}{number:08x}{b}{stamp}{who}{text}{g[0]}{sketch}{g[1]}".encode())
        return found


def _template(*, blocked: bool) -> tuple[str, str, str, str, str, str, tuple[str, str]]:
    """A record cut where the changing values go."""
    guard = GuardResult(guard="injection", version="1", stage="input", decision="block" if blocked else "allow")
    event = AuditEvent(
        schema_version="1.0",
        event_id="@0",
        timestamp=from_timestamp_us(0),
        collector_id="c",
        boot="b",
        seq=987_654_321,
        tenant="acme",
        session_id="s_@3",
        user_id="@4",
        prompt_hash="",
        turn_hash="hmac:@5",
        minhash="@6",
        model_version="tiny@0123abc",
        guardrail_results=[guard],
        response_tokens=0 if blocked else 100,
        latency_ms=900.0,
        blocked=blocked,
        status="blocked_input" if blocked else "ok",
    )
    text = encode(event).decode()
    text = text.replace(json.dumps("1970-01-01T00:00:00Z"), '"@1Z"').replace("987654321", "@2")
    pieces = []
    for mark in range(7):
        before, text = text.split(f"@{mark}", 1)
        pieces.append(before)
    a, b, c, d, e, f, g = pieces
    return a, b, c, d, e, f, (g, text)
