"""Events for each CPU-second: stage 1 and its rivals on the same backlog, one after the other, in rounds.

Rivals that are no dependency of ours get environments of their own, made when first asked for, beside the repository's
`.venv`. Each figure is a ratio within a round; medians over the rounds.
"""

import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from collector.kafka import KafkaConfig
from streams.broker import Broker
from tests.bench.backlog import Backlog, load

ROOT = Path(__file__).parent.parent.parent
SHARE = {
    "stage1": 1,
    "count": 1,
    "bare": 1,
    "bare_slim": 1,
    "faust_event": 5,
    "faust_table": 20,
    "quix": 2,
    "bytewax": 2,
}
"""Each worker reads this fraction of the backlog: the slow ones need less for as long a measurement."""
RIVALS = {
    "quix": ("quix.py", ["quixstreams==3.28.1", "orjson"]),
    "bytewax": ("bytewax_count.py", ["bytewax[kafka]==0.21.1", "orjson"]),
}
CHILD_TIMEOUT_S = 300


def run_worker(mode: str, kafka: KafkaConfig, until: int) -> dict[str, Any]:
    """One measured worker in a process of its own. Raises RuntimeError with its last words."""
    if mode in RIVALS:
        command = [str(_environment(mode)), str(Path(__file__).parent / "rivals" / RIVALS[mode][0])]
        command += [kafka.bootstrap_servers, kafka.topic("events"), str(until)]
    else:
        command = [sys.executable, "-m", "tests.bench.workers", mode]
        command += [kafka.bootstrap_servers, kafka.topic_prefix, str(until)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False, cwd=ROOT)
    if done.returncode != 0 or not done.stdout.strip():
        raise RuntimeError(f"{mode} failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _environment(rival: str) -> Path:
    """Its Python, installed if need be."""
    folder = ROOT / f".venv-{rival}"
    python = folder / "bin" / "python"
    if not python.exists():
        uv = str(ROOT / ".venv-uv" / "bin" / "uv")
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), *RIVALS[rival][1]], check=True)
    return python


def measure_rates(broker: Broker, events: int, rounds: int, seed: int) -> dict[str, Any]:
    """All rounds; per worker the events for each CPU-second."""
    raw: dict[str, list[dict[str, Any]]] = {mode: [] for mode in SHARE}
    failures: dict[str, str] = {}
    event_bytes = 0.0
    for number in range(rounds):
        kafka = KafkaConfig(bootstrap_servers=broker.bootstrap, topic_prefix=f"rate{number}")
        loaded = asyncio.run(load(kafka, Backlog(events, seed=seed + number)))
        event_bytes = loaded.event_bytes
        for mode, share in SHARE.items():
            if mode in failures:
                continue
            # Groups are named after the prefix: each mode has its own group, and all read the same topic. The two
            # modes of the deployed worker would share one, so the second reads a copy of its own.
            mine = kafka
            if mode == "count":
                mine = KafkaConfig(bootstrap_servers=broker.bootstrap, topic_prefix=f"count{number}")
                asyncio.run(load(mine, Backlog(events, seed=seed + number)))
            try:
                run = run_worker(mode, mine, loaded.records // share - 100)
            except (RuntimeError, subprocess.SubprocessError) as error:
                failures[mode] = str(error)
                continue
            run.pop("handled", None)
            raw[mode].append(run)
            rate = run["events"] / run["cpu_s"]
            print(f"round {number + 1}: {mode:12s} {rate:10,.0f} events per CPU-second", file=sys.stderr, flush=True)
    return {"raw": raw, "failures": failures, "event_bytes": round(event_bytes), "rates": rates_of(raw)}


def rates_of(raw: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[float]]:
    """Events for each CPU-second, by round."""
    return {mode: [run["events"] / run["cpu_s"] for run in runs] for mode, runs in raw.items()}


def ratio(rates: Mapping[str, Sequence[float]], one: str, other: str) -> float | None:
    """The median over rounds of `one` ÷ `other`; None where either was not measured."""
    pairs = list(zip(rates.get(one, ()), rates.get(other, ()), strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def goals(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The two rows of the table that are about rates."""
    rates = figures["rates"]
    own = statistics.median(rates["stage1"]) if rates["stage1"] else None
    stock = ratio(rates, "stage1", "faust_event")
    table, bare = ratio(rates, "count", "faust_table"), ratio(rates, "count", "bare")
    slim = ratio(rates, "count", "bare_slim")
    quix, bytewax = ratio(rates, "count", "quix"), ratio(rates, "count", "bytewax")
    return [
        {
            "figure": "events per CPU-second of stage 1, all detectors on, changelog on",
            "goal": ">= 150k; >= 10 x stock Faust that does nothing at all",
            "measured": {"events_per_cpu_s": own, "x_stock_faust": stock},
            "met": own is not None and own >= 150_000 and stock is not None and stock >= 10,
            "why": "median of the rounds; the ratio is within a round",
        },
        {
            "figure": "one windowed count per user with durable state, same in all",
            "goal": ">= 40 x stock Faust's Table, ahead of Quix Streams and Bytewax, >= 0.7 of a bare aiokafka loop "
            "that keeps and flushes the same state",
            "measured": {
                "x_faust_table": table,
                "x_quix": quix,
                "x_bytewax": bytewax,
                "x_bare": bare,
                "x_bare_slim": slim,
            },
            "met": all(
                value is not None and value >= least
                for value, least in ((table, 40), (quix, 1), (bytewax, 1), (bare, 0.7))
            ),
            "why": "ours does the time rules, order within a second and exactness besides. `bare` reads records as "
            "strictly as ours; `bare_slim` reads two fields and takes anything for the rest, which ours must not",
        },
    ]
