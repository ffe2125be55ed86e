"""What a batch of requests to one server costs. CPU is that of the server process with all its threads, journal and
producer included, the engine core apart.
"""

import http.client
import json
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tests.bench.servers import Server

WORDS = ("the", "quick", "system", "answers", "users", "with", "short", "helpful", "messages", "while", "tokens", "go")


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
