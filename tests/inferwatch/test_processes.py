"""The supervisor: readiness, death, restart with back-off, and a clean stop, on real processes."""

import os
import sys
import time
from pathlib import Path

import pytest

from inferwatch.processes import Child, ProcessDied, Supervisor, run_file, write_run_file

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)",
]


def test_a_process_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    """The message has role, exit status, the last line it printed and where the log is."""
    child = Child("store", [sys.executable, "-c", "print('no room on the disk'); raise SystemExit(3)"], tmp_path)
    child.start()
    with pytest.raises(ProcessDied) as caught:
        child.wait_ready(10)
    assert str(caught.value) == (
        f"store ended (exit status 3): no room on the disk The whole log: {tmp_path / 'logs' / 'store.log'}"
    )


def test_a_process_that_never_serves_times_out(tmp_path: Path) -> None:
    """It is not waited for without end."""
    child = Child("store", SLEEPER, tmp_path)
    child.start()
    try:
        with pytest.raises(TimeoutError, match="store was not ready after 0 s"):
            child.wait_ready(0.2)
    finally:
        Supervisor([child]).stop()


def test_what_died_is_started_again_after_its_delay(tmp_path: Path) -> None:
    """One second the first time, two the second; not before."""
    now_s = 100.0
    child = Child("deliver", [sys.executable, "-c", ""], tmp_path)
    supervisor = Supervisor([child], clock=lambda: now_s)
    child.start()
    seen = []
    for step_s in (0.0, 0.5, 0.6, 0.0, 1.5, 0.6):
        assert child.process is not None
        child.process.wait(10)
        now_s += step_s
        supervisor.watch_once()
        seen.append(child.restarts)
    assert seen == [0, 0, 1, 1, 1, 2]
    supervisor.stop()


def test_stop_ends_even_a_process_that_ignores_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM first, SIGKILL after the time-out; nothing is left running."""
    child = Child("engine", STUBBORN, tmp_path)
    child.start()
    assert child.process is not None
    while not child.log_file.read_text():
        time.sleep(0.02)
    child.signal(15)  # type: ignore[arg-type]  # the number is the signal
    child.wait_stopped(0.3)
    with pytest.raises(ProcessLookupError):
        os.kill(child.process.pid, 0)


def test_the_run_file_says_where_a_role_serves(tmp_path: Path) -> None:
    """Its address is read from there; a broken file is no address."""
    child = Child("store", SLEEPER, tmp_path)
    assert child.address() == ""
    write_run_file(tmp_path, "store", "http://127.0.0.1:1")
    assert child.address() == "http://127.0.0.1:1"
    run_file(tmp_path, "store").write_text("{")
    assert child.address() == ""
