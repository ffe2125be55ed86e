"""A seeded day of audit events, for machines without vLLM: the demo plays it through everything behind the collector.

The events are made up, and so are the four campaigns in the last half hour; they show that the pipe works, not how well
the detectors do on real traffic (docs/benchmarks.md does that).
"""

import base64
import hashlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from collector.event import (
    SCHEMA_VERSION,
    AnyRecord,
    AuditEvent,
    Goodbye,
    GuardResult,
    Heartbeat,
    Hello,
    Status,
    from_timestamp_us,
)
from collector.kafka import partition_for
from collector.uuid7 import uuid7

SECOND_US: Final = 1_000_000
DAY_S: Final = 86_400
CAMPAIGNS_S: Final = 1_800
MODEL: Final = "replayed@0000000"


@dataclass(frozen=True)
class Request:
    """One request of the day, before it becomes an event."""

    at_us: int
    user: str
    prompt: str
    blocked: bool
    prompt_tokens: int
    response_tokens: int
    latency_ms: float
    family: str = ""
    """Prompts of one family share most of their MinHash, as small variations of one text do."""


class Day:
    """A day of requests that ends at `end_us`, the same for the same seed."""

    def __init__(self, seed: int, end_us: int, *, per_second: float = 0.25, users: int = 60) -> None:
        self._random = random.Random(seed)  # noqa: S311  # a repeatable day, no secret
        self._end_us = end_us
        self._per_second = per_second
        self._users = users

    def requests(self) -> list[Request]:
        """All requests in order of time."""
        found = [*self._background(), *self._campaigns()]
        return sorted(found, key=lambda request: (request.at_us, request.user, request.prompt))

    def _background(self) -> Iterator[Request]:
        """Poisson arrivals under a daily curve; one in a hundred blocked, now and then one sent again."""
        at_s = 0.0
        while True:
            load = 1 + 0.6 * math.sin(2 * math.pi * (at_s / DAY_S - 0.25))
            at_s += self._random.expovariate(self._per_second * load)
            if at_s >= DAY_S:
                return
            yield self._everyday(at_s)

    def _everyday(self, at_s: float, slowdown: float = 1.0) -> Request:
        tokens = max(1, round(self._random.lognormvariate(3.2, 0.5)))
        return Request(
            at_us=self._end_us - DAY_S * SECOND_US + round(at_s * SECOND_US),
            user=f"person-{self._random.randrange(self._users)}",
            prompt=f"prompt-{self._random.randrange(10**9)}",
            blocked=self._random.random() < 0.01,
            prompt_tokens=max(4, round(self._random.lognormvariate(4.0, 0.6))),
            response_tokens=tokens,
            latency_ms=slowdown * (40 + 9 * tokens) * self._random.lognormvariate(0, 0.2),
        )

    def _campaigns(self) -> Iterator[Request]:
        start_s = DAY_S - CAMPAIGNS_S
        for number in range(60):
            yield self._attack(start_s + 5 * number, f"crowd-{number % 40}", f"burst-{number}", f"burst-{number}")
        for number in range(30):
            yield self._attack(start_s + 420 + 12 * number, "prober", f"probe-{number}", "probe")
        for number in range(240):
            yield self._everyday(start_s + 840 + 2 * number, slowdown=6.0)
        for number in range(30):
            request = self._everyday(start_s + 1380 + 10 * number)
            yield Request(
                **{
                    **vars(request),
                    "user": f"drain-{number % 2}",
                    "blocked": False,
                    "response_tokens": 1_500,
                    "latency_ms": 13_500.0,
                }
            )

    def _attack(self, at_s: float, user: str, prompt: str, family: str) -> Request:
        request = self._everyday(at_s)
        return Request(**{**vars(request), "user": user, "prompt": prompt, "family": family, "blocked": True})


def records(seed: int, end_us: int, partitions: int) -> Iterator[tuple[int, bytes, AnyRecord]]:
    """(partition, key, record) in order: hello on every lane, the day with a heartbeat a minute, goodbye."""
    lanes = _Lanes(partitions, boot=f"day-{seed}")
    start_us = end_us - DAY_S * SECOND_US
    yield from lanes.control("hello", start_us)
    minute = start_us // (60 * SECOND_US)
    for request in Day(seed, end_us).requests():
        while request.at_us // (60 * SECOND_US) > minute:
            minute += 1
            yield from lanes.control("heartbeat", minute * 60 * SECOND_US)
        yield lanes.event(request)
    yield from lanes.control("heartbeat", end_us)
    yield from lanes.control("goodbye", end_us)


class _Lanes:
    """Numbers the records of one made-up collector."""

    def __init__(self, partitions: int, boot: str) -> None:
        self._next = [0] * partitions
        self._boot = boot

    def _stamp(self, partition: int, at_us: int, name: str) -> dict[str, object]:
        seq = self._next[partition]
        self._next[partition] += 1
        return {
            "schema_version": SCHEMA_VERSION,
            "event_id": _uuid(at_us, f"{self._boot}/{partition}/{seq}/{name}"),
            "timestamp": from_timestamp_us(at_us),
            "collector_id": "replay",
            "boot": self._boot,
            "seq": seq,
        }

    def control(
        self, kind: Literal["hello", "heartbeat", "goodbye"], at_us: int
    ) -> Iterator[tuple[int, bytes, AnyRecord]]:
        """The same control record on every lane."""
        make: Callable[..., AnyRecord] = {"hello": Hello, "heartbeat": Heartbeat, "goodbye": Goodbye}[kind]
        for partition in range(len(self._next)):
            yield partition, b"", make(**self._stamp(partition, at_us, kind))

    def event(self, request: Request) -> tuple[int, bytes, AuditEvent]:
        """The audit event of one request, on the lane of its user."""
        user_id = f"u_{_hex(request.user)}"
        partition = partition_for(user_id.encode(), len(self._next))
        status: Status = "blocked_input" if request.blocked else "ok"
        verdict = GuardResult(
            guard="injection",
            version="replay",
            stage="input",
            decision="block" if request.blocked else "allow",
            score=0.97 if request.blocked else 0.02,
            label="injection" if request.blocked else "benign",
        )
        event = AuditEvent(
            **self._stamp(partition, request.at_us, request.prompt),  # type: ignore[arg-type]  # from one dict
            tenant="default",
            session_id=f"s_{_hex('session of ' + request.user)}",
            user_id=user_id,
            prompt_hash=f"hmac:{_hex(request.prompt)}",
            turn_hash=f"hmac:{_hex(request.prompt)}",
            minhash=_minhash(request),
            model_version=MODEL,
            guardrail_results=[verdict],
            response_tokens=0 if request.blocked else request.response_tokens,
            latency_ms=2.0 if request.blocked else round(request.latency_ms, 3),
            blocked=request.blocked,
            status=status,
            http_request_id=_uuid(request.at_us, request.prompt),
            http_status=403 if request.blocked else 200,
            route="/v1/chat/completions",
            operation="chat",
            prompt_tokens=request.prompt_tokens,
            max_tokens=2_048,
            ttft_ms=None if request.blocked else round(request.latency_ms * 0.2, 3),
            queue_ms=None if request.blocked else round(request.latency_ms * 0.1, 3),
            ms_per_output_token=None if request.blocked else round(request.latency_ms / request.response_tokens, 3),
            view="messages",
        )
        return partition, user_id.encode(), event


def _uuid(at_us: int, name: str) -> str:
    """A UUIDv7 of that time whose random part is a digest of `name`: the same in every run."""
    digest = hashlib.blake2b(name.encode(), digest_size=10).digest()
    return uuid7(lambda: at_us * 1000, lambda: digest)


def _hex(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _minhash(request: Request) -> str:
    """64 words: those of the family, a tenth of them replaced by the prompt's own."""
    family = hashlib.shake_128((request.family or request.prompt).encode()).digest(256)
    own = hashlib.shake_128(request.prompt.encode()).digest(256)
    words = [(own if own[word] < 26 else family)[4 * word : 4 * word + 4] for word in range(64)]
    return base64.b64encode(b"".join(words)).decode()
