"""Sidecars for tests: the real process with guards that do as the text says, and false ones that do as they are told.

python -m tests.collector.guards.sidecars CONFIG_JSON [VERSION]
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from collector.event import GuardResult, Stage
from collector.guards.config import GuardsConfig
from collector.guards.injection import InjectionConfig
from collector.guards.protocol import ALONE, Context, Judgement, Probe, Text
from collector.guards.secrets import SecretsConfig
from collector.guards.sidecar_client import Sidecar
from collector.guards.stack import GuardStack

DEADLINE_MS = 1_500.0
CANARY = "canary-3391-wren"
LIMIT_S = DEADLINE_MS / 1000 + 0.5
BACK_S = 5.0


class Obedient:
    """Stands in for `secrets`: does what the text says."""

    name = "secrets"
    stages: frozenset[Stage] = frozenset({"input", "output"})
    labels = frozenset({"odd", "person"})
    probes = (Probe("odd", "input", block=True), Probe("fine", "input", block=False))

    def __init__(self, version: str) -> None:
        self.version = version

    def judge(self, text: str, stage: Stage, context: Context = ALONE) -> Any:
        """The judgement, or worse."""
        match text.partition(" ")[0]:
            case "hang":
                time.sleep(600)
            case "slow":
                time.sleep(0.3)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                sys.exit(text)
            case "raise":
                raise LookupError(text)
            case "prose":
                return f"I find that {text} is harmless"
            case "print":
                print(text, flush=True)
                os.write(2, text.encode())
                structlog.get_logger().error(text)
            case "context":
                return Judgement(0.5, "person", block=context.system + context.prompt + context.tenant == "spt")
        return Judgement(0.9 if text == "odd" else 0.1, "odd" if text == "odd" else "", text == "odd")


class Gathering:
    """Stands in for `injection`: judges many at once, and its score says how many those were, in hundredths."""

    name, version = "injection", "g1"
    stages: frozenset[Stage] = frozenset({"input"})
    labels = frozenset({"bad"})
    probes = (Probe("bad", "input", block=True), Probe("fine", "input", block=False))

    def judge(self, text: str, stage: Stage, context: Context = ALONE) -> Judgement:
        """One."""
        if text == "wait":
            time.sleep(0.4)
        return Judgement(0.01, "bad" if text == "bad" else "", text == "bad")

    def judge_many(self, texts: Sequence[Text]) -> list[Judgement]:
        """Together; one that is not for it spoils the call."""
        if any(text.text == "spoil" for text in texts):
            raise ValueError
        return [Judgement(len(texts) / 100, "", block=False) for _ in texts]


def settings(folder: Path, *, gathering: bool = False, **sidecar: Any) -> GuardsConfig:
    """Both guards in a sidecar that listens in `folder`."""
    policy = {"where": "sidecar", "deadline_ms": DEADLINE_MS, "stages": ["input"]}
    order = ["injection"] if gathering else ["secrets"]
    place = {"socket": str(folder / "g.sock"), "connect_timeout_ms": 1_000, **sidecar}
    return GuardsConfig.model_validate(
        {"order": order, "cache_entries": 0, "secrets": policy, "injection": policy, "sidecar": place}
    )


class Process:
    """One sidecar's processes."""

    def __init__(self, config: GuardsConfig, folder: Path, version: str = "o1") -> None:
        self.config, self.log = config, folder / "sidecar.log"
        command = [sys.executable, "-m", "tests.collector.guards.sidecars", config.model_dump_json(), version]
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(command, stdout=log, stderr=log)

    def wait(self) -> "Process":
        """Until it serves."""
        sidecar = Sidecar(self.config.sidecar)
        try:
            assert sidecar.wait(30), self.log.read_text()
        finally:
            sidecar.close()
        return self

    @property
    def front(self) -> int:
        """The pid of the one that servers talk with."""
        (pid,) = children(self.popen.pid)
        return pid

    def below(self) -> list[list[int]]:
        """The pids by generation: front, nursery, workers."""
        found, pids = [], [self.popen.pid]
        while pids := [child for pid in pids for child in children(pid)]:
            found.append(pids)
        return found

    def workers(self) -> list[int]:
        """Those that judge."""
        below = self.below()
        return below[2] if len(below) == 3 else []

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; its status."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(20)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def lives(pid: int) -> bool:
    """Whether a process is there that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


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


@contextmanager
def serving(config: GuardsConfig, folder: Path, version: str = "o1") -> Iterator[Process]:
    """A sidecar that serves."""
    process = Process(config, folder, version)
    try:
        yield process.wait()
    finally:
        process.popen.send_signal(signal.SIGCONT)
        process.stop()


@contextmanager
def false_sidecar(config: GuardsConfig, behave: Callable[[socket.socket], None]) -> Iterator[list[bytes]]:
    """Something else that listens at its place; what it was sent. `behave`: what it does with each connection."""
    sent: list[bytes] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(config.sidecar.socket))
    listener.listen(8)
    stopping = threading.Event()

    def answer(peer: socket.socket) -> None:
        with peer:
            behave(peer)
            peer.settimeout(0.2)
            while not stopping.is_set():
                try:
                    data = peer.recv(65_536)
                except TimeoutError:
                    continue
                except OSError:
                    return
                if not data:
                    return
                sent.append(data)

    def serve() -> None:
        listener.settimeout(0.1)
        while not stopping.is_set():
            try:
                peer, _ = listener.accept()
            except OSError:
                continue
            threading.Thread(target=answer, args=(peer,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield sent
    finally:
        stopping.set()
        thread.join(5)
        listener.close()
        config.sidecar.socket.unlink(missing_ok=True)


def main() -> None:
    """The process."""
    from collector.guards.sidecar import run_sidecar

    version = sys.argv[2]
    SecretsConfig.build = lambda _: Obedient(version)  # type: ignore[method-assign,assignment]
    InjectionConfig.build = lambda _: Gathering()  # type: ignore[method-assign,assignment]
    run_sidecar(GuardsConfig.model_validate(json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
