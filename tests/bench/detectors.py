"""What detection costs: CPU per event of stage 1 and stage 2, through the engines and the rollups' wire form.

    .venv/bin/python -m tests.bench.detectors --json

Seeded traffic of one model, thirty to three thousand users, at a low and at a high rate. CPU time of this process, so a
busy machine disturbs it less; the events are decoded beforehand. The last line printed is one JSON object.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from importlib.metadata import version

from detectors import rollup
from detectors.config import DetectConfig
from detectors.engine import PartitionEngine, TenantEngine
from tests.sim.layout import Layout, Logged, lay_out
from tests.sim.traffic import Traffic

NAMES = ("block_rate", "latency", "probing", "token_length")
CASES = {
    "2,000 events/s, 3,000 users, 2 partitions": (2_000.0, 3_000, 15.0, 2),
    "7 events/s, 30 users, 4 partitions": (7.0, 30, 600.0, 4),
}


def config_with(*names: str) -> DetectConfig:
    """Only these detectors."""
    return DetectConfig.model_validate({name: {"enabled": name in names} for name in NAMES})


def logs_of(rate: float, users: int, span_s: float, partitions: int) -> tuple[int, list[list[Logged]]]:
    """How many events, and the partitions' logs without the ticks that end them."""
    traffic = Traffic(1, rate=rate, users=users)
    traffic.calm(0, span_s)
    return len(traffic.events), lay_out(traffic.events, Layout(partitions=partitions, idle_s=1))


def stage_one(logs: list[list[Logged]], config: DetectConfig) -> tuple[float, list[bytes]]:
    """CPU seconds, and the rollups as they go to Kafka."""
    begin = time.process_time()
    told: list[bytes] = []
    for partition, log in enumerate(logs):
        engine = PartitionEngine(config, topic="iw.events", partition=partition, partitions=len(logs))
        for number, logged in enumerate(log):
            engine.observe(logged.record, append_ms=logged.append_ms, offset=logged.offset)
            if number % 500 == 499:
                told += [rollup.encode(each) for each in engine.take()]
        told += [rollup.encode(each) for each in engine.take()]
    return time.process_time() - begin, told


def stage_two(told: list[bytes], partitions: int, config: DetectConfig) -> float:
    """CPU seconds."""
    begin = time.process_time()
    engine = TenantEngine(config, partition=0, partitions=partitions)
    for raw in told:
        engine.observe(rollup.decode(raw))
        engine.take()
    return time.process_time() - begin


def measured(repetitions: int) -> dict[str, dict[str, float]]:
    """Per case: median µs an event of each stage, of each detector alone above the time rules, and bytes of rollups."""
    rows: dict[str, dict[str, float]] = {}
    for case, (rate, users, span_s, partitions) in CASES.items():
        events, logs = logs_of(rate, users, span_s, partitions)
        samples: dict[str, list[float]] = {}
        size = 0
        for _ in range(repetitions):
            cpu_s, told = stage_one(logs, DetectConfig())
            size = sum(map(len, told))
            samples.setdefault("stage_1_us", []).append(cpu_s * 1e6 / events)
            samples.setdefault("stage_2_us", []).append(stage_two(told, partitions, DetectConfig()) * 1e6 / events)
            samples.setdefault("time_rules_us", []).append(stage_one(logs, config_with())[0] * 1e6 / events)
            for name in NAMES:
                samples.setdefault(f"with_{name}_us", []).append(stage_one(logs, config_with(name))[0] * 1e6 / events)
        row = {name: round(statistics.median(values), 2) for name, values in samples.items()}
        row |= {f"{name}_min": round(min(values), 2) for name, values in samples.items()}
        rows[case] = row | {"events": events, "rollup_bytes_an_event": round(size / events, 1)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    gc.set_threshold(100_000, 50, 1_000)  # as the stream workers do
    rows = measured(arguments.repetitions)
    if not arguments.json:
        for case, row in rows.items():
            sys.stdout.write(f"{case}: {row}\n")
    first = rows[next(iter(CASES))]
    cost = round(first["stage_1_us"] + first["stage_2_us"], 2)
    goal = {"figure": "cost", "goal": "all detectors together <= 10 µs an event", "measured": cost, "met": cost <= 10}
    goal["why"] = "median CPU of both stages at the high rate, time rules and rollups' wire included"
    about = {"repetitions": arguments.repetitions, "cores": os.cpu_count(), "python": sys.version.split()[0]}
    about["msgspec"] = version("msgspec")
    sys.stdout.write(json.dumps({"cases": rows, "goals": [goal], "about": about}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
