"""Detection against its goals, on the deployed path: events, stage 1, rollups, stage 2, findings of the lifecycle.

    .venv/bin/python -m tests.bench.detection --data DIR --json            # everything
    .venv/bin/python -m tests.bench.detection --data DIR --only probing
    .venv/bin/python -m tests.bench.detection --data DIR --quick           # a cut of seconds, no measurement

DIR holds the public traces and series (`traces`, `nab`, `latency`). Each part is a file with
`measure(data, seed, quick=)` and `goals(figures)`; a part that fails is told and stops no other. The last line printed
is one JSON object.
"""

import argparse
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import structlog

PARTS: Final = ("block", "latency", "tokens", "probing", "campaign", "volume", "ablations", "cost")
MODULES: Final = {part: f"tests.bench.detection_{part}" for part in PARTS} | {"cost": "tests.bench.detectors"}
FIGURES: Final = {
    "block rate, background with sticky and retried blocks and user-by-day clustering, ≥ 60 tenants, 30 d": "block",
    "block shift by many users: excess blocks until found": "block",
    "3 × shift from 3 users; few or many told right": "block",
    "latency, NAB standard profile, threshold fixed beforehand, same settings everywhere": "latency",
    "2 × latency shift, windows of max(1 min, N calls), ≤ 1 false alarm a week (upper bound)": "latency",
    "probing at 0.01 % of benign sessions flagged, guard blocking 66 %": "probing",
    "the same at 0.1 %, guard blocking 30 %; 10 %": "probing",
    "distributed campaign, 200 users × 3": "campaign",
    "token length at 0.1 % prevalence": "tokens",
    "high volume by client": "volume",
    "cost": "cost",
}
"""The first cell of each row of the goals, and the part that measures it."""
ABOUT: Final = {
    "real": (
        "only what a part's own 'about' names as read from DIR: arrival rates, token lengths, latency residuals, NAB"
    ),
    "injected": "every attack, shift and campaign, labelled; and how blocks cluster, and the mix of clients: simulated",
    "thresholds": "chosen on other seeds or files than those scored, or the defaults of the config",
}


def measured(part: str, data: Path, seed: int, *, quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A part's figures and rows. What it raises becomes its figures: the other parts go on."""
    began_s = time.perf_counter()
    try:
        module = importlib.import_module(MODULES[part])
        figures = module.measure(data, seed, quick=quick)
        rows = module.goals(figures)
    except Exception as error:  # noqa: BLE001  # whatever a part's fault is, the others are measured
        traceback.print_exc(file=sys.stderr)
        return {"failed": f"{type(error).__name__}: {error}"}, []
    figures["took_s"] = round(time.perf_counter() - began_s, 1)
    return figures, rows


def with_missing(parts: Sequence[str], found: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the table's order; a figure that its part did not give is there as not measured."""
    known = {row["figure"] for row in rows}
    for figure, part in FIGURES.items():
        if part in parts and figure not in known:
            why = found.get(part, {}).get("failed", "the part gave no such figure")
            rows.append({"figure": figure, "goal": "", "measured": None, "met": False, "why": why})
    order = list(FIGURES)
    return sorted(rows, key=lambda row: order.index(row["figure"]) if row["figure"] in order else len(order))


def run(data: Path, parts: Sequence[str], seed: int, *, quick: bool) -> dict[str, Any]:
    """The object that is printed last."""
    found: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for part in parts:
        print(f"{part} …", file=sys.stderr, flush=True)
        found[part], told = measured(part, data, seed, quick=quick)
        rows += told
        gc.collect()
    about: dict[str, Any] = ABOUT | {"quick": quick, "seed": seed, "data_present": data.is_dir()}
    about |= {"cores": os.cpu_count(), "python": sys.version.split()[0]}
    about |= {name: version(name) for name in ("numpy", "msgspec")}
    return {"benchmark": "detection", **found, "goals": with_missing(parts, found, rows), "about": about}


def main() -> None:
    """Parses the command line and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--quick", action="store_true", help="a cut that runs in seconds; its figures mean nothing")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    parts = options.only.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}: choose of {', '.join(PARTS)}")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    gc.set_threshold(100_000, 50, 1_000)  # as the stream workers do
    figures = run(options.data, parts, options.seed, quick=options.quick)
    if not options.json:
        for row in figures["goals"]:
            print(f"{'met   ' if row['met'] else 'missed'} {row['figure']}: {json.dumps(row['measured'])}")
    print(json.dumps(figures, ensure_ascii=False))


if __name__ == "__main__":
    main()
