"""Two servers side by side, bare and behind the collector, and what a batch of requests to one of them costs.

`engines` starts `vllm serve` and `inferwatch serve` on the tiny model; `standins` the same app twice, its engine
answering at once (`standin_server.py`). CPU is that of the server process with all its threads, journal and producer
included, the engine core apart.
"""

import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from collector.identity import create_key_file
from inferwatch.keys import add_api_key
from inferwatch.tiny_model import write_tiny_model
from tests.conftest import ROOT, RunningBroker

FLAGS = [
    *("--served-model-name", "tiny", "--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "16"),
    *("--enforce-eager", "--distributed-executor-backend", "uni", "--host", "127.0.0.1"),
    *("--load-format", "safetensors", "--shutdown-timeout", "5", "--disable-uvicorn-access-log"),
    # The prefix cache would make the second server of a pair no faster, but later batches: every prompt is new anyway.
    "--no-enable-prefix-caching",
]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
WORDS = ("the", "quick", "system", "answers", "users", "with", "short", "helpful", "messages", "while", "tokens", "go")
START_TIMEOUT_S = 300


class Shape(NamedTuple):
    """What the requests of a batch are like."""

    words: int
    """Of the prompt; 5,500 words are some 33,000 characters, 8,000 tokens of a usual vocabulary."""
    output_tokens: int = 4
    stream: bool = False
    clients: int = 1
    """Requests under way at once."""
    share: float = 1.0
    """Of the requests a batch has."""


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


class Batch(NamedTuple):
    """What one batch cost: microseconds a request."""

    cpu_us: float
    """Of all threads."""
    loop_cpu_us: float
    """Of the event loop's thread alone: what requests wait for."""
    latency_us: float
    """Median; for streams to the first event."""
    rate: float
    """Requests answered a second."""


@contextmanager
def engines(folder: Path) -> Iterator[tuple[Server, Server]]:
    """Bare and wrapped vLLM on the tiny model, up and warm."""
    model = write_tiny_model(folder / "tiny")
    commands = {
        "bare": ["vllm.entrypoints.cli.main", "serve", str(model), *FLAGS, "--port"],
        "wrapped": ["inferwatch.cli", "serve", str(model), *FLAGS, "--port"],
    }
    with _pair(folder, commands, ENVIRONMENT) as both:
        yield both


@contextmanager
def standins(folder: Path) -> Iterator[tuple[Server, Server]]:
    """Bare and wrapped servers whose engine answers at once."""
    commands = {name: ["tests.bench.standin_server", name] for name in ("bare", "wrapped")}
    with _pair(folder, commands, {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}) as both:
        yield both


@contextmanager
def _pair(
    folder: Path, commands: Mapping[str, list[str]], environment: Mapping[str, str]
) -> Iterator[tuple[Server, Server]]:
    broker = RunningBroker(folder / "kafka")
    broker.start()
    started: list[subprocess.Popen[bytes]] = []
    try:
        config, api_key = _configuration(folder, broker)
        made = []
        for name, command in commands.items():
            port = _free_port()
            surroundings = {**os.environ, **environment}
            if name == "wrapped":
                surroundings["INFERWATCH_CONFIG"] = str(config)
            with (folder / f"{name}.log").open("wb") as out:
                started.append(
                    subprocess.Popen(
                        [sys.executable, "-m", *command, str(port)],
                        cwd=ROOT,
                        env=surroundings,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )
            made.append(Server(name, started[-1], port, api_key))
            made[-1].wait_ready()
        yield made[0], made[1]
    finally:
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        broker.stop()


def _configuration(folder: Path, broker: RunningBroker) -> tuple[Path, str]:
    """The audit alone: no guard. Returns the file and an API key."""
    create_key_file(folder / "keys" / "default.key")
    api_key, _ = add_api_key(folder / "api-keys.toml", tenant="default", user="bench", on_behalf=False)
    config = folder / "inferwatch.toml"
    config.write_text(
        f'data_dir = "{folder}"\n[kafka]\nbootstrap_servers = "{broker.bootstrap}"\n'
        f'[collector]\ncollector_id = "bench"\n[collector.identity]\nkey_dir = "{folder}/keys"\n'
        f'api_keys_file = "{folder}/api-keys.toml"\n[collector.journal]\ndir = "{folder}/journal"\n'
        "[collector.guards]\norder = []\n"
    )
    return config, api_key


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def body(draw: random.Random, shape: Shape) -> bytes:
    """A chat of the shape's words, never the same twice."""
    text = " ".join(draw.choices(WORDS, k=shape.words))
    messages = [{"role": "user", "content": f"{draw.getrandbits(64):x} {text}"}]
    request = {"model": "tiny", "messages": messages, "max_tokens": shape.output_tokens, "ignore_eos": True}
    return json.dumps({**request, "stream": shape.stream}).encode()


def measure(server: Server, bodies: Sequence[bytes], shape: Shape) -> Batch:
    """Send the bodies, as many at once as the shape says."""
    loop_s, cpu_s = server.cpu_s()
    began_s = time.perf_counter()
    shares = [bodies[client :: shape.clients] for client in range(shape.clients)]
    with ThreadPoolExecutor(shape.clients) as pool:
        parts = pool.map(lambda share: _ask(server, share, shape.stream), shares)
        latencies_s = [latency for part in parts for latency in part]
    took_s = time.perf_counter() - began_s
    time.sleep(0.3)  # what the journal still owes to Kafka is part of the cost, for the bare server idling is
    loop_end_s, cpu_end_s = server.cpu_s()
    return Batch(
        (cpu_end_s - cpu_s) / len(bodies) * 1e6,
        (loop_end_s - loop_s) / len(bodies) * 1e6,
        statistics.median(latencies_s) * 1e6,
        len(bodies) / took_s,
    )


def _ask(server: Server, bodies: Sequence[bytes], stream: bool) -> list[float]:
    """One client: its requests one after the other over one connection; seconds each."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"content-type": "application/json", "authorization": f"Bearer {server.api_key}"}
    latencies_s = []
    for request in bodies:
        begin_s = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", request, headers)
        answer = connection.getresponse()
        if stream:
            answer.readline()
            latencies_s.append(time.perf_counter() - begin_s)
            answer.read()
        else:
            answer.read()
            latencies_s.append(time.perf_counter() - begin_s)
        if answer.status != 200:
            raise RuntimeError(f"the {server.name} server answered {answer.status}")
    connection.close()
    return latencies_s
