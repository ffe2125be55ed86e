"""`inferwatch broker`: a real Apache Kafka (KRaft, one process) for development and tests, without Docker or a JDK.

Loopback only, no login, replication 1: not for production (compose/ has the settings for that). Guarantee: what was
acknowledged survives SIGKILL of the broker; a power cut may lose what the system had not yet written to disk.

Tests of TLS and login give it a `SecureListener`: a second port that asks for both.
"""

import argparse
import asyncio
import base64
import fcntl
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Final, NoReturn

import structlog
from rich.console import Console
from rich.progress import Progress

from collector.kafka import BrokerAway, KafkaConfig, wait_for_broker
from streams import jars
from streams.broker_properties import HOST, LOGGING, SETTINGS, SecureListener, secured
from streams.config import BrokerSettings
from streams.java import NoJava, find_java

log = structlog.get_logger(__name__)

KAFKA_VERSION: Final = "4.3.1"
RUN_FILE: Final = "broker.json"
"""In the data folder while it serves: {"bootstrap": "HOST:PORT", "pid": of the JVM}."""
_STOP_TIMEOUT_S: Final = 20.0
_PORT_TRIES: Final = 3
_TROUBLE: Final = re.compile("severe|error|exception", re.IGNORECASE)


class BrokerError(RuntimeError):
    """The broker can't start or has stopped; the message is one sentence with what to do."""


class Broker:
    """One broker process. `start` blocks until it serves; from async code call it in a thread.

    Raises BrokerError, NoJava or JarError.

    The Java process ends with this one, however this one ends (where the system has `setpriv`).
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        progress: jars.Progress = lambda _done, _all, _name: None,
        lock_file: Path = jars.LOCK_FILE,
        secure: SecureListener | None = None,
    ) -> None:
        """`lock_file` names the jars: another version of Kafka, for tests."""
        self.settings = settings
        self.port = settings.port
        """The real port once started; kept over a restart."""
        self.secure_port = 0
        """That of the secure listener."""
        self._lock_file, self._secure = lock_file, secure
        self._progress = progress
        self._dir = settings.data_dir.resolve()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None
        self._log_start = 0
        """Where this start's lines begin in broker.0.log."""

    @property
    def bootstrap(self) -> str:
        """HOST:PORT for clients."""
        return f"{HOST}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Of the Java process; None while there is none."""
        return None if self._process is None else self._process.pid

    @property
    def logs_dir(self) -> Path:
        """broker.0.log is the newest; jvm.log has what Java itself printed at the last start."""
        return self._dir / "logs"

    def start(self) -> None:
        """Fetch, format, start, and return once the broker answers a metadata request."""
        if self._process is not None and self._process.poll() is None:
            raise BrokerError(f"this broker runs already at {self.bootstrap}")
        self.kill()  # what a crash of Kafka left: the lock and the run file
        java = find_java(self.settings.java)
        cache = self.settings.cache_dir or jars.default_cache()
        paths = jars.classpath(cache, self._progress, lock_file=self._lock_file)
        self._take_folder()
        try:
            self._format(java, paths)
            self._start_serving(java, paths)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after 20 s; give the folder back. Does nothing where there is nothing to stop."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                log.warning("broker did not stop in time, killed", timeout_s=_STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """SIGKILL, as a crash would; `start` brings it back on the same port with the same records."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._lock is not None:
            (self._dir / RUN_FILE).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def wait(self, timeout_s: float | None = None) -> int | None:
        """The Java process's exit status once it ends; None after `timeout_s` seconds."""
        if self._process is None:
            return None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def _take_folder(self) -> None:
        if any(character in str(self._dir) for character in ",\\%\n"):
            raise BrokerError(f"Kafka can't use the folder {self._dir}: no comma, backslash or % in broker.data_dir")
        try:
            self.logs_dir.mkdir(parents=True, exist_ok=True)
            self._lock = (self._dir / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if self._lock is not None:
                self._lock.close()
                self._lock = None
            raise BrokerError(f"another broker uses {self._dir}: stop it, or set another broker.data_dir") from None
        except OSError as error:
            raise BrokerError(f"can't use broker.data_dir {self._dir}: {error.strerror}") from None
        (self._dir / RUN_FILE).unlink(missing_ok=True)  # of one that was killed

    def _format(self, java: Path, paths: list[Path]) -> None:
        """Format the KRaft folder once: beside, then renamed, so that it is whole or absent."""
        if (self._dir / "data").is_dir():
            return
        fresh = self._dir / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        settings = self._write_settings(fresh, _free_port())
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        tool = ["-Xmx128m", "kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", "-c", str(settings)]
        if self._secure is not None:
            tool.append(f"--add-scram=SCRAM-SHA-512=[name={self._secure.user},password={self._secure.password}]")
        self._process = self._spawn(java, paths, tool)
        status = self._process.wait()
        self._process = None
        if status != 0:
            raise BrokerError(f"Kafka could not format {self._dir}: {self._last_words()}")
        fresh.rename(self._dir / "data")

    def _start_serving(self, java: Path, paths: list[Path]) -> None:
        for attempt in range(_PORT_TRIES):
            picked = self.port == 0
            port = _free_port() if picked else _check_port(self.port)
            self.port = port
            settings = self._write_settings(self._dir / "data", _free_port(other_than=port))
            options = [f"-Xmx{self.settings.heap_mb}m", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError"]
            options += ["-XX:TieredStopAtLevel=1"] if self.settings.quick_start else []
            options += [f"-Djava.util.logging.config.file={self._write_logging()}"]
            newest = self.logs_dir / "broker.0.log"
            self._log_start = newest.stat().st_size if newest.is_file() else 0
            self._process = self._spawn(java, paths, [*options, "kafka.Kafka", str(settings)])
            try:
                asyncio.run(self._serving())
            except BrokerError as error:
                # Another process took the free port (ours or the controller's) before Kafka did.
                if "in use" not in str(error) or attempt == _PORT_TRIES - 1:
                    raise
                self._process = None
                self.port = 0 if picked else port
            else:
                break
        run_file = self._dir / f"{RUN_FILE}.new"
        run_file.write_text(json.dumps({"bootstrap": self.bootstrap, "pid": self.pid}), encoding="utf-8")
        run_file.rename(self._dir / RUN_FILE)

    async def _serving(self) -> None:
        config = KafkaConfig(bootstrap_servers=self.bootstrap, request_timeout_ms=2000)
        waiting = asyncio.create_task(wait_for_broker(config, self.settings.start_timeout_s))
        while not (await asyncio.wait([waiting], timeout=0.1))[0]:
            if self._process is not None and self._process.poll() is not None:
                waiting.cancel()
                raise BrokerError(f"Kafka stopped while starting: {self._last_words()}")
        try:
            waiting.result()
        except BrokerAway as error:
            raise BrokerError(f"{error}; its log: {self.logs_dir / 'broker.0.log'}") from None

    def _spawn(self, java: Path, paths: list[Path], arguments: list[str]) -> subprocess.Popen[bytes]:
        command = [str(java), "-cp", ":".join(map(str, paths)), *arguments]
        if setpriv := shutil.which("setpriv"):
            command = [setpriv, "--pdeathsig", "TERM", *command]
        started: list[subprocess.Popen[bytes]] = []
        ready = threading.Event()

        def keep() -> None:
            # The death signal comes when the *thread* that started the child ends, so this one lives as long.
            try:
                with (self.logs_dir / "jvm.log").open("wb") as printed:
                    process = subprocess.Popen(  # noqa: S603  # our own command, no shell
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=printed,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # a Ctrl-C is ours to handle
                        # The lock of the folder lives as long as the Java process.
                        pass_fds=[self._lock.fileno()] if self._lock is not None else [],
                    )
                started.append(process)
            finally:
                ready.set()
            process.wait()

        threading.Thread(target=keep, name="kafka-keeper", daemon=True).start()
        ready.wait()
        if not started:
            raise BrokerError(f"can't run {java}")
        return started[0]

    def _last_words(self) -> str:
        """The sentence in the logs that most likely says why, and where the logs are."""
        text = ""
        for file, start in (("broker.0.log", self._log_start), ("jvm.log", 0)):
            if (self.logs_dir / file).is_file():
                lines = (self.logs_dir / file).read_bytes()
                text += lines[start if start <= len(lines) else 0 :][-50_000:].decode(errors="replace")
        if "Address already in use" in text:
            reason = f"port {self.port} of {HOST}, or the controller's, is in use"
        else:
            wrong = [line for line in text.splitlines() if _TROUBLE.search(line)]
            reason = wrong[-1].strip()[:300] if wrong else "it gave no reason"
        return f"{reason} (logs: {self.logs_dir})"

    def _write_logging(self) -> Path:
        file = self._dir / "logging.properties"
        file.write_text(LOGGING.format(logs=self.logs_dir, limit=self.settings.log_bytes_max), encoding="utf-8")
        return file

    def _write_settings(self, data: Path, controller_port: int) -> Path:
        file = self._dir / "server.properties"
        written = SETTINGS.format(host=HOST, port=self.port or 1, controller=controller_port, data=data)
        if self._secure is not None:
            self.secure_port = self.secure_port or _free_port(other_than=self.port)
            written = secured(written, self._secure, self.secure_port)
        file.write_text(written, encoding="utf-8")
        return file


def _free_port(other_than: int = 0) -> int:
    """A port that nobody has now; the system may give the same one twice in a row."""
    while True:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = int(probe.getsockname()[1])
        if port != other_than:
            return port


def _check_port(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just closed is free
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise BrokerError(
                f"port {port} of {HOST} is taken ({error.strerror}): set broker.port, or 0 for any"
            ) from None
    return port


@contextmanager
def _shown_progress() -> Iterator[jars.Progress]:
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = None

        def show(done: int, total: int, name: str) -> None:
            nonlocal task
            if task is None:
                task = bar.add_task("fetching Apache Kafka (once)", total=total)
            bar.update(task, completed=done, description=f"fetching Apache Kafka (once): {name}")

        yield show


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def run(settings: BrokerSettings) -> None:
    """Serve until SIGTERM or SIGINT; raises BrokerError where it can't, or when Kafka ends by itself."""
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    with _shown_progress() as progress:
        broker = Broker(settings, progress=progress)
    try:
        started_s = time.monotonic()
        broker.start()
        took_s = time.monotonic() - started_s
        print(f"Apache Kafka {KAFKA_VERSION} serves at {broker.bootstrap} after {took_s:.1f} s", flush=True)
        status = broker.wait()
        raise BrokerError(f"Kafka ended by itself with status {status}: {broker._last_words()}")
    except KeyboardInterrupt:
        log.info("broker stopping", bootstrap=broker.bootstrap)
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # the stop itself is bounded
        broker.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """`python -m streams.broker --port 0 --data-dir DIR`: the broker alone, without a configuration file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, default=9092)
    parser.add_argument("--data-dir", type=Path, default=Path(".inferwatch/kafka"))
    parser.add_argument("--heap-mb", type=int, default=512)
    parser.add_argument("--quick-start", action="store_true")
    try:
        run(BrokerSettings(**vars(parser.parse_args())))
    except (BrokerError, NoJava, jars.JarError, ValueError) as error:
        sys.exit(f"inferwatch broker: {error}")


if __name__ == "__main__":
    main()
