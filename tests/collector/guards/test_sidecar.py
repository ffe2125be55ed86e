"""Guards in a sidecar: the same verdicts as in process, in time, and no text gets out."""

import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from collector.guards.protocol import Context, GuardRefused
from collector.guards.sidecar_client import DeadlineExceeded
from collector.guards.stack import GuardStack
from collector.guards.wire import (
    Ask,
)
from tests.collector.guards.sidecars import CANARY, Process, judged_again, one, serving, settings, told


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
