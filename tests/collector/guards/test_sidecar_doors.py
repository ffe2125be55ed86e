"""Who gets into the sidecar, and what a server takes from what listens in its place: garbage harms nobody."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from collector.guards.config import GuardsConfig
from collector.guards.protocol import GuardRefused
from collector.guards.sidecar_client import Sidecar
from collector.guards.sidecar_config import SidecarConfig
from collector.guards.stack import GuardStack
from collector.guards.wire import (
    HEADER,
    HELLO_BYTES_MAX,
    NONCE_BYTES,
    PROTOCOL,
    Ask,
    Greeting,
    GuardTold,
    Hello,
    Welcome,
    encode,
    frame,
    greeting_of,
    hello_of,
    proof,
)
from tests.collector.guards.sidecars import (
    BACK_S,
    CANARY,
    Process,
    false_sidecar,
    one,
    serving,
    settings,
    told,
)


def hello(config: SidecarConfig, token: bytes = b"") -> socket.socket:
    """A connection by hand, welcomed."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(str(config.socket))
    greeting = greeting_of(sock.recv(4096)[HEADER.size :])
    nonce = os.urandom(NONCE_BYTES)
    sock.sendall(frame(0, encode(Hello(PROTOCOL, nonce, proof(token, b"client", greeting, nonce)))))
    return sock


def closed(sock: socket.socket, within_s: float = 7) -> bool:
    """Whether the other end closes."""
    sock.settimeout(within_s)
    try:
        while sock.recv(65_536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


QUESTION = encode(Ask("secrets", 1_000, "input", b"fine"))


@pytest.mark.parametrize(
    ("welcomed", "sent"),
    [
        (False, b"GET / HTTP/1.1\r\n\r\n"),
        (False, blake2b(b"noise").digest()),
        (False, frame(0, b"\x80\x04K*.")),
        (False, HEADER.pack(HELLO_BYTES_MAX + 1, 0)),
        (False, frame(0, encode(Hello(PROTOCOL, b"n" * NONCE_BYTES, b"p" * 32)))),
        (False, frame(7, QUESTION)),
        (True, HEADER.pack(2**32 - 1, 1) + b"x" * 1000),
        (True, frame(1, b"\xc1" * 100)),
        (True, frame(1, b"\x91" * 100_000)),
        (True, frame(1, encode(["secrets", float("nan"), "input", b"x"]))),
        (True, frame(1, encode(["x" * 100, 1.0, "input", b"x"]))),
        (True, frame(1, encode({"guard": "secrets"}))),
    ],
)
def test_garbage_ends_its_own_connection_only(shared: Process, stack: GuardStack, welcomed: bool, sent: bytes) -> None:
    """HTTP, random bytes, a pickle, huge and false frames, a wrong proof: closed at once; others are judged on."""
    if welcomed:
        sock = hello(shared.config.sidecar)
    else:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(shared.config.sidecar.socket))
    with sock:
        sock.sendall(sent)
        assert closed(sock, 2)
    assert told(one(stack, "odd")) == ("block", "", "o1")


@pytest.mark.parametrize(
    "body",
    [
        ["secrets", 1000.0, "nowhere", b"x"],
        ["secrets", 1000.0, "input", "not bytes"],
        ["secrets", 1000.0, "input", b"\xff\xfe"],
        ["nobody", 1000.0, "input", b"x"],
        ["secrets", 1000.0],
    ],
)
def test_a_question_that_makes_no_sense_is_answered_so(shared: Process, stack: GuardStack, body: list[Any]) -> None:
    """Its worker lives, and the connection goes on."""
    with hello(shared.config.sidecar) as sock:
        sock.sendall(frame(9, encode(body)) + frame(10, QUESTION))
        time.sleep(0.3)
        came = sock.recv(65_536)
        assert b"Error" in came
    assert told(one(stack, "odd")) == ("block", "", "o1")


def test_half_a_frame_and_many_connections_take_no_room_from_others(shared: Process, stack: GuardStack) -> None:
    """Clients that stop in the middle or say nothing are cut off; more than may come are turned away; others go on."""
    idle = [socket.socket(socket.AF_UNIX) for _ in range(80)]
    try:
        with hello(shared.config.sidecar) as half:
            half.sendall(frame(1, QUESTION)[:-5])
            for sock in idle:
                sock.connect(str(shared.config.sidecar.socket))
            assert told(one(stack, "odd")) == ("block", "", "o1")
            assert idle[-1].recv(1)  # the greeting: all have been taken
            assert sum(closed(sock, 0.01) for sock in idle) >= 80 - shared.config.sidecar.connections_max
            half.sendall(frame(1, QUESTION)[-5:])
            assert told(one(stack, "odd")) == ("block", "", "o1")
        assert all(closed(sock) for sock in idle)
    finally:
        for sock in idle:
            sock.close()


def on_a_port(folder: Path, **sidecar: Any) -> GuardsConfig:
    """A sidecar on a free port, with a token in `folder`."""
    token = folder / "token"
    token.write_text("s" * 40)
    token.chmod(0o600)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return settings(folder, host="127.0.0.1", port=port, token_file=str(token), **sidecar)


def test_a_port_needs_the_token_on_both_sides(tmp_path: Path) -> None:
    """Who does not know it gets nothing, and a false sidecar on the port gets neither token nor text."""
    config, token, wrong = on_a_port(tmp_path, connect_timeout_ms=300), tmp_path / "token", tmp_path / "wrong"
    wrong.write_text("w" * 40)
    wrong.chmod(0o600)
    with serving(config, tmp_path):
        stack = GuardStack(config)
        assert told(one(stack, "odd")) == ("block", "", "o1")
        stack.close()
        stranger = config.sidecar.model_copy(update={"token_file": wrong})
        client = Sidecar(stranger)
        assert not client.wait(0.5)
        client.close()
    token.chmod(0o640)
    with pytest.raises(GuardRefused, match="chmod 600"):
        config.sidecar.token()
    with pytest.raises(ValueError, match="needs token_file"):
        SidecarConfig(host="127.0.0.1")


def test_who_has_proved_nothing_keeps_no_server_out(tmp_path: Path) -> None:
    """Connections that say nothing, more than there are places, held or made anew all the time: servers get in."""
    config = on_a_port(tmp_path, connect_timeout_ms=20_000, connections_max=2)
    place = ("127.0.0.1", config.sidecar.port)
    flood = (
        "import collections, socket, sys\n"
        "held = collections.deque(maxlen=200)\n"
        "while True: held.append(socket.create_connection(('127.0.0.1', int(sys.argv[1])), 5))"
    )
    with serving(config, tmp_path), ExitStack() as held:
        for _ in range(200):
            held.enter_context(socket.create_connection(place, 5))
        servers = [held.enter_context(closing(Sidecar(config.sidecar))) for _ in range(2)]
        assert all(server.wait(BACK_S) for server in servers)
        one_more = held.enter_context(closing(Sidecar(config.sidecar)))
        assert not one_more.wait(0.5)
        flooding = subprocess.Popen([sys.executable, "-c", flood, str(place[1])], stderr=subprocess.DEVNULL)
        held.callback(flooding.wait)
        held.callback(flooding.kill)
        time.sleep(0.5)
        servers[0].close()
        assert one_more.wait(2 * BACK_S)
        assert flooding.poll() is None


def greet(peer: socket.socket) -> None:
    """Greet properly, and then say nothing."""
    peer.sendall(frame(0, encode(Greeting(PROTOCOL, b"n" * NONCE_BYTES))))


def welcome_falsely(peer: socket.socket) -> None:
    """Welcome without knowing the token."""
    greet(peer)
    peer.recv(4096)
    peer.sendall(frame(0, encode(Welcome(b"p" * 32, 1_000_000, ()))))


def welcome(then: bytes) -> Callable[[socket.socket], None]:
    """Welcome properly, and answer every question with these bytes."""

    def behave(peer: socket.socket) -> None:
        greet(peer)
        raw = peer.recv(4096)
        known = proof(b"", b"sidecar", Greeting(PROTOCOL, b"n" * NONCE_BYTES), hello_of(raw[HEADER.size :]).nonce)
        guard = GuardTold("secrets", "false", frozenset({"input"}), frozenset({"odd"}), False, frozenset(), 0, ())
        peer.sendall(frame(0, encode(Welcome(known, 1_000_000, (guard,)))))
        if peer.recv(65_536):
            peer.sendall(then)

    return behave


@pytest.mark.parametrize("behave", [lambda _: None, lambda peer: peer.sendall(os.urandom(999)), greet, welcome_falsely])
def test_nothing_is_sent_before_the_other_end_has_shown_that_it_is_the_sidecar(
    tmp_path: Path, behave: Callable[[socket.socket], None]
) -> None:
    """Silence, garbage, a greeting alone, a false welcome: no text leaves, and requests are decided at once."""
    config = settings(tmp_path, connect_timeout_ms=200)
    with false_sidecar(config, behave) as sent:
        stack = GuardStack(config)
        assert told(one(stack, CANARY))[:2] == ("error", "SidecarAway")
        stack.close()
    assert CANARY.encode() not in b"".join(sent)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"\xff" * 2000, "SidecarAway"),
        (HEADER.pack(2**31, 1), "SidecarAway"),
        (frame(1, encode(["high", "", True])), "SidecarAway"),
        (frame(1, encode([0.1, "", False, "a piece of the text"])), "SidecarAway"),
        (frame(1, encode([float("nan"), "", False])), "BadJudgement"),
        (frame(1, encode([0.1, CANARY, False])), "BadJudgement"),
        (frame(2, encode([0.1, "", False])), "DeadlineExceeded"),
        (b"", "DeadlineExceeded"),
    ],
)
def test_nonsense_from_a_sidecar_is_an_error_in_time(tmp_path: Path, answer: bytes, error: str) -> None:
    """What it answers is judged like any guard's answer: wrong frames, shapes, numbers, labels, or nothing."""
    config = settings(tmp_path)
    config = config.model_copy(update={"secrets": config.secrets.model_copy(update={"deadline_ms": 400.0})})
    with false_sidecar(config, welcome(answer)):
        stack = GuardStack(config)
        assert stack.versions == {"secrets": "false"}
        start_s = time.monotonic()
        verdict = one(stack, CANARY)
        assert (verdict.decision, verdict.error) == ("error", error)
        assert time.monotonic() - start_s < 1
        assert CANARY not in repr(verdict)
        stack.close()
