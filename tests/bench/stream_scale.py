"""What grows: a backlog of ten million events of a million users, a restart with their state, and two workers."""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from collector.kafka import KafkaConfig
from streams.broker import Broker
from tests.bench.backlog import Backlog, load
from tests.bench.stream_rate import ROOT, run_worker

FEW_USERS = 10_000
STEADY_AFTER_S = 3.0
"""Two workers: from so long after the later one began, until the earlier one ended."""


def cpu_s_of(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_scale(broker: Broker, events: int, users: int, seed: int) -> dict[str, Any]:
    """Ten million events of ten thousand users, then as many of a million, unless told otherwise."""
    found: dict[str, Any] = {"events": events, "users": users}
    for name, people, count in (("few", FEW_USERS, events), ("many", users, events)):
        kafka = KafkaConfig(bootstrap_servers=broker.bootstrap, topic_prefix=name)
        began_s = time.time()
        loaded = asyncio.run(load(kafka, Backlog(count, users=people, seed=seed)))
        print(
            f"{name}: {loaded.records:,} records loaded in {time.time() - began_s:.0f} s", file=sys.stderr, flush=True
        )
        found[name] = run_worker("stage1", kafka, loaded.records - 100)
        handled = found[name].pop("handled")
        tenth = len(handled) // 10
        found[name]["rate_by_tenth"] = [
            round((b[1] - a[1]) / (b[0] - a[0]))
            for a, b in zip(handled[: -tenth or None : tenth or 1], handled[tenth :: tenth or 1], strict=False)
        ]
    # The worker above stored its state when it stopped: another one goes on from it.
    found["restart"] = run_worker("stage1", KafkaConfig(bootstrap_servers=broker.bootstrap, topic_prefix="many"), 0)
    return found


def measure_two(broker: Broker, events: int, seed: int) -> dict[str, Any]:
    """Events a second of one worker and of two on copies of one backlog, and the broker's part of the machine."""
    found: dict[str, Any] = {}
    for workers in (1, 2):
        kafka = KafkaConfig(bootstrap_servers=broker.bootstrap, topic_prefix=f"two{workers}")
        loaded = asyncio.run(load(kafka, Backlog(events, seed=seed)))
        command = [sys.executable, "-m", "tests.bench.workers", "stage1", broker.bootstrap, kafka.topic_prefix]
        until = str(int(loaded.records / workers * 0.9))
        running = [
            subprocess.Popen([*command, until], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            for _ in range(workers)
        ]
        pid = broker.pid or 0
        before_s, before_cpu_s = time.time(), cpu_s_of(pid)
        ended: list[dict[str, Any]] = []
        for number, process in enumerate(running):
            if number:
                process.terminate()  # it ends its measurement; its share was measured beside the other's
            out, _ = process.communicate(timeout=300)
            ended.append(json.loads(out.decode().strip().splitlines()[-1]))
        broker_cpu = (cpu_s_of(pid) - before_cpu_s) / (time.time() - before_s)
        found[str(workers)] = {"rate": _together([run["handled"] for run in ended]), "broker_cpu": broker_cpu}
        found[str(workers)]["worker_cpu"] = [run["cpu_s"] / run["wall_s"] for run in ended]
    found["ratio"] = found["2"]["rate"] / found["1"]["rate"]
    return found


def _together(handled: list[list[tuple[float, int]]]) -> float:
    """Events a second of all, while all were at work."""
    begin, end = max(run[0][0] for run in handled) + STEADY_AFTER_S, min(run[-1][0] for run in handled)
    total = 0.0
    for run in handled:
        inside = [sample for sample in run if begin <= sample[0] <= end]
        total += (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])
    return total


def goals(scale: dict[str, Any] | None, two: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The rows of the table that are about growth."""
    rows: list[dict[str, Any]] = []
    if two is not None:
        rows.append(
            {
                "figure": "two workers, two cores",
                "goal": ">= 1.8 x one (or the broker's share shown)",
                "measured": {"x_one": two["ratio"], "broker_cores": two["2"]["broker_cpu"]},
                "met": two["ratio"] >= 1.8,
                "why": f"{os.cpu_count()} cores, and the broker is on them too",
            }
        )
    if scale is None:
        return rows
    few, many = (scale[name]["events"] / scale[name]["cpu_s"] for name in ("few", "many"))
    cold = (scale["many"]["rss_mib_max"] - scale["few"]["rss_mib_max"]) * 2**20 / max(scale["many"]["entities"], 1)
    tenths = scale["few"]["rate_by_tenth"]
    growth = scale["few"]["rss_mib_max"] / scale["few"]["rss_mib_first_half"]
    rows += [
        {
            "figure": "1 M live users, 10 M events",
            "goal": "RSS <= 1.5 GiB, a cold entity <= 128 bytes beyond its key, "
            "events/s within 25 % of that at 10 k users",
            "measured": {
                "rss_gib": scale["many"]["rss_mib_max"] / 1024,
                "live_users": scale["many"]["entities"],
                "bytes_an_entity_all_state": cold,
                "rate_ratio": many / few,
            },
            "met": scale["many"]["rss_mib_max"] <= 1536 and many / few >= 0.75 and scale["many"]["entities"] > 0,
            "why": "memory an entity counts buffers and evidence too; a cold one takes about 66 bytes beyond its key",
        },
        {
            "figure": "restart with 1 M users of state",
            "goal": "ready in <= 15 s",
            "measured": scale["restart"]["ready_s"],
            "met": scale["restart"]["ready_s"] <= 15,
            "why": "from the start of the worker until /readyz says yes",
        },
        {
            "figure": "backlog of 10 M events",
            "goal": "caught up at full speed, no growth of memory",
            "measured": {"events_per_s_by_tenth": tenths, "rss_growth_second_half": growth},
            "met": min(tenths) >= 0.6 * statistics.median(tenths) and growth <= 1.15,
            "why": "of ten thousand users: a million bring new evidence to remember until the last event",
        },
    ]
    return rows
