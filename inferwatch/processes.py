"""The processes of one machine: started in order, watched, restarted with back-off, stopped cleanly.

Each role runs as its own process (`inferwatch ROLE`), logs to a file of its own, and writes `run/ROLE.json` with its
pid and health address once it serves. One that dies harms nothing but itself.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.error import URLError
from urllib.request import urlopen

import orjson
import structlog

from inferwatch.settings import CONFIG_VARIABLE

log = structlog.get_logger(__name__)

STOP_TIMEOUT_S: Final = 15.0
RESTART_DELAY_S_MAX: Final = 30.0


class ProcessDied(RuntimeError):
    """A process ended before it was ready; the message names it, its exit status, its log and the log's last line."""


def run_file(data_dir: Path, role: str) -> Path:
    """Where a running `role` says who it is and where its health is."""
    return data_dir / "run" / f"{role}.json"


def write_run_file(data_dir: Path, role: str, url: str) -> Path:
    """Tells the supervisor and `inferwatch status` that `role` serves at `url`. Written whole or not at all."""
    file = run_file(data_dir, role)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(orjson.dumps({"role": role, "pid": os.getpid(), "url": url}))
    temporary.replace(file)
    return file


def http_ok(url: str) -> bool:
    """Whether a GET of this loopback address answers 200 within a second."""
    try:
        with urlopen(url, timeout=1) as answer:  # noqa: S310  # a loopback address of our own processes
            return bool(answer.status == 200)
    except (URLError, OSError, ValueError):
        return False


@dataclass
class Child:
    """One supervised process."""

    role: str
    command: Sequence[str]
    data_dir: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = "/readyz"
    url: str = ""
    """Its address where that is known beforehand; otherwise read from the run file."""
    probe: Callable[[], bool] | None = None
    """How to tell that it serves, where it has no health address."""
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0

    @property
    def log_file(self) -> Path:
        """Everything the process prints."""
        return self.data_dir / "logs" / f"{self.role}.log"

    def start(self) -> None:
        """Starts the process in a session of its own, so that a Ctrl-C reaches the supervisor alone."""
        run_file(self.data_dir, self.role).unlink(missing_ok=True)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as out:
            self.process = subprocess.Popen(  # noqa: S603  # our own commands
                list(self.command),
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ready(self) -> bool:
        """Whether it serves. Raises `ProcessDied` when it has ended."""
        if self.process is None or self.process.poll() is not None:
            status = "not started" if self.process is None else f"exit status {self.process.returncode}"
            raise ProcessDied(f"{self.role} ended ({status}): {self._last_words()} The whole log: {self.log_file}")
        if self.probe is not None:
            return self.probe()
        return bool(self.address()) and http_ok(self.address() + self.ready_path)

    def address(self) -> str:
        """Its health address; empty while it has not said."""
        if self.url:
            return self.url
        try:
            return str(orjson.loads(run_file(self.data_dir, self.role).read_bytes())["url"])
        except (OSError, ValueError, KeyError):
            return ""

    def wait_ready(self, timeout_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Returns when it serves. Raises `ProcessDied`, or `TimeoutError` with where to look."""
        end = clock() + timeout_s
        while not self.ready():
            if clock() > end:
                raise TimeoutError(f"{self.role} was not ready after {timeout_s:.0f} s; its log: {self.log_file}")
            time.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal if it still runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def wait_stopped(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Waits for the end after SIGTERM; SIGKILL after `timeout_s`."""
        if self.process is None:
            return
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            log.warning("process did not stop in time, killed", role=self.role, timeout_s=timeout_s)
            # The whole session: an engine that hangs leaves children behind.
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        run_file(self.data_dir, self.role).unlink(missing_ok=True)

    def _last_words(self) -> str:
        try:
            lines = self.log_file.read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1][:300] if lines else "it printed nothing."


def inferwatch_child(role: str, arguments: Sequence[str], *, config: Path, data_dir: Path) -> Child:
    """A process of this environment's own `inferwatch` command."""
    command = [sys.executable, "-m", "inferwatch.cli", *arguments, "--config", str(config)]
    return Child(role, command, data_dir, {CONFIG_VARIABLE: str(config)})


class Supervisor:
    """Keeps children alive until told to stop. Stops them in reverse order of their start."""

    def __init__(self, children: Sequence[Child], *, clock: Callable[[], float] = time.monotonic) -> None:
        self.children = list(children)
        self._clock = clock
        self._restart_at: dict[str, float] = {}

    def start(self, child: Child, *, wait_s: float = 0) -> None:
        """Starts one more child and, with `wait_s`, waits until it serves."""
        if child not in self.children:
            self.children.append(child)
        child.start()
        if wait_s:
            child.wait_ready(wait_s)

    def watch_once(self) -> None:
        """Restarts what has died: after 1, 2, 4 … 30 s, each told in one line."""
        for child in self.children:
            if child.process is None or child.process.poll() is None:
                continue
            due = self._restart_at.get(child.role)
            if due is None:
                delay_s = min(2.0**child.restarts, RESTART_DELAY_S_MAX)
                self._restart_at[child.role] = self._clock() + delay_s
                log.error("process ended", role=child.role, status=child.process.returncode, restart_in_s=delay_s)
            elif self._clock() >= due:
                del self._restart_at[child.role]
                child.restarts += 1
                child.start()

    def stop(self) -> None:
        """Stops every child, the last started first."""
        for child in reversed(self.children):
            child.signal(signal.SIGTERM)
            child.wait_stopped()
