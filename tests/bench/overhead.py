"""What guards cost beside bare vLLM: requests a second, p50, p99, memory, and the time to a stream's first word.

    .venv-engine/bin/python -m tests.bench.overhead --json
    .venv-engine/bin/python -m tests.bench.overhead --only standin --rounds 8

All servers run side by side: bare; the audit with the digest of the weights, which is what there is of an integrity
check; the injection classifier beside it; with it secrets and PII, streams a window behind; the same with streams held
whole; and with the leakage guard, which needs the whole answer. `engine` is real vLLM on the tiny model, `standin` the
same app with an engine that answers at once, so that microseconds show. A round is one batch to each server, in
changing order; ratios are within a round, the medians of rounds are the figures. Prompts are never the same, so no
judgement is kept. There is no router sanitizer. The last line printed is one JSON object.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx

from tests.bench.batches import Shape
from tests.bench.servers import NO_GUARD, Part, Server, side_by_side

FULL: Final = '[collector.guards]\norder = ["injection", "secrets", "pii"]\n'
SETUPS: Final[Mapping[str, str | None]] = {
    "bare": None,
    "audit": NO_GUARD,
    "classifier": '[collector.guards]\norder = ["injection"]\n',
    "full": FULL,
    "full, held whole": f"{FULL}[collector.gate]\nhold_back_chars = 0\n",
    "with leakage": '[collector.guards]\norder = ["injection", "secrets", "pii", "leakage"]\n',
}
"""What each server's configuration has."""
SHAPES: Final[Mapping[Part, Mapping[str, Shape]]] = {
    "engine": {
        "answer": Shape(100, output_tokens=64, clients=4),
        "stream": Shape(100, output_tokens=256, stream=True, share=0.4),
    },
    "standin": {"answer": Shape(100, output_tokens=64, clients=4), "stream": Shape(100, 256, stream=True, share=0.4)},
}
SENTENCE: Final = [
    "The",
    "museum",
    "opens",
    "at",
    "nine",
    "and",
    "closes",
    "at",
    "five,",
    "and",
    "entry",
    "is",
    "free",
    "on",
    "Sundays",
    "for",
    "all",
    "visitors.",
]
GOALS: Final = {"classifier": 0.97, "full": 0.9}


class Batch(NamedTuple):
    """One batch to one server."""

    rate: float
    latencies_ms: list[float]
    first_ms: list[float]
    """To the first word of a stream; empty for whole answers."""
    cpu_us: float
    """Of the server process a request, all threads."""


def body(draw: random.Random, shape: Shape) -> bytes:
    """A harmless question, never the same twice: a guard that blocks it would be measured without its engine."""
    words = [draw.choice(SENTENCE) for _ in range(shape.words)]
    text = f"Could you tell me about order {draw.getrandbits(48)}: {' '.join(words)}?"
    request = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": shape.output_tokens}
    return json.dumps({**request, "ignore_eos": True, "stream": shape.stream}).encode()


def measure(server: Server, bodies: Sequence[bytes], shape: Shape) -> Batch:
    """Send the bodies, as many at once as the shape says."""
    _, cpu_s = server.cpu_s()
    began_s = time.perf_counter()
    with ThreadPoolExecutor(shape.clients) as pool:
        parts = list(
            pool.map(lambda share: _ask(server, share), [bodies[n :: shape.clients] for n in range(shape.clients)])
        )
    took_s = time.perf_counter() - began_s
    time.sleep(0.3)  # what the journal still owes to Kafka is part of the cost
    _, cpu_end_s = server.cpu_s()
    times = [both for part in parts for both in part]
    return Batch(
        len(bodies) / took_s,
        [whole * 1e3 for whole, _ in times],
        [first * 1e3 for _, first in times if shape.stream],
        (cpu_end_s - cpu_s) / len(bodies) * 1e6,
    )


def _ask(server: Server, bodies: Sequence[bytes]) -> list[tuple[float, float]]:
    """One client; seconds of each request to its end and to the first word of the answer."""
    url, headers = f"http://127.0.0.1:{server.port}/v1/chat/completions", {"authorization": f"Bearer {server.api_key}"}
    times = []
    with httpx.Client(timeout=120, headers={"content-type": "application/json", **headers}) as client:
        for request in bodies:
            began_s, first_s = time.perf_counter(), 0.0
            with client.stream("POST", url, content=request) as answer:
                answer.raise_for_status()
                for line in answer.iter_lines():
                    if not first_s and _says(line):
                        first_s = time.perf_counter() - began_s
            times.append((time.perf_counter() - began_s, first_s))
    return times


def _says(line: str) -> bool:
    """Whether a line of a stream has a word of the model's."""
    if not line.startswith("data: {"):
        return False
    told = json.loads(line[6:])
    return bool(told.get("text")) or any(choice["delta"].get("content") for choice in told.get("choices", ()))


def memory_mib(server: Server) -> float:
    """Resident memory of the server process, the engine core apart."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


def run_part(part: Part, names: Sequence[str], rounds: int, requests: int, draw: random.Random) -> dict[str, Any]:
    """The rows of one part, a server each."""
    raw: dict[str, dict[str, list[Batch]]] = {name: {shape: [] for shape in SHAPES[part]} for name in names}
    wanted = {name: SETUPS[name] for name in names}
    with (
        tempfile.TemporaryDirectory(prefix="inferwatch-bench-") as folder,
        side_by_side(part, Path(folder), wanted) as made,
    ):
        for number in range(-1, rounds):
            for shape_name, shape in SHAPES[part].items():
                bodies = [body(draw, shape) for _ in range(max(8, round(requests * shape.share)))]
                for server in draw.sample(made, len(made)):
                    batch = measure(server, bodies, shape)
                    if number >= 0:
                        raw[server.name][shape_name].append(batch)
            print(f"{part}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        memory = {server.name: memory_mib(server) for server in made}
    return {name: {"memory_mib": memory[name], **_rows(raw, name)} for name in names}


def _rows(raw: Mapping[str, Mapping[str, Sequence[Batch]]], name: str) -> dict[str, Any]:
    return {shape: _row(batches, raw["bare"][shape]) for shape, batches in raw[name].items()}


def _row(batches: Sequence[Batch], bare: Sequence[Batch]) -> dict[str, Any]:
    ratios = [one.rate / other.rate for one, other in zip(batches, bare, strict=True)]
    latencies = sorted(each for batch in batches for each in batch.latencies_ms)
    first = [each for batch in batches for each in batch.first_ms]
    return {
        "rate": statistics.median(batch.rate for batch in batches),
        "rate_of_bare": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
        "p50_ms": statistics.median(latencies),
        "p99_ms": latencies[min(len(latencies) - 1, round(0.99 * len(latencies)))],
        "first_word_ms": statistics.median(first) if first else None,
        "cpu_added_us": statistics.median(a.cpu_us - b.cpu_us for a, b in zip(batches, bare, strict=True)),
    }


def goals(parts: Mapping[Part, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each figure that has a goal; what was not run has measured null."""
    rows = []
    for name, goal in GOALS.items():
        measured = parts.get("engine", {}).get(name, {}).get("answer", {}).get("rate_of_bare", {}).get("median")
        met = measured is not None and measured >= goal
        rows.append({"figure": f"{name}, throughput of bare", "goal": f"≥ {goal}", "measured": measured, "met": met})
    return rows


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the object alone on one line")
    parser.add_argument("--only", choices=sorted(SHAPES), help="one part")
    parser.add_argument(
        "--servers", nargs="*", choices=sorted(SETUPS), default=list(SETUPS), help="beside the bare one"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=60, help="a batch")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)  # noqa: S311 - repeatable prompts, no secret
    chosen = [arguments.only] if arguments.only else sorted(SHAPES)
    names = [name for name in SETUPS if name == "bare" or name in arguments.servers]
    parts = {part: run_part(part, names, arguments.rounds, arguments.requests, draw) for part in chosen}
    told = {"benchmark": "overhead", "seed": arguments.seed, "rounds": arguments.rounds, "parts": parts}
    told["goals"] = goals(parts)
    told["router_sanitizer"] = "not built"
    print(json.dumps(told, indent=None if arguments.json else 1, ensure_ascii=False))


if __name__ == "__main__":
    main()
