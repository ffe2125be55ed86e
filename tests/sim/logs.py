"""Short logs for the simulator, with what must be true of any answer to them: by construction, not by our engines.

Some hundred records each: a calm stretch, blocked prompts of many users, one session that probes. Collectors come and
go, publishers send again what they sent, one collector may come so late that its events must not count, and the
broker may have been away.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from collector.event import AnyRecord, AuditEvent, Goodbye, Hello, encode, timestamp_us
from detectors.config import DetectConfig, LatencyConfig, LifecycleConfig, ProbingConfig, TimeConfig
from tests.sim.layout import Layout, Logged, lay_out
from tests.sim.traffic import START_US, Traffic

CONFIG = DetectConfig(
    time=TimeConfig(gap_max_ms=1_000, silence_max_ms=8_000, tick_lag_ms=5_000),
    lifecycle=LifecycleConfig(quiet_s=4, update_s=2),
    latency=LatencyConfig(window_s=5, min_calls=10),
    probing=ProbingConfig(threshold=3.0, cold_extra=0, cold_clients_max=100),
)
"""Thresholds so low that a short log has findings that open, change and close."""
LATE_EVENTS = 2


class Record(NamedTuple):
    """One record of a model log; what a stage reads of a `ConsumerRecord`."""

    partition: int
    offset: int
    timestamp: int
    value: bytes
    key: bytes = b""
    topic: str = ""


@dataclass(frozen=True)
class Shape:
    """What a log looks like. The same `traffic` in any other shape holds the same events."""

    traffic: int
    partitions: int = 4
    collectors: int = 2
    leaving: bool = True
    """Another collector serves some of the first half, and says goodbye."""
    resent: bool = True
    outage: bool = False
    late: bool = False
    rate: float = 3.0
    """Requests a second."""


@dataclass(frozen=True)
class Log:
    """The partitions of iw.events, and the truth about them."""

    shape: Shape
    partitions: tuple[tuple[Record, ...], ...]
    prompt_tokens: Counter[str]
    """Of each user's answered requests, late ones left out."""
    blocked: Counter[str]
    """Requests of each user that a guard blocked."""
    late: int
    resent: int


@lru_cache(maxsize=64)
def events_of(traffic: int, rate: float) -> tuple[AuditEvent, ...]:
    """Thirteen seconds of made-up requests."""
    made = Traffic(traffic, rate=rate, users=12)
    made.calm(0, 13)
    made.block_burst(5, 3, prompts=24, users=12)
    made.probe(8, 2, prompts=8)
    return tuple(sorted(made.events, key=lambda event: event.timestamp))


@lru_cache(maxsize=64)
def short_log(shape: Shape) -> Log:
    """The log of that shape."""
    chance = random.Random(repr(shape))  # noqa: S311  # repeatable, no secret
    events = events_of(shape.traffic, shape.rate)
    middle_us = START_US + 7_000_000
    early = [e for e in events if shape.leaving and timestamp_us(e.timestamp) < middle_us and chance.random() < 0.3]
    stay = [event for event in events if event not in early]
    layout = Layout(
        shape.partitions, shape.collectors, 1_000, (4, 22) if shape.outage else None, idle_s=10, seed=shape.traffic
    )
    logs = lay_out(stay, layout)
    if early:
        visitor = msgspec.structs.replace
        short = Layout(shape.partitions, 1, 1_000, layout.outage_s, drain=(12,), idle_s=0, seed=shape.traffic + 1)
        for log, lane in zip(logs, lay_out(early, short), strict=True):
            log += [
                Logged(visitor(each.record, collector_id="visitor", boot="b1"), each.append_ms, 0)
                for each in lane
                if each.record.collector_id == "c0"
            ]
    if shape.late:
        _come_late(logs[0], events)
    resent = 0
    for log in logs:
        log.sort(key=lambda logged: logged.append_ms)
        if shape.resent:
            resent += _send_again(log, chance)
    tokens: Counter[str] = Counter()
    for event in events:
        tokens[event.user_id] += event.prompt_tokens if event.status == "ok" else 0
    return Log(
        shape,
        tuple(tuple(_records(partition, log)) for partition, log in enumerate(logs)),
        +tokens,
        Counter(event.user_id for event in events if event.blocked),
        LATE_EVENTS if shape.late else 0,
        resent,
    )


def _come_late(log: list[Logged], events: Sequence[AuditEvent]) -> None:
    """A collector whose clock is right but which was cut off: it tells of seconds that are long closed."""
    at_ms = START_US // 1000 + 11_000
    sample = next(event for event in events if event.status == "ok")
    common: dict[str, Any] = {"collector_id": "cut off", "boot": "b2"}
    lane: list[AnyRecord] = [
        Hello(schema_version="1.0", event_id="late-0", timestamp=sample.timestamp, seq=0, **common),
        *(
            msgspec.structs.replace(sample, event_id=f"late-{seq}", seq=seq, **common)
            for seq in range(1, LATE_EVENTS + 1)
        ),
        Goodbye(schema_version="1.0", event_id="late-9", timestamp=sample.timestamp, seq=LATE_EVENTS + 1, **common),
    ]
    log += [Logged(record, at_ms, 0) for record in lane]


def _send_again(log: list[Logged], chance: random.Random) -> int:
    """Some records of a lane once more, a moment later, as after a lost acknowledgement."""
    lanes = [n for n, logged in enumerate(log) if logged.record.collector_id not in ("reader", "cut off")]
    copies = chance.sample(lanes, k=min(3, len(lanes)))
    for number in sorted(copies, reverse=True):
        log.insert(min(number + chance.randrange(1, 4), len(log)), log[number])
    return len(copies)


def _records(partition: int, log: Sequence[Logged]) -> list[Record]:
    """Numbered anew, with append times that never go back."""
    records: list[Record] = []
    latest_ms = 0
    for offset, logged in enumerate(log):
        latest_ms = max(latest_ms, logged.append_ms)
        records.append(Record(partition, offset, latest_ms, encode(logged.record)))
    return records
