"""Block-rate spikes on the deployed path: false alarms on clustered background, and how soon injected shifts are found.

    .venv/bin/python -m tests.bench.detection --data DIR --only block --json

Real: the arrival rates (ServeGen). Simulated: who is blocked, and how blocks cluster. Injected: the shifts, into
stretches of the last thirty days, from snapshots of both stages. Other detectors are off. A tenant is one log.
"""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from collector.event import Goodbye, Hello
from detectors.config import DetectConfig
from detectors.engine import PartitionEngine, TenantEngine
from detectors.finding import Finding
from tests.bench.blocked_log import DAY_S, START_S, Floats, Requests, Writer, background, pieces, served_rates, shifted

LEARN_DAYS: Final = 28
TEST_DAYS: Final = 30
TENANTS: Final = 60
INSTANTS: Final = 4
SHIFT_REQUESTS: Final = 6_000
KINDS: Final = {"many 3x": (3.0, False), "many 5x": (5.0, False), "few 3x": (3.0, True)}
ONLY: Final = DetectConfig.model_validate(
    {name: {"enabled": False} for name in DetectConfig.model_fields if name in {"latency", "probing", "token_length"}}
    # One lane without heartbeats: it is not dead when nobody asks for a minute, and many records are judged at once.
    | {"campaign": {"enabled": False}, "time": {"silence_max_ms": 10**9}}
)


@dataclass
class Tenant:
    """What was measured of one."""

    block_rate: float
    week: int
    events: int = 0
    first_week: int = 0
    false: int = 0
    shifts: list[dict[str, Any]] = field(default_factory=list)


class Pipe:
    """Both stages of one partition."""

    def __init__(self, config: DetectConfig, saved: tuple[bytes, bytes] | None = None) -> None:
        self.one = PartitionEngine(config, topic="iw.events", partition=0, partitions=1)
        self.two = TenantEngine(config, partition=0, partitions=1)
        if saved is not None:
            self.one.restore(saved[0])
            self.two.restore(saved[1])

    def saved(self) -> tuple[bytes, bytes]:
        return self.one.snapshot(), self.two.snapshot()

    def opened(self, records: tuple[list[bytes], Any, Any]) -> list[Finding]:
        """The findings that these records open."""
        refused = self.one.observe_log(*records)
        if refused:
            raise ValueError(f"stage 1 refused {len(refused)} records: {refused[0][1]}")
        for each in self.one.take():
            self.two.observe(each)
        return [found for found in self.two.take() if found.detector == "block_rate" and found.state == "open"]


def at_s(finding: Finding) -> float:
    """When it was raised, in seconds of the simulation."""
    return finding.updated_us / 1e6 - START_S


def tenant_of(number: int, seed: int, rate: Floats, config: DetectConfig, *, days: int, instants: int) -> Tenant:
    """One tenant's whole run."""
    rng = np.random.default_rng([seed, number])
    week = int(np.exp(rng.uniform(np.log(4e3), np.log(2e4))))
    usual = float(np.exp(rng.uniform(np.log(0.005), np.log(0.05))))
    requests = background(rng, rate, week=week, days=days + LEARN_DAYS, block_rate=usual, retried=number % 2 == 1)
    tested = int(np.searchsorted(requests.at_s, LEARN_DAYS * DAY_S))
    last = max(len(requests) - SHIFT_REQUESTS, tested + 1)
    cuts = sorted(rng.integers(tested, last, instants).tolist())
    pipe, writer, told = Pipe(config), Writer(), list[Finding]()
    pipe.opened(writer.end(Hello, -1.0))
    result = Tenant(usual, week, len(requests))
    for end, piece in pieces(requests, cuts):
        told += pipe.opened(writer.records(piece))
        if end in cuts:
            before = at_s(told[-1]) if told else -DAY_S
            if requests.at_s[end - 1] - before < 6 * 3_600:
                continue
            saved = pipe.saved()
            for kind, (ratio, few) in KINDS.items():
                stretch = shifted(requests.cut(end, end + SHIFT_REQUESTS), rng, block_rate=usual, ratio=ratio, few=few)
                result.shifts.append(
                    found(Pipe(config, saved), Writer(writer.number, writer.last), stretch)
                    | {"kind": kind, "unit": usual * (ratio - 1)}
                )
    told += pipe.opened(writer.end(Goodbye, (days + LEARN_DAYS) * DAY_S + 3_600))
    result.first_week = sum(at_s(finding) < 7 * DAY_S for finding in told)
    result.false = sum(at_s(finding) >= LEARN_DAYS * DAY_S for finding in told)
    return result


def found(pipe: Pipe, writer: Writer, stretch: Requests) -> dict[str, Any]:
    """How many requests the shift took to be found, and whom it was put down to."""
    for begin in range(0, len(stretch), 200):
        for finding in pipe.opened(writer.records(stretch.cut(begin, begin + 200))):
            moment = at_s(finding)
            if moment > stretch.at_s[0]:
                return {
                    "requests": int(np.searchsorted(stretch.at_s, moment)),
                    "few": "few users" in finding.summary,
                }
    return {"requests": None, "few": None}


def bootstrap(values: Sequence[float], rng: np.random.Generator) -> list[float]:
    """95 % interval of the mean."""
    drawn = rng.choice(np.array(values, float), (2_000, len(values))).mean(1)
    return [round(float(edge), 3) for edge in np.quantile(drawn, [0.025, 0.975])]


def measure(data: Path, seed: int, *, quick: bool, config: DetectConfig = ONLY) -> dict[str, Any]:
    """Raw figures."""
    rates = served_rates(data)
    real = bool(rates)
    if not real:
        rates = [1 + 0.6 * np.sin(2 * np.pi * np.arange(1_008) / 144)]
    rng = np.random.default_rng([seed, 10**6])
    count, days = (2, 7) if quick else (TENANTS, TEST_DAYS)
    chosen = [rates[int(rng.integers(len(rates)))] for _ in range(count)]
    with ProcessPoolExecutor(1 if quick else min(2, os.cpu_count() or 1)) as pool:
        jobs = [
            pool.submit(tenant_of, number, seed, rate, config, days=days, instants=1 if quick else INSTANTS)
            for number, rate in enumerate(chosen)
        ]
        tenants = []
        for job in jobs:
            tenants.append(job.result())
            print(f"{len(tenants)} of {count} tenants", file=sys.stderr, flush=True)
    weeks = days / 7
    a_week = [tenant.false / weeks for tenant in tenants]
    figures: dict[str, Any] = {
        "tenants": count,
        "days": days,
        "events": sum(tenant.events for tenant in tenants),
        "arrival_rates": "ServeGen, real" if real else "simulated: the data has no traces",
        "false_alarms_a_week": round(float(np.mean(a_week)), 3),
        "false_alarms_interval": bootstrap(a_week, rng),
        "tenants_at_most_one_a_week": round(float(np.mean([each <= 1 for each in a_week])), 3),
        "worst_tenant_a_week": round(max(a_week), 2),
        "first_week": round(float(np.mean([tenant.first_week for tenant in tenants])), 3),
    }
    return figures | {kind: shift_of(tenants, kind) for kind in KINDS} | {"told_right": told_right(tenants)}


def shift_of(tenants: Sequence[Tenant], kind: str) -> dict[str, Any]:
    """Excess blocks until a shift was found: requests x usual rate x (ratio - 1). A miss counts as endless."""
    shifts = [shift for tenant in tenants for shift in tenant.shifts if shift["kind"] == kind]
    excess = [np.inf if shift["requests"] is None else shift["requests"] * shift["unit"] for shift in shifts]
    missed = sum(shift["requests"] is None for shift in shifts)
    if not excess:
        return {"shifts": 0}
    p50, p95 = np.quantile(excess, [0.5, 0.95], method="lower").tolist()
    return {
        "shifts": len(shifts),
        "median_excess": round(p50, 1) if np.isfinite(p50) else None,
        "p95_excess": round(p95, 1) if np.isfinite(p95) else None,
        "missed": round(missed / len(shifts), 3),
    }


def told_right(tenants: Sequence[Tenant]) -> float | None:
    """Share of found shifts of 3 times that were put down rightly to few or many users, both kinds weighing alike."""
    shares = []
    for kind in ("many 3x", "few 3x"):
        right = [
            shift["few"] == KINDS[kind][1]
            for tenant in tenants
            for shift in tenant.shifts
            if shift["kind"] == kind and shift["few"] is not None
        ]
        shares += [float(np.mean(right))] if right else []
    return round(float(np.mean(shares)), 3) if len(shares) == 2 else None


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table that this part answers."""

    def most(kind: str, name: str, limit: float) -> bool:
        value = figures[kind].get(name)
        return value is not None and value <= limit

    names = ("false_alarms_a_week", "false_alarms_interval", "tenants_at_most_one_a_week", "first_week")
    background_met = (
        figures["false_alarms_a_week"] <= 0.45
        and figures["false_alarms_interval"][1] <= 0.6
        and figures["tenants_at_most_one_a_week"] >= 0.93
        and figures["first_week"] <= 1
        and figures["tenants"] >= 60
    )
    many = all(
        most(kind, name, limit)
        for kind, name, limit in (
            ("many 3x", "median_excess", 7),
            ("many 3x", "p95_excess", 18),
            ("many 5x", "median_excess", 6),
            ("many 5x", "p95_excess", 14),
        )
    )
    few = (
        most("few 3x", "median_excess", 12)
        and most("few 3x", "p95_excess", 40)
        and most("few 3x", "missed", 0.03)
        and (figures["told_right"] or 0) >= 0.92
    )
    why = f"arrival rates: {figures['arrival_rates']}; blocks simulated, shifts injected"
    rows = (
        (
            "block rate, background with sticky and retried blocks and user-by-day clustering, ≥ 60 tenants, 30 d",
            "≤ 0.45 a week and tenant, upper bound ≤ 0.6; ≥ 93 % of tenants ≤ 1; first week ≤ 1",
            {name: figures[name] for name in names},
            background_met,
        ),
        (
            "block shift by many users: excess blocks until found",
            "3 ×: median ≤ 7, p95 ≤ 18; 5 ×: ≤ 6 / 14",
            {kind: figures[kind] for kind in ("many 3x", "many 5x")},
            many,
        ),
        (
            "3 × shift from 3 users; few or many told right",
            "median ≤ 12, p95 ≤ 40, ≤ 3 % missed; ≥ .92",
            figures["few 3x"] | {"told_right": figures["told_right"]},
            few,
        ),
    )
    return [
        {"figure": figure, "goal": goal, "measured": value, "met": bool(met), "why": why}
        for figure, goal, value, met in rows
    ]
