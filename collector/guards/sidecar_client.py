"""A server's connection to the guards' sidecar: one for all threads and all guards of a process.

Threads write under a lock, one thread reads. Where the sidecar is away, hangs or talks nonsense, a question ends in an
error at once or at its deadline, and that thread connects anew, at the latest a second after the sidecar listens again.
Nothing is sent before the other end has shown that it is the sidecar: by its user on a Unix socket, by the token on a
port.
"""

import hmac
import os
import queue
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Final, NoReturn

import structlog

from collector.guards.sidecar_config import SidecarConfig
from collector.guards.sidecar_socket import peer_uid
from collector.guards.wire import (
    ANSWER_BYTES_MAX,
    BAD_BODY,
    NONCE_BYTES,
    PROTOCOL,
    Answer,
    Ask,
    Frames,
    Garbled,
    GuardTold,
    Hello,
    answer_of,
    encode,
    frame,
    greeting_of,
    proof,
    welcome_of,
)

log = structlog.get_logger(__name__)

_RECEIVE_BYTES: Final = 262_144
_PAUSES_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Between attempts to connect; the last one repeats."""
_SILENCE_S: Final = 0.3
Changed = Callable[..., object]
"""Told of a guard's new version: `subject`, `before`, `after`."""


class SidecarAway(Exception):
    """There is no connection to the sidecar, or it broke while it was asked."""


class DeadlineExceeded(Exception):
    """The sidecar has not answered in time."""


class TextTooLong(Exception):
    """The text, or what stands around it, is longer than the sidecar takes."""


class _Waiting:
    """The questions of one call, until they are answered."""

    __slots__ = ("answers", "inbox")

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.answers: dict[int, Answer | None] = {}

    def put(self, number: int, answer: Answer | None) -> None:
        """None: the connection broke."""
        self.answers[number] = answer
        self.inbox.put(number)


class _Link:
    """One connection that has been greeted."""

    def __init__(self, sock: socket.socket, frame_bytes_max: int) -> None:
        self.sock, self.frame_bytes_max = sock, frame_bytes_max
        self.broken = False
        self.heard_s = time.monotonic()
        self._pending: dict[int, _Waiting] = {}
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._number, self._missed_s = 0, 0.0

    def ask(self, bodies: Sequence[bytes], waiting: _Waiting, until_s: float) -> list[int]:
        """Write the questions. Their numbers. Raises SidecarAway, DeadlineExceeded."""
        with self._lock:
            if self.broken:
                raise SidecarAway
            numbers = []
            for _ in bodies:
                self._number += 1
                numbers.append(self._number)
            self._pending.update(dict.fromkeys(numbers, waiting))
        try:
            self._write(b"".join(map(frame, numbers, bodies)), until_s)
        except BaseException:
            self.forget(numbers)
            raise
        return numbers

    def _write(self, raw: bytes, until_s: float) -> None:
        """All of it, or the connection is of no more use: what follows half a frame can't be read."""
        if not self._writing.acquire(timeout=max(0.0, until_s - time.monotonic())):
            raise DeadlineExceeded
        try:
            left = memoryview(raw)
            while True:
                try:
                    left = left[self.sock.send(left, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    pass
                except OSError:
                    self.close()
                    raise SidecarAway from None
                if not left:
                    return
                if not _writable(self.sock, until_s - time.monotonic()):
                    self.close()
                    raise DeadlineExceeded
        finally:
            self._writing.release()

    def forget(self, numbers: Iterable[int]) -> None:
        """Nobody waits for these any more."""
        with self._lock:
            for number in numbers:
                self._pending.pop(number, None)

    def missed(self, asked_s: float) -> None:
        """A question has had no answer in time. Where not a word came since an earlier one had none: connect anew.

        For a sidecar that lives tells that a text is late, though that may come after nobody waits for it.
        """
        now_s = time.monotonic()
        if self.heard_s >= max(asked_s, self._missed_s):
            self._missed_s = 0.0
        elif not self._missed_s:
            self._missed_s = now_s
        elif now_s - self._missed_s > _SILENCE_S:
            self.close()

    def answered(self, number: int, answer: Answer) -> None:
        """One came; dropped where nobody waits."""
        with self._lock:
            waiting = self._pending.pop(number, None)
        if waiting is not None:
            waiting.put(number, answer)

    def close(self) -> None:
        """All that wait are told."""
        with self._lock:
            self.broken = True
            pending, self._pending = self._pending, {}
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads; it closes
        for number, waiting in pending.items():
            waiting.put(number, None)


class Sidecar:
    """This process's connection to the sidecar. Thread-safe; a daemon thread keeps it until `close`."""

    def __init__(self, config: SidecarConfig) -> None:
        """Raises GuardRefused where the token can't be read."""
        self.config = config
        self._token = config.token()
        self._link: _Link | None = None
        self._told: dict[str, GuardTold] = {}
        self._greeted, self._closed = threading.Event(), threading.Event()
        self.changed: Changed = _nobody
        self._thread = threading.Thread(target=self._keep, name="guards-sidecar", daemon=True)
        self._thread.start()

    def guard(self, name: str) -> GuardTold | None:
        """What the sidecar last said of a guard; None where it never said anything of it."""
        return self._told.get(name)

    def wait(self, timeout_s: float) -> bool:
        """Whether it has been there, within so long."""
        return self._greeted.wait(timeout_s)

    def ask(self, asks: Sequence[Ask], until_s: float) -> list[Answer]:
        """The answers in order, until `until_s` on the monotonic clock.

        Raises SidecarAway, DeadlineExceeded, TextTooLong.
        """
        link = self._link
        if link is None:
            raise SidecarAway
        bodies = [encode(ask) for ask in asks]
        if any(len(body) > link.frame_bytes_max for body in bodies):
            raise TextTooLong
        waiting, numbers = _Waiting(), list[int]()
        asked_s = time.monotonic()
        try:
            numbers = link.ask(bodies, waiting, until_s)
            for _ in numbers:
                number = waiting.inbox.get(timeout=max(0.0, until_s - time.monotonic()))
                if waiting.answers[number] is None:
                    raise SidecarAway
        except queue.Empty:
            link.missed(asked_s)
            raise DeadlineExceeded from None
        finally:
            link.forget(numbers)
        return [answer for number in numbers if (answer := waiting.answers[number]) is not None]

    def close(self) -> None:
        """No more questions."""
        self._closed.set()
        if (link := self._link) is not None:
            link.close()

    def _keep(self) -> None:
        tries = 0
        while not self._closed.is_set():
            try:
                with self._connected() as sock:
                    self._read(sock)
            except (OSError, Garbled, SidecarAway, *BAD_BODY) as problem:
                lost, tries = self._link is not None, 0 if self._link is not None else tries
                if tries == 0 and not self._closed.is_set():
                    what = "the guards' sidecar was lost" if lost else "the guards' sidecar is away"
                    why = str(problem) if isinstance(problem, SidecarAway) else type(problem).__name__
                    log.warning(what, at=self.config.place, why=why)
            link, self._link = self._link, None
            if link is not None:
                link.close()
            self._closed.wait(_PAUSES_S[min(tries, len(_PAUSES_S) - 1)])
            tries += 1

    def _connected(self) -> socket.socket:
        """Raises OSError, SidecarAway where another user listens there."""
        config = self.config
        if config.host:
            return socket.create_connection((config.host, config.port), config.connect_timeout_ms / 1000)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(config.connect_timeout_ms / 1000)
            sock.connect(str(config.socket))
        except OSError:
            sock.close()
            raise
        if peer_uid(sock) not in (os.geteuid(), 0):
            sock.close()
            raise SidecarAway("another user listens there")
        return sock

    def _read(self, sock: socket.socket) -> NoReturn:
        """Greet, then take answers until the connection ends, and raise why."""
        words = _words(sock)
        greeting = greeting_of(next(words)[1])
        if greeting.protocol != PROTOCOL:
            raise Garbled
        nonce = secrets.token_bytes(NONCE_BYTES)
        sock.sendall(frame(0, encode(Hello(PROTOCOL, nonce, proof(self._token, b"client", greeting, nonce)))))
        welcome = welcome_of(next(words)[1])
        if not hmac.compare_digest(welcome.proof, proof(self._token, b"sidecar", greeting, nonce)):
            raise SidecarAway("it does not know the token")
        self._learn({told.name: told for told in welcome.guards})
        link = _Link(sock, welcome.frame_bytes_max)
        sock.settimeout(None)
        self._link = link
        self._greeted.set()
        log.info("the guards' sidecar is there", at=self.config.place)
        for number, body in words:
            link.heard_s = time.monotonic()
            if number:
                link.answered(number, answer_of(body))
            else:
                self._learn({told.name: told for told in welcome_of(body).guards})
        raise SidecarAway

    def _learn(self, told: dict[str, GuardTold]) -> None:
        before, self._told = self._told, {**self._told, **told}
        for name, now in told.items():
            old = before.get(name)
            if old is not None and old.version != now.version:
                log.warning("a guard of the sidecar has changed", guard=name, before=old.version, after=now.version)
                try:
                    self.changed(subject=f"guard:{name}", before=old.version, after=now.version)
                except Exception as problem:  # noqa: BLE001 - whatever hears of it, answers go on being read
                    log.error("a change of a guard could not be told", error=type(problem).__name__)  # noqa: TRY400 - no trace


def _nobody(**_: object) -> None:
    pass


def _words(sock: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Frames as they come. Raises OSError, Garbled, SidecarAway at the end."""
    frames = Frames(ANSWER_BYTES_MAX)
    while data := sock.recv(_RECEIVE_BYTES):
        yield from frames.feed(data)
    raise SidecarAway("the connection was closed")


def _writable(sock: socket.socket, timeout_s: float) -> bool:
    poller = select.poll()  # unlike select, for any number of open files
    poller.register(sock, select.POLLOUT)
    return timeout_s > 0 and bool(poller.poll(timeout_s * 1000))
