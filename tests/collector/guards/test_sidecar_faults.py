"""What becomes of requests when the sidecar, or a part of it, is killed, hangs or is stopped."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import pytest

from collector.event import GuardResult
from collector.guards.sidecar_client import DeadlineExceeded
from collector.guards.stack import GuardStack
from collector.guards.wire import Ask
from tests.collector.guards.sidecars import (
    BACK_S,
    LIMIT_S,
    Process,
    judged_again,
    lives,
    one,
    settings,
    told,
)
from tests.collector.guards.test_stack import wait_until


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
        wait_until(lambda: not any(map(lives, below)))
        assert process.stop() == 0
        assert not config.sidecar.socket.exists()
    finally:
        stack.close()
        process.stop(signal.SIGKILL)


def test_what_was_never_written_is_not_waited_for(stack: GuardStack) -> None:
    """A question that could not be sent in time leaves nothing behind."""
    sidecar = stack._remote["secrets"]._sidecar
    link = sidecar._link
    assert link is not None
    with link._writing, pytest.raises(DeadlineExceeded):
        sidecar.ask([Ask("secrets", 50, "input", b"fine")] * 3, time.monotonic() + 0.05)
    assert link._pending == {}
    judged_again(stack)
