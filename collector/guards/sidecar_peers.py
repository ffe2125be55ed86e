"""Who the sidecar's front talks with: servers that ask, and workers that judge. Each is one asyncio protocol."""

import asyncio
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog

from collector.guards.nursery import Born
from collector.guards.wire import (
    ANSWER_BYTES_MAX,
    BAD_BODY,
    HELLO_BYTES_MAX,
    NONCE_BYTES,
    PROTOCOL,
    Frames,
    Garbled,
    Greeting,
    GuardTold,
    encode,
    frame,
    hello_of,
    proof,
    ready_of,
)

if TYPE_CHECKING:
    from collector.guards.sidecar_front import Front

log = structlog.get_logger(__name__)

_GRACE_S: Final = 0.1
"""A worker may be so much over a text's budget: its answer may be on the way."""


@dataclass(slots=True, repr=False, eq=False)
class Question:
    """One text on its way."""

    client: "Client"
    number: int
    """The client's."""
    guard: str
    body: bytes
    budget_s: float
    deadline_s: float
    tries: int = 0


class Client(asyncio.Protocol):
    """One server that asks."""

    def __init__(self, front: "Front") -> None:
        self._front = front
        self._frames = Frames(HELLO_BYTES_MAX)
        self._greeting = Greeting(PROTOCOL, secrets.token_bytes(NONCE_BYTES))
        self._transport: asyncio.Transport | None = None
        self._watch: asyncio.TimerHandle | None = None
        self.known = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody is there; this end speaks first."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker
        self._transport = transport
        if not self._front.admits(self, transport.get_extra_info("socket")):
            transport.abort()
            return
        self._watch = asyncio.get_running_loop().call_later(
            self._front.config.connect_timeout_ms / 1000, self.turn_away, "it did not say who it is"
        )
        transport.write(frame(0, encode(self._greeting)))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        """Nobody waits for its answers any more."""
        if self._watch is not None:
            self._watch.cancel()
        self._transport = None
        self._front.loses(self)

    def data_received(self, data: bytes) -> None:
        """Questions, or who it is."""
        try:
            for number, body in self._frames.feed(data):
                if self.known:
                    self._front.ask(self, number, body)
                else:
                    self._introduce(body)
        except (Garbled, *BAD_BODY):
            self.turn_away("it sent what is no question")
        self._front.dispatch()

    def pause_writing(self) -> None:
        """It does not read its answers: it gets to ask nothing more until it does."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        if self._transport is not None:
            self._transport.resume_reading()

    def send(self, raw: bytes) -> None:
        """Whole frames; dropped where it has gone."""
        if self._transport is not None:
            self._transport.write(raw)

    @property
    def gone(self) -> bool:
        """Whether it can't be answered."""
        return self._transport is None

    def close(self) -> None:
        """The end, once what was written has left."""
        if self._transport is not None:
            self._transport.close()

    def turn_away(self, why: str) -> None:
        """The end, at once."""
        if self._transport is not None:
            self._front.tell(why)
            self._transport.abort()
            self._transport = None
            self._front.loses(self)

    def _introduce(self, body: bytes) -> None:
        hello = hello_of(body)
        token = self._front.token
        good = hmac.compare_digest(hello.proof, proof(token, b"client", self._greeting, hello.nonce))
        if hello.protocol != PROTOCOL or not good:
            self.turn_away("it does not know the token" if not good else "it speaks another version")
            return
        if not self._front.knows(self):
            self.turn_away("connections_max are there")
            return
        self.known = True
        self._frames.body_bytes_max = self._front.config.frame_bytes_max
        if self._watch is not None:
            self._watch.cancel()
        self.send(frame(0, encode(self._front.welcome(proof(token, b"sidecar", self._greeting, hello.nonce)))))


@dataclass(slots=True, repr=False, eq=False)
class Worker(asyncio.Protocol):
    """One process that judges, seen from here."""

    front: "Front"
    born: Born
    frames: Frames = field(default_factory=lambda: Frames(ANSWER_BYTES_MAX))
    transport: asyncio.Transport | None = None
    guards: tuple[GuardTold, ...] = ()
    given: dict[int, Question] = field(default_factory=dict)
    """What it works on, in order."""
    since_s: float = 0.0
    """Since when it works on the first of them."""
    timer: asyncio.TimerHandle | None = None
    ended: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Answers, or its first word."""
        out: dict[Client, list[bytes]] = {}
        done: list[str] = []
        try:
            for number, body in self.frames.feed(data):
                if not self.guards:
                    self.front.is_ready(self, ready_of(body))
                elif question := self.given.pop(number, None):
                    done.append(question.guard)
                    out.setdefault(question.client, []).append(frame(question.number, body))
        except (Garbled, *BAD_BODY):
            self.kill()
        for client, answers in out.items():
            client.send(b"".join(answers))
        if done:
            cost_s = (asyncio.get_running_loop().time() - self.since_s) / len(done)
            for guard in done:
                self.front.learn(guard, cost_s)
            self.watch()
        self.front.dispatch()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        """It has ended, or is to."""
        self.transport = None
        if self.timer is not None:
            self.timer.cancel()
        self.kill()
        if not self.ended.done():
            self.ended.set_result(None)

    def give(self, questions: Iterable[Question]) -> None:
        """More work, written at once."""
        assert self.transport is not None  # noqa: S101 - only workers that are there are given work
        out = []
        for question in questions:
            number = self.front.next_number()
            question.tries += 1
            self.given[number] = question
            out.append(frame(number, question.body))
        self.transport.write(b"".join(out))
        self.watch()

    def watch(self) -> None:
        """From now on it works on the first text, for no longer than that one's whole budget."""
        loop = asyncio.get_running_loop()
        self.since_s = loop.time()
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        first = next(iter(self.given.values()), None)
        if first is not None:
            self.timer = loop.call_at(self.since_s + first.budget_s + _GRACE_S, self._late)

    def kill(self) -> None:
        """The end of it, whatever it does."""
        self.born.kill()

    def _late(self) -> None:
        log.warning("a worker of the sidecar holds a text beyond its time and is replaced", pid=self.born.pid)
        self.kill()
