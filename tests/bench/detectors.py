"""What detection costs: CPU per event of stage 1 and stage 2, from the log's bytes to findings.

    .venv/bin/python -m tests.bench.detectors --json

Seeded traffic of one model and three thousand users at 2,000 and at 20,000 events a second of event time, as batches of
the log, through `PartitionEngine.observe_log`, rollups in their wire form, and `TenantEngine`. All detectors, none, and
each alone, one after the other in every repetition, so that a busy machine disturbs all alike; the figure of the
detectors is all less none. CPU time of this process, which a neighbour in the processor's caches may double: so their
share of what is done without any is printed too, and the least of all less the least of none. The last line printed is
one JSON object.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from collector.event import encode
from detectors import rollup
from detectors.catalogue import detectors
from detectors.columns import Ints
from detectors.config import DetectConfig
from detectors.engine import PartitionEngine, TenantEngine
from tests.sim.layout import Layout, lay_out
from tests.sim.traffic import Traffic

NAMES: Final = tuple(
    detector.card.name
    for detector in detectors()
    if hasattr(getattr(DetectConfig(), detector.card.name, None), "enabled")
)
CASES: Final = {"2,000 events/s": (2_000.0, 20.0), "20,000 events/s": (20_000.0, 3.0)}
USERS: Final = 3_000
GOAL_US: Final = 3.0
Log = tuple[list[bytes], Ints, Ints]
"""Raw records, append times in ms, offsets."""


def config_with(*names: str) -> DetectConfig:
    """Only these detectors."""
    return DetectConfig.model_validate({name: {"enabled": name in names} for name in NAMES})


def log_of(rate: float, span_s: float) -> tuple[int, Log]:
    """How many events, and one partition's log."""
    traffic = Traffic(1, rate=rate, users=USERS)
    traffic.calm(0, span_s)
    log = lay_out(traffic.events, Layout(partitions=1, idle_s=1))[0]
    raws = [encode(logged.record) for logged in log]
    return len(traffic.events), (raws, np.array([each.append_ms for each in log]), np.arange(len(log)))


def stages(log: Log, config: DetectConfig, batch: int) -> tuple[float, float]:
    """CPU seconds of stage 1 and of stage 2."""
    raws, append_ms, offsets = log
    one = PartitionEngine(config, topic="iw.events", partition=0, partitions=1)
    two = TenantEngine(config, partition=0, partitions=1)
    spent = [0.0, 0.0]
    for begin in range(0, len(raws), batch):
        end = begin + batch
        at_s = time.process_time()
        one.observe_log(raws[begin:end], append_ms[begin:end], offsets[begin:end])
        told = [rollup.encode(each) for each in one.take()]
        done_s = time.process_time()
        for raw in told:
            two.observe(rollup.decode(raw))
        two.take()
        spent[0] += done_s - at_s
        spent[1] += time.process_time() - done_s
    return spent[0], spent[1]


def measured(repetitions: int, *, quick: bool = False) -> dict[str, dict[str, Any]]:
    """Per case the medians in µs an event: both stages with all detectors and with none, and each detector's part."""
    rows: dict[str, dict[str, Any]] = {}
    for case, (rate, span_s) in CASES.items():
        events, log = log_of(rate, 1.0 if quick else span_s)
        samples: dict[str, list[float]] = {}
        for _ in range(repetitions):
            for name, config in (
                ("all", DetectConfig()),
                ("none", config_with()),
                *((n, config_with(n)) for n in NAMES),
            ):
                gc.collect()
                one_s, two_s = stages(log, config, int(rate))
                samples.setdefault(f"{name}: stage 1", []).append(one_s * 1e6 / events)
                samples.setdefault(f"{name}: both stages", []).append((one_s + two_s) * 1e6 / events)
        every, bare = samples["all: both stages"], samples["none: both stages"]
        row: dict[str, Any] = {name: round(statistics.median(values), 2) for name, values in samples.items()}
        differences = [one - other for one, other in zip(every, bare, strict=True)]
        row["detectors alone"] = round(statistics.median(differences), 2)
        row["detectors alone, min and max"] = [round(min(differences), 2), round(max(differences), 2)]
        row["least of all less least of none"] = round(min(every) - min(bare), 2)
        shares = [one / other - 1 for one, other in zip(every, bare, strict=True)]
        row["detectors alone to none"] = round(statistics.median(shares), 2)
        rows[case] = row | {"events": events}
    return rows


def measure(data: Path, seed: int, *, quick: bool) -> dict[str, Any]:  # every part is given these
    """The part `cost` of `tests.bench.detection`."""
    repetitions = 2 if quick else 7
    about = {"real": "nothing", "injected": "nothing: calm simulated traffic", "repetitions": repetitions}
    return {"cases": measured(repetitions, quick=quick), "detectors": list(NAMES), "about": about}


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """One row: what all detectors add at the worse of the two rates."""
    cases = figures["cases"]
    told = {
        case: {
            "detectors alone": row["detectors alone"],
            "least": row["least of all less least of none"],
            "to none": row["detectors alone to none"],
            "everything": row["all: both stages"],
        }
        for case, row in cases.items()
    }
    worst = max(row["detectors alone"] for row in cases.values())
    why = (
        "all detectors less none, both stages, µs an event; 'everything' is with decoding, time rules and rollups' wire"
    )
    goal = f"all detectors together <= {GOAL_US:g} µs an event, in the deployed engine"
    return [{"figure": "cost", "goal": goal, "measured": told, "met": worst <= GOAL_US, "why": why}]


def main() -> None:
    """Parses the command line and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    gc.set_threshold(100_000, 50, 1_000)  # as the stream workers do
    rows = measured(arguments.repetitions)
    if not arguments.json:
        for case, row in rows.items():
            print(f"{case}: {row}")
    about = {"repetitions": arguments.repetitions, "cores": os.cpu_count(), "python": sys.version.split()[0]}
    about["msgspec"] = version("msgspec")
    print(json.dumps({"cases": rows, "goals": goals({"cases": rows}), "about": about}, ensure_ascii=False))


if __name__ == "__main__":
    main()
