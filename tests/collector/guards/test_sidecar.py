"""Guards in a sidecar: the same verdicts as in process, and what becomes of requests when it dies, hangs or lies."""

import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import pytest

from collector.event import GuardResult
from collector.guards.protocol import Context, GuardRefused
from collector.guards.sidecar_client import DeadlineExceeded, Sidecar
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
from tests.collector.guards.sidecars import DEADLINE_MS, Process, false_sidecar, serving, settings

CANARY = "canary-3391-wren"
LIMIT_S = DEADLINE_MS / 1000 + 0.5
BACK_S = 5.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sidecar that most tests share lies."""
    return tmp_path_factory.mktemp("sidecar")


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Process]:
    """Two workers, 16 texts may wait."""
    with serving(settings(folder, workers=2, queue_max=16, batch_max=2), folder) as process:
        yield process


@pytest.fixture
def stack(shared: Process) -> Iterator[GuardStack]:
    """A server's stack on the shared sidecar, whole again."""
    made = GuardStack(shared.config.model_copy(update={"workers": 16, "stuck_max": 16}))
    judged_again(made)
    yield made
    made.close()


def one(stack: GuardStack, text: str, context: Context | None = None) -> GuardResult:
    """The verdict on one text."""
    (result,) = stack.judge([("input", text)], context or Context())
    return result


def told(result: GuardResult) -> tuple[str, str, str]:
    """Decision, error and version."""
    return result.decision, result.error, result.version


def judged_again(stack: GuardStack, within_s: float = BACK_S, version: str = "o1") -> float:
    """Seconds until a text is judged."""
    start_s = time.monotonic()
    while told(one(stack, "fine")) != ("allow", "", version):
        assert time.monotonic() - start_s < within_s, "it did not come back"
        time.sleep(0.02)
    return time.monotonic() - start_s


class Load:
    """Threads that ask all the time; what each was told, and how long it took."""

    def __init__(self, stack: GuardStack, threads: int = 8) -> None:
        self.asked = 0
        self.results: list[GuardResult] = []
        self.longest_s = 0.0
        self._stack, self._stop, self._lock = stack, threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        assert len(self.results) == self.asked, "a request was lost"
        assert self.longest_s < LIMIT_S
        assert all(each.error or each.decision == "allow" for each in self.results)

    def _ask(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                self.asked += 1
            start_s = time.monotonic()
            result = one(self._stack, "fine")
            with self._lock:
                self.results.append(result)
                self.longest_s = max(self.longest_s, time.monotonic() - start_s)
            time.sleep(0.005)

    @property
    def errors(self) -> set[str]:
        """What went wrong."""
        return {each.error for each in self.results if each.error}


def test_verdicts_are_those_of_the_guard_itself(shared: Process, stack: GuardStack) -> None:
    """Score, label, version, and the class of what a guard raises; the context comes along."""
    assert stack.versions == {"secrets": "o1"}
    verdict = one(stack, "odd")
    assert (verdict.decision, verdict.score, verdict.label, verdict.version) == ("block", 0.9, "odd", "o1")
    assert told(one(stack, "fine")) == ("allow", "", "o1")
    assert told(one(stack, "\ud800 lone")) == ("allow", "", "o1")
    assert one(stack, "context", Context("t", "r", "s", "p")).decision == "block"
    assert told(one(stack, f"raise {CANARY}"))[:2] == ("error", "LookupError")
    assert told(one(stack, f"exit {CANARY}"))[:2] == ("error", "SystemExit")
    assert told(one(stack, f"prose {CANARY}"))[:2] == ("error", "BadJudgement")
    assert stack.blocks([one(stack, "raise")])
    assert stat.S_IMODE(shared.config.sidecar.socket.stat().st_mode) == 0o600


def test_a_text_that_kills_its_worker_harms_no_other(shared: Process, stack: GuardStack) -> None:
    """It is tried twice and then an error; all others are judged, and the workers are back."""
    with ThreadPoolExecutor(12) as pool:
        texts = ["fine", "fine", "die", "fine", "odd", "fine", "fine", "odd", "fine", "fine", "fine", "fine"]
        results = list(pool.map(lambda text: one(stack, text), texts))
    assert [told(result)[:2] for result in results] == [
        {"fine": ("allow", ""), "odd": ("block", ""), "die": ("error", "WorkerDied")}[text] for text in texts
    ]
    judged_again(stack)


def test_a_text_that_hangs_is_an_error_at_its_deadline_and_its_worker_is_replaced(
    shared: Process, stack: GuardStack
) -> None:
    """Two of them: errors in time, and texts are judged again soon after."""
    before = set(shared.workers())
    start_s = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        hung = list(pool.map(lambda text: one(stack, text), ["hang", "hang"]))
    assert [told(result)[:2] for result in hung] == [("error", "DeadlineExceeded")] * 2
    assert time.monotonic() - start_s < LIMIT_S
    judged_again(stack)
    assert before - set(shared.workers())


def test_beyond_the_queue_it_is_an_error_at_once(shared: Process, stack: GuardStack) -> None:
    """Both workers are busy and sixteen texts wait: one more is turned away at once, and no worker dies of it."""
    sidecar = stack._remote["secrets"]._sidecar  # more at once than a stack has threads
    slow, before = Ask("secrets", 1_400, "input", b"slow"), shared.workers()

    def asked(count: int) -> tuple[list[str], float]:
        start_s = time.monotonic()
        answers = sidecar.ask([slow] * count, start_s + 1.4)
        return [answer.error for answer in answers], time.monotonic() - start_s

    with ThreadPoolExecutor(8) as pool:
        first = [pool.submit(asked, 2) for _ in range(2)]
        time.sleep(0.05)
        full = pool.submit(asked, 20)
        time.sleep(0.05)
        assert asked(2)[0] == ["Overloaded"] * 2
        for each in first:
            assert each.result()[0] == ["", ""]
        with pytest.raises(DeadlineExceeded):
            full.result()
    judged_again(stack)
    assert shared.workers() == before


@pytest.mark.parametrize("victims", ["worker", "workers"])
def test_workers_killed_under_load(shared: Process, stack: GuardStack, victims: str) -> None:
    """Requests are decided in time, none is lost, and all workers are back in 5 s."""
    with Load(stack) as load:
        for pid in shared.workers()[: 1 if victims == "worker" else None]:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        judged_again(stack)
    assert load.errors <= {"WorkerDied", "DeadlineExceeded"}
    start_s = time.monotonic()
    while len(shared.workers()) < 2:
        assert time.monotonic() - start_s < BACK_S
        time.sleep(0.02)


@pytest.mark.long
def test_a_stopped_worker_is_replaced(shared: Process, stack: GuardStack) -> None:
    """SIGSTOP is a hang like another."""
    with Load(stack) as load:
        stopped = shared.workers()[0]
        os.kill(stopped, signal.SIGSTOP)
        start_s = time.monotonic()
        while stopped in shared.workers():
            assert time.monotonic() - start_s < BACK_S
            time.sleep(0.02)
    assert load.errors <= {"DeadlineExceeded"}
    judged_again(stack)


def test_a_stopped_sidecar_costs_deadlines_and_then_nothing(shared: Process, stack: GuardStack) -> None:
    """The whole front hangs: errors at the deadline, soon at once, and it is back when it goes on."""
    os.kill(shared.front, signal.SIGSTOP)
    try:
        with Load(stack) as load:
            time.sleep(2 * LIMIT_S)
            start_s = time.monotonic()
            assert told(one(stack, "fine"))[:2] == ("error", "SidecarAway")
            assert time.monotonic() - start_s < 0.2
    finally:
        os.kill(shared.front, signal.SIGCONT)
    assert load.errors == {"DeadlineExceeded", "SidecarAway"}
    judged_again(stack)


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
            assert sum(closed(sock, 0.01) for sock in idle) >= 80 - shared.config.sidecar.connections_max
            half.sendall(frame(1, QUESTION)[-5:])
            assert told(one(stack, "odd")) == ("block", "", "o1")
        assert all(closed(sock) for sock in idle)
    finally:
        for sock in idle:
            sock.close()


def test_no_text_gets_out_of_the_sidecar(shared: Process, stack: GuardStack) -> None:
    """Neither what guards print or raise nor what kills them is in its log; no process of it may leave a core."""
    for word in ("print", "raise", "exit", "prose", "die", "hang"):
        one(stack, f"{word} {CANARY}", Context(system=CANARY, prompt=CANARY))
    judged_again(stack)
    assert CANARY.encode() not in shared.log.read_bytes()
    for pid in (shared.front, *shared.workers()):
        (limit,) = (line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "core file" in line)
        assert limit.split()[4] == "0"
        assert CANARY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    core = Path("core")
    assert not core.exists()


def test_neighbours_are_judged_together(tmp_path: Path) -> None:
    """What waits for a guard that judges many is one call; where that fails, each is judged alone."""
    config = settings(tmp_path, gathering=True)
    with serving(config, tmp_path):
        stack = GuardStack(config.model_copy(update={"workers": 16}))

        def asked(texts: Sequence[str]) -> list[float]:
            with ThreadPoolExecutor(16) as pool:
                busy = pool.submit(one, stack, "wait")
                time.sleep(0.15)
                scores = [result.score for result in pool.map(lambda text: one(stack, text), texts)]
                busy.result()
            return scores

        assert asked(["fine"] * 10) == [0.1] * 10
        assert asked(["fine"] * 5 + ["spoil"]) == [0.01] * 6
        stack.close()


def test_killed_under_load_all_but_its_keeper_it_is_back_by_itself(shared: Process, stack: GuardStack) -> None:
    """Front, nursery and workers at once: requests are decided in time, by policy, none is lost, back in 5 s."""
    with Load(stack) as load:
        killed = [pid for generation in shared.below() for pid in generation]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        judged_again(stack)
    assert load.errors == {"SidecarAway"}
    assert not set(killed) & {pid for generation in shared.below() for pid in generation}


@pytest.mark.long
def test_killed_whole_it_leaves_nothing_and_the_next_takes_its_place(tmp_path: Path) -> None:
    """Started again, as a service manager does, with a guard of another version, which is told; at last a clean end."""
    config = settings(tmp_path, workers=2)
    process = Process(config, tmp_path).wait()
    stack = GuardStack(config.model_copy(update={"workers": 16}))
    changes: list[dict[str, str]] = []
    stack.watch(lambda **change: changes.append(change))
    try:
        with Load(stack) as load:
            below = [pid for generation in process.below() for pid in generation]
            process.stop(signal.SIGKILL)
            process = Process(config, tmp_path, "o2")
            judged_again(stack, within_s=30, version="o2")
        assert load.errors == {"SidecarAway"}
        assert {each.version for each in load.results} == {"o1", "o2"}
        assert changes == [{"subject": "guard:secrets", "before": "o1", "after": "o2"}]
        assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]
        assert process.stop() == 0
        assert not config.sidecar.socket.exists()
    finally:
        stack.close()
        process.stop(signal.SIGKILL)


def test_a_server_may_start_before_its_sidecar(tmp_path: Path) -> None:
    """Until it is there, on_error decides at once; where nobody knows what a guard judges, the start is refused."""
    config = settings(tmp_path, connect_timeout_ms=100)
    stack = GuardStack(config)
    assert told(one(stack, "fine")) == ("error", "SidecarAway", "unknown")
    assert stack.blocks([one(stack, "fine")])
    with serving(config, tmp_path):
        judged_again(stack)
        assert one(stack, "odd").decision == "block"
        other = config.model_copy(update={"order": ("injection",)})
        with pytest.raises(GuardRefused, match="runs no guard injection"):
            GuardStack(other)
    stack.close()


def test_a_port_needs_the_token_on_both_sides(tmp_path: Path) -> None:
    """Who does not know it gets nothing, and a false sidecar on the port gets neither token nor text."""
    token, wrong = tmp_path / "token", tmp_path / "wrong"
    for file, secret in ((token, "s" * 40), (wrong, "w" * 40)):
        file.write_text(secret)
        file.chmod(0o600)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = settings(tmp_path, host="127.0.0.1", port=port, token_file=str(token), connect_timeout_ms=300)
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
