"""What the overview costs on a large store: `python -m tests.dashboards.cost --events 1000000 --json`.

Fills a fresh chDB store with a seeded day of that many events, serves the view over it in another process as in
production, asks for the overview over each range with nothing remembered between two askings, and prints the times.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from aiohttp import ClientSession

from dashboards.answers import FRESH_S
from dashboards.config import RANGES_S, DashboardsConfig
from dashboards.view import make_view, serve_view
from sinks.clickhouse.store import Store, open_store
from sinks.config import StoreConfig
from tests.dashboards import day

SEED = 1
BATCH = 50_000


def fill(store: Store, count: int, end_us: int) -> int:
    """Puts about `count` events into the store, spread over the day before `end_us`; gives how many."""
    made = day.events(SEED, end_us, per_second=count / day.DAY_S)
    stored = 0
    while batch := list(itertools.islice(made, BATCH)):
        store.insert_events(batch, token=f"cost:{stored}")
        stored += len(batch)
    return stored


async def ask(store: Store, repetitions: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds until the last byte of the overview, and of processor time, for each range."""
    config = DashboardsConfig(port=0, query_timeout_s=60)
    runner, url = await serve_view(make_view(store.query, config), config)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in RANGES_S}
    async with ClientSession() as session:
        for _ in range(repetitions):
            for name, seconds in taken.items():
                await asyncio.sleep(FRESH_S + 0.1)
                began_s, used_s = time.perf_counter(), time.process_time()
                async with session.get(f"{url}/?range={name}") as answer:
                    html = await answer.text()
                seconds.append((time.perf_counter() - began_s, time.process_time() - used_s))
                if answer.status != 200 or "trouble" in html:
                    raise RuntimeError(f"the overview over {name} was not whole")
    await runner.cleanup()
    return taken


def main() -> None:
    """Prints one JSON object as its last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(StoreConfig(url=str(Path(folder) / "store")))
        end_us = time.time_ns() // 1000
        began_s = time.perf_counter()
        stored = fill(store, options.events, end_us)
        if not options.json:
            print(f"{stored:,} events stored in {time.perf_counter() - began_s:.0f} s")
        taken = asyncio.run(ask(store, options.repetitions))
        store.close()
    seconds = {
        name: {
            part: {"min": min(values), "median": statistics.median(values), "max": max(values)}
            for part, values in zip(("waited", "processor"), zip(*pairs, strict=True), strict=True)
        }
        for name, pairs in taken.items()
    }
    said = {
        "events": stored,
        "repetitions": options.repetitions,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "seconds": seconds,
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
