"""Stream processes for tests: started as real processes, killed for real."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from collector.kafka import KafkaConfig
from detectors.config import DetectConfig
from streams.config import StreamsConfig

ROOT = Path(__file__).parent.parent.parent
QUICK = {"session_timeout_s": 2.0, "tick_after_s": 1.0, "status_interval_s": 1.0, "state_interval_s": 0.3}


class Worker:
    """One process of a role: stage1, stage2, ingest (chDB in FOLDER/store) or deliver (to FOLDER/findings.jsonl)."""

    def __init__(
        self,
        role: str,
        kafka: KafkaConfig,
        folder: Path,
        *,
        name: str = "",
        detect: DetectConfig | None = None,
        **streams: object,
    ) -> None:
        self.role = role
        self.folder = folder / (name or role)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "log"
        self._kafka = kafka
        self._detect = detect or DetectConfig()
        self._streams = QUICK | streams
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Starts it, or starts it again with the same folder."""
        (self.folder / "url").unlink(missing_ok=True)
        told = {
            "role": self.role,
            "kafka": self._kafka.model_dump(mode="json"),
            "detect": self._detect.model_dump(mode="json"),
            "streams": self._streams,
            "folder": str(self.folder),
        }
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.streams.worker", json.dumps(told)],
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        return self

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The running process."""
        assert self._process is not None
        return self._process

    def kill9(self) -> None:
        """SIGKILL, as a crash."""
        self.process.kill()
        self.process.wait()

    def send(self, number: signal.Signals) -> None:
        """Any signal."""
        self.process.send_signal(number)

    def stop(self, timeout_s: float = 10) -> int:
        """SIGTERM; the exit status, or an error after `timeout_s`."""
        self.process.terminate()
        return self.process.wait(timeout_s)

    def get(self, page: str) -> str:
        """A health page; empty while there is none, or when it says no."""
        try:
            url = (self.folder / "url").read_text()
            with urllib.request.urlopen(f"{url}/{page}", timeout=2) as answer:  # noqa: S310  # a loopback address
                return str(answer.read().decode())
        except (OSError, ValueError):
            return ""

    def metric(self, name: str) -> float:
        """The value of `inferwatch_NAME`; NaN while it is not told."""
        for line in self.get("metrics").splitlines():
            if line.startswith(f"inferwatch_{name}{{"):
                return float(line.rpartition(" ")[2])
        return float("nan")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def wait_until(true: Callable[[], bool], what: str, timeout_s: float = 40, *workers: Worker) -> None:
    """Returns once `true()`; fails with the workers' logs after `timeout_s`."""
    end_s = time.monotonic() + timeout_s
    while not true():
        for worker in workers:
            assert worker.process.poll() is None, f"{worker.role} ended:\n{worker.log.read_text()[-3000:]}"
        if time.monotonic() > end_s:
            logs = "\n".join(f"== {worker.role}\n{worker.log.read_text()[-3000:]}" for worker in workers)
            raise AssertionError(f"not within {timeout_s:g} s: {what}\n{logs}")
        time.sleep(0.1)


def _main(told: Mapping[str, object]) -> None:
    from sinks.config import FileConfig, SinksConfig
    from streams.deliver import run_deliver
    from streams.stage1 import run_stage1
    from streams.stage2 import run_stage2

    kafka = KafkaConfig.model_validate(told["kafka"])
    streams = StreamsConfig.model_validate(told["streams"])
    folder = Path(str(told["folder"]))

    def serving(url: str) -> None:
        beside = folder / f"url.{os.getpid()}"
        beside.write_text(url)
        beside.rename(folder / "url")

    if told["role"] == "ingest":
        _ingest(kafka, streams, folder, serving)
    elif told["role"] == "deliver":
        sinks = SinksConfig(file=FileConfig(path=folder / "findings.jsonl"))
        run_deliver(kafka, streams, sinks, config_digest="test", on_serving=serving)
    else:
        run = {"stage1": run_stage1, "stage2": run_stage2}[str(told["role"])]
        detect = DetectConfig.model_validate(told["detect"])
        run(kafka, detect, streams, data_dir=folder, config_digest="test", on_serving=serving)


def _ingest(kafka: KafkaConfig, streams: StreamsConfig, folder: Path, serving: Callable[[str], None]) -> None:
    import asyncio

    from sinks.clickhouse.store import open_store
    from sinks.config import StoreConfig
    from streams.health import Health
    from streams.ingest import Ingest
    from streams.process import run_until_stopped

    store = open_store(StoreConfig(url=str(folder / "store")))

    async def main(stop: asyncio.Event) -> None:
        ingest = Ingest(kafka, streams, DetectConfig().time, store, data_dir=folder / "progress")
        async with Health("ingest", kafka, streams, ingest.reading) as health:
            serving(health.url)
            running = asyncio.create_task(ingest.run())
            await stop.wait()
            ingest.stop()
            await running

    run_until_stopped(main)
    store.close()


if __name__ == "__main__":
    try:
        _main(json.loads(sys.argv[1]))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
