"""The streams against their goals, on one real broker: rates beside rivals, growth, and the delay of a finding.

    .venv/bin/python -m tests.bench.stream --json            # everything, about half an hour
    .venv/bin/python -m tests.bench.stream --only rate

The last line printed is one JSON object with the raw figures and `goals`.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import structlog

from streams.broker import Broker
from streams.config import BrokerSettings
from tests.bench import stream_latency, stream_rate, stream_scale

PARTS = ("rate", "two", "latency", "scale")
RATES_PER_S = (20, 2_000)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The parts asked for; what was left out has no row among the goals."""
    parts = options.only.split(",")
    found: dict[str, Any] = {}
    goals: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        broker = Broker(BrokerSettings(port=0, data_dir=Path(folder)))
        broker.start()
        try:
            if "rate" in parts:
                found["rate"] = stream_rate.measure_rates(broker, options.events, options.rounds, options.seed)
                goals += stream_rate.goals(found["rate"])
            if "two" in parts:
                found["two"] = stream_scale.measure_two(broker, 4 * options.events, options.seed)
            if "latency" in parts:
                found["latency"] = [
                    stream_latency.measure_latency(broker, rate, options.seconds) for rate in RATES_PER_S
                ]
                goals += stream_latency.goals(found["latency"])
            if "scale" in parts:
                found["scale"] = stream_scale.measure_scale(
                    broker, options.backlog, options.backlog // 10, options.seed
                )
            goals += stream_scale.goals(found.get("scale"), found.get("two"))
        finally:
            broker.stop()
    versions = {name: version(name) for name in ("faust-streaming", "aiokafka", "msgspec", "numpy")}
    about = {"cores": os.cpu_count(), "python": sys.version.split()[0], "kafka": "4.3.1", "seed": options.seed}
    return {"benchmark": "stream", **found, "goals": goals, "about": about | versions}


def main() -> None:
    """Parses the command line and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--events", type=int, default=400_000, help="backlog of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=120, help="length of each latency run")
    parser.add_argument("--backlog", type=int, default=10_000_000, help="events of the large backlog; users: a tenth")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    figures = run(options)
    if not options.json:
        for mode, rates in figures.get("rate", {}).get("rates", {}).items():
            if rates:
                print(f"{mode:14s} {min(rates):12,.0f} {statistics.median(rates):12,.0f} {max(rates):12,.0f}")
        for row in figures["goals"]:
            print(f"{'met   ' if row['met'] else 'missed'} {row['figure']}: {json.dumps(row['measured'])}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
