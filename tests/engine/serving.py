"""`inferwatch serve` as a process of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from tests.engine.conftest import FLAGS, Site

ROOT = Path(__file__).parent.parent.parent


class Process:
    """One `inferwatch serve`, with the site's configuration."""

    def __init__(self, site: Site, model: Path, *flags: str, entry: Sequence[str] = ("-m", "inferwatch.cli")) -> None:
        self.site = site
        self.log = site.folder / "serve.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, *entry, "serve", "--config", str(site.config_file), str(model)]
        command += [*FLAGS, *flags, "--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_ready(self, timeout_s: float = 480) -> None:
        """Returns when it answers /health; fails with the end of its log."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        pytest.fail(f"the server did not start: {self.log.read_text(errors='replace')[-3000:]}")

    def freeze_engine(self) -> None:
        """SIGSTOP to the processes that compute: from here on no answer gets through, however fast the machine is."""
        self._signal_engine(signal.SIGSTOP)

    def kill_engine(self) -> None:
        """SIGKILL to the processes that compute."""
        self._signal_engine(signal.SIGKILL)

    def _signal_engine(self, number: signal.Signals) -> None:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert children, "the engine runs in the server's own process: it can't be stopped alone"
        for child in children:
            os.kill(int(child), number)

    def client(self) -> httpx.Client:
        """HTTP with a good key."""
        headers = {"authorization": f"Bearer {self.site.api_key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def kill(self) -> None:
        """SIGKILL to the server, its children with it."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait(30)
