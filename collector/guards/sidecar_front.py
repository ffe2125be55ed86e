"""The sidecar's front: it listens, shows clients that it knows the token, and hands their texts to workers.

It has no guard itself, so nothing that a text does to a guard reaches it. Guarantees: a question gets one answer, or
its connection is closed; no later than its budget allows; at most `queue_max` wait, and one more is answered
`Overloaded` at once. A worker that dies, or holds a text beyond its budget, is killed and replaced; what else it had
been given is asked again, alone, of another one. Texts are in memory only.
"""

import asyncio
import contextlib
import os
import signal
import socket
from collections import deque
from typing import Final

import structlog

from collector.guards.config import GuardsConfig
from collector.guards.nursery import Nursery
from collector.guards.protocol import GuardRefused
from collector.guards.sidecar_config import SidecarConfig
from collector.guards.sidecar_peers import Client, Question, Worker
from collector.guards.sidecar_socket import BACKLOG, peer_uid
from collector.guards.wire import Answer, GuardTold, Ready, Welcome, ask_head_of, encode, frame

log = structlog.get_logger(__name__)

_RESPAWN_S: Final = (0.0, 0.1, 0.3, 1.0)
"""Pauses before a worker that never got ready is started again; the last one repeats."""
_STOP_S: Final = 2.0
_SWEEP_S: Final = 0.1
_BATCH_S: Final = 0.02
"""A worker is given texts for about so long at once."""
_COST_SHARE: Final = 0.1
_TELL_S: Final = 1.0
_STRANGERS_MAX: Final = 64
"""Connections that have not said yet who they are. On a port any user of the machine can open them."""
_ACCEPTED_MAX: Final = 8
"""Taken in one round of the event loop, far fewer than _STRANGERS_MAX: an honest one gets rounds to say who it is."""


def _failed(error: str) -> bytes:
    return encode(Answer(0.0, "", block=False, error=error))


_OVERLOADED, _LATE, _DIED = _failed("Overloaded"), _failed("DeadlineExceeded"), _failed("WorkerDied")


class Front:
    """The sidecar's first process. Lives in one event loop."""

    def __init__(self, config: GuardsConfig, nursery: Nursery) -> None:
        """Raises GuardRefused: the token can't be read, or no guard is placed here."""
        self._guards, self._nursery = config, nursery
        self.config: SidecarConfig = config.sidecar
        self.token = self.config.token()
        if not any(config.policy(name).where == "sidecar" for name in config.names):
            raise GuardRefused('no guard of order has where = "sidecar": there is nothing to serve')
        self.clients: set[Client] = set()
        self._strangers: dict[Client, None] = {}
        self.told: tuple[GuardTold, ...] = ()
        self._many: set[str] = set()
        self._workers: set[Worker] = set()
        self._waiting: deque[Question] = deque()
        self._waiting_bytes = 0
        self._number = 0
        self._cost_s: dict[str, float] = {}
        self._refused = ""
        self._told_s: dict[str, float] = {}

    def admits(self, client: Client, sock: socket.socket) -> bool:
        """Whether a connection may say who it is: its user is ours or root, or there is a port, where nobody can tell.

        Where too many are about to, the one that took longest makes room: an honest one says it at once.
        """
        if sock.family == socket.AF_UNIX and peer_uid(sock) not in (os.geteuid(), 0):
            self.tell("another user")
            return False
        self._strangers[client] = None
        if len(self._strangers) > _STRANGERS_MAX:
            next(iter(self._strangers)).turn_away("too many did not say who they are")
        return True

    def knows(self, client: Client) -> bool:
        """Whether one that has said who it is is taken: there is room."""
        if len(self.clients) >= self.config.connections_max:
            return False
        self._strangers.pop(client, None)
        self.clients.add(client)
        return True

    def loses(self, client: Client) -> None:
        """A connection is over."""
        self._strangers.pop(client, None)
        self.clients.discard(client)

    def tell(self, why: str) -> None:
        """Log that a client is turned away, once a second for each reason: whoever knocks must not fill the log."""
        now_s = asyncio.get_running_loop().time()
        if now_s - self._told_s.get(why, -_TELL_S) >= _TELL_S:
            self._told_s[why] = now_s
            log.warning("the sidecar turns a client away", why=why)

    def welcome(self, known: bytes = b"") -> Welcome:
        """What there is."""
        return Welcome(known, self.config.frame_bytes_max, self.told)

    def next_number(self) -> int:
        """An id for a worker's frame."""
        self._number += 1
        return self._number

    def ask(self, client: Client, number: int, body: bytes) -> None:
        """One question: it waits for a worker, or there is no room. Raises what decoding raises."""
        head = ask_head_of(body)
        full = self._waiting_bytes + len(body) > self.config.queue_bytes_max
        if len(self._waiting) >= self.config.queue_max or full:
            client.send(frame(number, _OVERLOADED))
            return
        budget_s = head.budget_ms / 1000
        deadline_s = asyncio.get_running_loop().time() + budget_s
        self._waiting.append(Question(client, number, head.guard, body, budget_s, deadline_s))
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

    def _batch(self, most: int) -> list[Question]:
        """The next ones; what has been given to a worker that died goes alone. Those too late are answered."""
        now_s, planned_s = asyncio.get_running_loop().time(), 0.0
        batch: list[Question] = []
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

    def is_ready(self, worker: Worker, ready: Ready) -> None:
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
                client.send(frame(0, encode(self.welcome())))

    async def _keep(self) -> None:
        """One worker, and another when it ends. Raises GuardRefused where the first never gets ready, NurseryGone."""
        loop, short = asyncio.get_running_loop(), 0
        while True:
            born = self._nursery.spawn()
            worker = Worker(self, born)
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

    def _ask_again(self, worker: Worker) -> None:
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
                    server = await loop.create_server(lambda: Client(self), sock=listener, backlog=_ACCEPTED_MAX)
                    listener.listen(BACKLOG)  # so many may wait, however few are taken at once
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
            for client in [*self.clients, *self._strangers]:
                client.close()
            for worker in self._workers:
                worker.kill()

    async def _finish(self, last_s: float) -> None:
        """What has been asked is answered before the end."""
        while asyncio.get_running_loop().time() < last_s:
            if not self._waiting and not any(worker.given for worker in self._workers):
                return
            await asyncio.sleep(0.01)


def serve(config: GuardsConfig, listener: socket.socket) -> None:
    """Be the front until SIGTERM or SIGINT. Raises GuardRefused, NurseryGone."""
    nursery = Nursery()
    try:
        asyncio.run(_until_told(Front(config, nursery), listener))
    finally:
        nursery.close()


async def _until_told(front: Front, listener: socket.socket) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await front.run(listener, stop)
