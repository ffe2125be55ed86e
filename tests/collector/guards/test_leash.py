"""What a guard has started ends with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from collector.guards import leash
from tests.collector.guards.sidecars import lives
from tests.collector.guards.test_stack import wait_until

ASKING = """
import asyncio, sys
from collector.guards import codeshield
with codeshield.scratch(600):
    asyncio.run(codeshield._run_semgrep(["sh", "-c", "sleep 600 & echo $! $$ >&3; sleep 600", "semgrep"]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_semgrep_and_its_children_end_with_a_killed_worker(number: signal.Signals, tmp_path: Path) -> None:
    """However the worker ends: within moments, nothing of what it has started is left."""
    told = tmp_path / "pids"
    asking = ASKING.replace(">&3", f">{told}")
    with subprocess.Popen([sys.executable, "-c", asking]) as worker:
        wait_until(lambda: told.exists() and told.read_text().endswith("\n"))
        pids = [int(pid) for pid in told.read_text().split()]
        assert all(map(lives, pids))
        os.kill(worker.pid, number)
    wait_until(lambda: not any(map(lives, pids)))


def test_a_command_on_the_leash_says_what_it_says() -> None:
    """Its output and its exit status are the command's, while the leash is held."""
    end, held = os.pipe()
    done = subprocess.run(
        [sys.executable, "-I", "-S", leash.__file__, "sh", "-c", "echo said; exit 3"],
        stdin=end,
        stdout=subprocess.PIPE,
        start_new_session=True,
        check=False,
    )
    os.close(end)
    os.close(held)
    assert (done.stdout, done.returncode) == (b"said\n", 3)
