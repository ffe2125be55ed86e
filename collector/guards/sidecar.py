"""The sidecar: guards outside the server's process, so that what they need and what they do to it stays theirs.

One process, the front, listens, shows clients that it knows the token, and hands their texts to workers
(`collector.guards.sidecar_worker`); it has no guard itself, so nothing that a text does to a guard reaches it.
Guarantees: a question gets one answer, or its connection is closed; no later than its budget allows; at most
`queue_max` wait, and one more is answered `Overloaded` at once. A worker that dies or holds a text beyond its budget is
killed and replaced, and what else it had been given is asked again, alone, of another one. Texts are in memory only.
"""

import asyncio
import contextlib
import hmac
import os
import secrets
import signal
import socket
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import structlog

from collector import cores
from collector.guards.config import GuardsConfig
from collector.guards.nursery import Born, Nursery
from collector.guards.protocol import GuardRefused
from collector.guards.sidecar_config import SidecarConfig
from collector.guards.sidecar_socket import listen, peer_uid
from collector.guards.wire import (
    ANSWER_BYTES_MAX,
    BAD_BODY,
    HELLO_BYTES_MAX,
    NONCE_BYTES,
    PROTOCOL,
    Answer,
    Frames,
    Garbled,
    Greeting,
    GuardTold,
    Ready,
    Welcome,
    ask_head_of,
    encode,
    frame,
    hello_of,
    proof,
    ready_of,
)

log = structlog.get_logger(__name__)

_GRACE_S: Final = 0.1
"""A worker may be so much over a text's budget: its answer may be on the way."""
_RESPAWN_S: Final = (0.0, 0.1, 0.3, 1.0)
"""Pauses before a worker that died without an answer is started again; the last one repeats."""
_STOP_S: Final = 2.0
_SWEEP_S: Final = 0.1
_BATCH_S: Final = 0.02
"""A worker is given texts for about so long at once."""
_COST_SHARE: Final = 0.1
_UNKNOWN_LENGTH: Final = ANSWER_BYTES_MAX


@dataclass(slots=True, repr=False, eq=False)
class _Question:
    """One text on its way."""

    client: "_Client"
    number: int
    """The client's."""
    guard: str
    body: bytes
    budget_s: float
    deadline_s: float
    tries: int = 0


def _failed(error: str) -> bytes:
    return encode(Answer(0.0, "", block=False, error=error))


_OVERLOADED, _LATE, _DIED = _failed("Overloaded"), _failed("DeadlineExceeded"), _failed("WorkerDied")


class _Client(asyncio.Protocol):
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
        if not self._front.admits(transport.get_extra_info("socket")):
            transport.abort()
            return
        self._front.clients.add(self)
        self._watch = asyncio.get_running_loop().call_later(
            self._front.config.connect_timeout_ms / 1000, self._turn_away, "it did not say who it is"
        )
        transport.write(frame(0, encode(self._greeting)))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        """Nobody waits for its answers any more."""
        if self._watch is not None:
            self._watch.cancel()
        self._transport = None
        self._front.clients.discard(self)

    def data_received(self, data: bytes) -> None:
        """Questions, or who it is."""
        try:
            for number, body in self._frames.feed(data):
                if self.known:
                    self._front.ask(self, number, body)
                else:
                    self._introduce(body)
        except (Garbled, *BAD_BODY):
            self._turn_away("it sent what is no question")
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

    def _introduce(self, body: bytes) -> None:
        hello = hello_of(body)
        token = self._front.token
        good = hmac.compare_digest(hello.proof, proof(token, b"client", self._greeting, hello.nonce))
        if hello.protocol != PROTOCOL or not good:
            self._turn_away("it does not know the token" if not good else "it speaks another version")
            return
        self.known = True
        self._frames.body_bytes_max = self._front.config.frame_bytes_max
        if self._watch is not None:
            self._watch.cancel()
        self.send(frame(0, encode(self._front.welcome(proof(token, b"sidecar", self._greeting, hello.nonce)))))

    def _turn_away(self, why: str) -> None:
        if self._transport is not None:
            log.warning("the sidecar closes a connection", why=why)
            self._transport.abort()
            self._transport = None


@dataclass(slots=True, repr=False, eq=False)
class _Worker(asyncio.Protocol):
    """One process that judges, seen from here."""

    front: "Front"
    born: Born
    frames: Frames = field(default_factory=lambda: Frames(_UNKNOWN_LENGTH))
    transport: asyncio.Transport | None = None
    guards: tuple[GuardTold, ...] = ()
    given: dict[int, _Question] = field(default_factory=dict)
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
        out: dict[_Client, list[bytes]] = {}
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

    def give(self, questions: Iterable[_Question]) -> None:
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


class Front:
    """The sidecar's first process. Lives in one event loop."""

    def __init__(self, config: GuardsConfig, nursery: Nursery) -> None:
        """Raises GuardRefused: the token can't be read, or no guard is placed here."""
        self._guards, self._nursery = config, nursery
        self.config: SidecarConfig = config.sidecar
        self.token = self.config.token()
        if not any(config.policy(name).where == "sidecar" for name in config.names):
            raise GuardRefused('no guard of order has where = "sidecar": there is nothing to serve')
        self.clients: set[_Client] = set()
        self.told: tuple[GuardTold, ...] = ()
        self._many: set[str] = set()
        self._workers: set[_Worker] = set()
        self._waiting: deque[_Question] = deque()
        self._waiting_bytes = 0
        self._number = 0
        self._cost_s: dict[str, float] = {}
        self._refused = ""

    def admits(self, sock: socket.socket) -> bool:
        """Whether a connection is taken: there is room, and its user is ours or root."""
        if len(self.clients) >= self.config.connections_max:
            log.warning("the sidecar turns a client away: connections_max are there")
            return False
        if sock.family == socket.AF_UNIX and peer_uid(sock) not in (os.geteuid(), 0):
            log.warning("the sidecar turns another user away")
            return False
        return True

    def welcome(self, known: bytes = b"") -> Welcome:
        """What there is."""
        return Welcome(known, self.config.frame_bytes_max, self.told)

    def next_number(self) -> int:
        """An id for a worker's frame."""
        self._number += 1
        return self._number

    def ask(self, client: _Client, number: int, body: bytes) -> None:
        """One question: it waits for a worker, or there is no room. Raises what decoding raises."""
        head = ask_head_of(body)
        full = self._waiting_bytes + len(body) > self.config.queue_bytes_max
        if len(self._waiting) >= self.config.queue_max or full:
            client.send(frame(number, _OVERLOADED))
            return
        budget_s = head.budget_ms / 1000
        deadline_s = asyncio.get_running_loop().time() + budget_s
        self._waiting.append(_Question(client, number, head.guard, body, budget_s, deadline_s))
        self._waiting_bytes += len(body)

    def dispatch(self) -> None:
        """Give what waits to workers that have nothing to do."""
        idle = [each for each in self._workers if each.guards and each.transport is not None and not each.given]
        while idle and self._waiting:
            share = -(-len(self._waiting) // len(idle))
            if batch := self._batch(min(self.config.batch_max, share)):
                idle.pop().give(batch)

    def learn(self, guard: str, cost_s: float) -> None:
        """What a text took: batches grow where texts are quick, and none is kept behind slow ones."""
        known_s = self._cost_s.get(guard, cost_s)
        self._cost_s[guard] = known_s + _COST_SHARE * (cost_s - known_s)

    def _batch(self, most: int) -> list[_Question]:
        """The next ones; what has been given to a worker that died goes alone. Those too late are answered."""
        now_s, planned_s = asyncio.get_running_loop().time(), 0.0
        batch: list[_Question] = []
        while self._waiting and len(batch) < most:
            question = self._waiting[0]
            cost_s = self._cost_s.get(question.guard, _BATCH_S)
            planned_s += cost_s
            if batch and (question.tries or (planned_s > _BATCH_S and question.guard not in self._many)):
                break
            self._waiting.popleft()
            self._waiting_bytes -= len(question.body)
            if question.client.gone:
                continue
            if question.deadline_s <= now_s + min(cost_s, question.budget_s / 2):
                question.client.send(frame(question.number, _LATE))
                continue
            batch.append(question)
            if question.tries:
                break
        return batch

    def is_ready(self, worker: _Worker, ready: Ready) -> None:
        """A worker's first word. Where guards are not what they were, clients are told, and other workers replaced."""
        if ready.refused or not ready.guards:
            self._refused = ready.refused
            worker.kill()
            return
        worker.guards = ready.guards
        if ready.guards != self.told:
            self.told = ready.guards
            self._many = {guard.name for guard in ready.guards if guard.many}
            for other in self._workers:
                if other.guards and other.guards != ready.guards:
                    other.kill()
            for client in self.clients:
                if client.known:
                    client.send(frame(0, encode(self.welcome())))

    async def _keep(self) -> None:
        """One worker, and another when it ends. Raises GuardRefused where the first never gets ready, NurseryGone."""
        loop, short = asyncio.get_running_loop(), 0
        while True:
            born = self._nursery.spawn()
            worker = _Worker(self, born)
            born.line.setblocking(False)
            transport, _ = await loop.create_connection(lambda w=worker: w, sock=born.line)  # type: ignore[misc]
            self._workers.add(worker)
            transport.write(frame(0, self._guards.model_dump_json().encode()))
            await worker.ended
            born.close()
            self._workers.discard(worker)
            self._ask_again(worker)
            if not self.told:
                raise GuardRefused(self._refused or "a worker of the sidecar ended at its start")
            short = 0 if worker.guards else short + 1
            log.warning("a worker of the sidecar ended and is replaced", pid=born.pid, refused=self._refused)
            await asyncio.sleep(_RESPAWN_S[min(short, len(_RESPAWN_S) - 1)])

    def _ask_again(self, worker: _Worker) -> None:
        """What a worker left is asked once more, first of all; what two have died of is answered."""
        for question in reversed(worker.given.values()):
            if question.tries < 2:
                self._waiting.appendleft(question)
                self._waiting_bytes += len(question.body)
            else:
                question.client.send(frame(question.number, _DIED))
        worker.given.clear()
        self.dispatch()

    def _sweep(self) -> None:
        """Answer what has waited too long, where no worker takes anything."""
        now_s = asyncio.get_running_loop().time()
        for question in [each for each in self._waiting if each.deadline_s <= now_s]:
            self._waiting.remove(question)
            self._waiting_bytes -= len(question.body)
            question.client.send(frame(question.number, _LATE))

    async def run(self, listener: socket.socket, stop: asyncio.Event) -> None:
        """Serve until `stop`. Raises GuardRefused where a guard can't start, NurseryGone."""
        loop = asyncio.get_running_loop()
        keepers = [asyncio.create_task(self._keep()) for _ in range(self.config.workers)]
        server: asyncio.Server | None = None
        try:
            while not stop.is_set():
                for ended in (keeper for keeper in keepers if keeper.done()):
                    ended.result()
                if server is None and self.told:
                    server = await loop.create_server(lambda: _Client(self), sock=listener)
                    versions = {guard.name: guard.version for guard in self.told}
                    log.info("the sidecar serves", at=self.config.place, guards=versions, workers=self.config.workers)
                self._sweep()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), _SWEEP_S)
            if server is not None:
                server.close()
                await self._finish(loop.time() + _STOP_S)
        finally:
            for keeper in keepers:
                keeper.cancel()
            for client in [*self.clients]:
                client.close()
            for worker in self._workers:
                worker.kill()

    async def _finish(self, last_s: float) -> None:
        """What has been asked is answered before the end."""
        while asyncio.get_running_loop().time() < last_s:
            if not self._waiting and not any(worker.given for worker in self._workers):
                return
            await asyncio.sleep(0.01)


def run_sidecar(config: GuardsConfig) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises GuardRefused, OSError with one sentence."""
    cores.forbid()
    nursery = Nursery()
    front = Front(config, nursery)
    listener = listen(config.sidecar)
    try:
        asyncio.run(_until_told(front, listener))
    finally:
        nursery.close()
        listener.close()
        if not config.sidecar.host:
            config.sidecar.socket.unlink(missing_ok=True)


async def _until_told(front: Front, listener: socket.socket) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await front.run(listener, stop)
