"""Servers side by side over one broker: bare, and behind the collector in as many settings as a benchmark compares.

`engine` is `vllm serve` and `inferwatch serve` on the tiny model; `standin` the same app with an engine that answers at
once (`standin_server.py`). Each server has a folder, journal, keys and configuration of its own.
"""

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from collector.identity import create_key_file
from inferwatch.demo_setup import engine_environment
from inferwatch.keys import add_api_key
from inferwatch.tiny_model import write_tiny_model
from tests.conftest import ROOT, RunningBroker

Part = Literal["engine", "standin"]
FLAGS = [
    *("--served-model-name", "tiny", "--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "16"),
    *("--enforce-eager", "--distributed-executor-backend", "uni", "--host", "127.0.0.1"),
    *("--load-format", "safetensors", "--shutdown-timeout", "5", "--disable-uvicorn-access-log"),
    # The prefix cache would make the second server of a pair no faster, but later batches: every prompt is new anyway.
    "--no-enable-prefix-caching",
]
ENVIRONMENT = {**engine_environment(), "VLLM_LOGGING_LEVEL": "WARNING"}
START_TIMEOUT_S = 300
NO_GUARD: Final = "[collector.guards]\norder = []\n"
"""The audit alone."""


@dataclass
class Server:
    """A running server and the client's key."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    api_key: str

    def cpu_s(self) -> tuple[float, float]:
        """CPU time of the event loop's thread and of all threads so far, by the scheduler's nanosecond counters."""
        loop_ns = total_ns = 0
        for file in Path(f"/proc/{self.process.pid}/task").glob("*/schedstat"):
            try:
                spent_ns = int(file.read_text().split()[0])
            except OSError:
                continue  # a thread that ended meanwhile
            total_ns += spent_ns
            loop_ns += spent_ns if file.parent.name == str(self.process.pid) else 0
        return loop_ns / 1e9, total_ns / 1e9

    def wait_ready(self) -> None:
        """Returns when it answers /health."""
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end and self.process.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.2)
            finally:
                connection.close()
        raise RuntimeError(f"the {self.name} server did not start")


@contextmanager
def side_by_side(part: Part, folder: Path, wanted: Mapping[str, str | None]) -> Iterator[list[Server]]:
    """These servers by name, up and warm, as long as the context lasts.

    `wanted`: what the configuration of each says beyond where things are; None: bare, without the collector.
    Raises RuntimeError where one does not start.
    """
    broker = RunningBroker(folder / "kafka")
    broker.start()
    model = write_tiny_model(folder / "tiny") if part == "engine" else Path()
    made: list[Server] = []
    try:
        for number, (name, settings) in enumerate(wanted.items()):
            command = _command(part, model, bare=settings is None)
            made.append(_start(name, command, folder / f"server-{number}", broker, settings))
            made[-1].wait_ready()  # one after the other: all at once they keep each other from getting up
            print(f"{part}: {name} is up", file=sys.stderr, flush=True)
        yield made
    finally:
        for server in made:
            server.process.terminate()
        for server in made:
            try:
                server.process.wait(30)
            except subprocess.TimeoutExpired:
                server.process.kill()
        broker.stop()


def _command(part: Part, model: Path, *, bare: bool) -> list[str]:
    if part == "standin":
        return ["tests.bench.standin_server", "bare" if bare else "wrapped"]
    return ["vllm.entrypoints.cli.main" if bare else "inferwatch.cli", "serve", str(model), *FLAGS, "--port"]


def _start(name: str, command: list[str], home: Path, broker: RunningBroker, settings: str | None) -> Server:
    home.mkdir()
    surroundings, api_key, port = {**os.environ, **ENVIRONMENT}, "", _free_port()
    if settings is not None:
        config, api_key = _configuration(home, broker, settings)
        surroundings["INFERWATCH_CONFIG"] = str(config)
    arguments = [sys.executable, "-m", *command, str(port)]
    with (home / "log").open("wb") as out:
        process = subprocess.Popen(arguments, cwd=ROOT, env=surroundings, stdout=out, stderr=subprocess.STDOUT)
    return Server(name, process, port, api_key)


def _configuration(home: Path, broker: RunningBroker, settings: str) -> tuple[Path, str]:
    """The file and an API key."""
    create_key_file(home / "keys" / "default.key")
    api_key, _ = add_api_key(home / "api-keys.toml", tenant="default", user="bench", on_behalf=False)
    config = home / "inferwatch.toml"
    config.write_text(
        f'data_dir = "{home}"\n[kafka]\nbootstrap_servers = "{broker.bootstrap}"\n'
        f'[collector]\ncollector_id = "{home.name}"\n[collector.identity]\nkey_dir = "{home}/keys"\n'
        f'api_keys_file = "{home}/api-keys.toml"\n[collector.journal]\ndir = "{home}/journal"\n{settings}'
    )
    return config, api_key


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
