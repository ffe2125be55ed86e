"""Insert rate of the store: `python -m tests.bench.store --json`.

Runs the deployed path: `Store.insert_events` with its columns, token, minute counters and indexes, on a real chDB.
Batch sizes take turns, so that drift of the machine touches all alike. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from importlib.metadata import version
from typing import Final

from sinks.clickhouse.rows import event_columns
from sinks.clickhouse.store import Store, open_store
from sinks.config import StoreConfig
from tests.sinks.samples import event, stored

SIZES: Final = (1_000, 10_000)


def timed_insert(store: Store, size: int, first: int) -> float:
    """Thousand rows a second of one insert of fresh rows."""
    rows = [
        stored(event(n, user_id=f"u_{n % 500:032x}", session_id=f"s_{n % 2000:032x}", blocked=n % 17 == 0), n)
        for n in range(first, first + size)
    ]
    start = time.perf_counter()
    store.insert_events(rows, token=f"bench:0:{first}-{first + size - 1}")
    return size / (time.perf_counter() - start) / 1000


def measure(repetitions: int) -> dict[str, object]:
    """The rates for each batch size."""
    folder = tempfile.mkdtemp(prefix="inferwatch-bench-")
    rates: dict[int, list[float]] = {size: [] for size in SIZES}
    first = 0
    try:
        store = open_store(StoreConfig(url=f"{folder}/store"))
        for repetition in range(repetitions + 1):
            for size in SIZES:
                rate = timed_insert(store, size, first)
                first += size
                if repetition:
                    rates[size].append(rate)
        there = store.query("SELECT count() AS n FROM events")[0]["n"]
        store.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if there != first:
        raise SystemExit(f"{first} rows inserted, {there} found")
    return {
        "bench": "store",
        "unit": "thousand rows a second",
        "repetitions": repetitions,
        "columns": len(event_columns([stored(event(), 0)])),
        "rates": {
            str(size): {
                "min": round(min(found), 1),
                "median": round(statistics.median(found), 1),
                "max": round(max(found), 1),
            }
            for size, found in rates.items()
        },
        "versions": {name: version(name) for name in ("chdb-core", "clickhouse-connect")}
        | {"python": platform.python_version()},
        "cores": os.cpu_count(),
        "goals": [],
    }


def main() -> None:
    """Measures and prints."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--repetitions", type=int, default=15)
    arguments.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    given = arguments.parse_args()
    figures = measure(given.repetitions)
    if not given.json:
        print(f"thousand rows a second, by batch: {figures['rates']}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
