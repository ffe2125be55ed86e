"""Calls whose latencies have a real spread and an injected fault: LLMPerf's residuals, Nezha's spans."""

import csv
import gzip
import json
import tarfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np

from tests.bench.detection_pipe import SECOND_US, Calls, Floats, Ints, calls_of

START_S: Final = 1_800_000_000 - 1_800_000_000 % (7 * 86_400)
MINUTE_US: Final = 60 * SECOND_US
STEP_US: Final = 12 * SECOND_US
LIGHT_BELOW: Final = 0.6
"""A provider's tail is light where its 95th percentile is below exp(.6) times the median."""


@dataclass(frozen=True)
class Shift:
    """A doubling of the calls of three windows, which replaces what they took."""

    begin_us: int
    end_us: int
    kind: str
    rows: slice
    latency_ms: Floats


@dataclass(frozen=True)
class Shifted:
    """Calls of a model without a fault, and doublings that each may come to it, one instead of the other."""

    calls: Calls
    shifts: list[Shift]
    calm_us: tuple[int, int]
    """Where false alarms count: after learning, up to the first doubling."""


def residuals(data: Path) -> dict[str, Floats]:
    """ln(time to first token / the provider's median) of each provider with more than 50 calls."""
    found = {}
    with tarfile.open(data / "latency" / "llmperf_raw.tar.gz") as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            opened = archive.extractfile(member) if "individual" in member.name else None
            if opened is None or not member.name.endswith(".json"):
                continue
            told = json.loads(opened.read())
            first = np.array([row["ttft_s"] for row in told if row.get("ttft_s") and not row.get("error_code")], float)
            first = first[first > 0]
            if len(first) > 50:
                found[Path(member.name).name] = np.log(first / np.median(first))
    return found


def shifted(
    residual: Floats, per_min: float, calls_min: int, rng: np.random.Generator, days: tuple[int, int, int]
) -> Shifted:
    """A daily swing of load, queueing with it, AR(1) noise of sd .12 a minute, one-minute hiccups (one a week).

    Days of learning, days of calm, then days in which a doubling may begin every 90 minutes, at the start of a window:
    in turn of the whole distribution and of an eighth of the calls, which doubles the 95th percentile.
    """
    minutes = sum(days) * 1_440
    part, slower = _load(per_min, minutes, rng)
    # A detector's step is twelve seconds: calls of one step share a second, which changes no answer and costs less.
    moment = START_S * SECOND_US + part * STEP_US + np.arange(len(part)) % SECOND_US
    log_ms = np.log(800.0) + slower[part // 5] + 0.7 * rng.choice(residual, len(part))
    starts = window_starts(np.bincount(part, minlength=5 * minutes), calls_min)
    shifts = []
    for turn, minute in enumerate(range((days[0] + days[1]) * 1_440 + 60, minutes - 300, 90)):
        number_of = int(np.searchsorted(starts, 5 * minute))
        begin, end = (int(starts[number_of + more]) for more in (0, 3))
        first, last = (int(row) for row in np.searchsorted(part, (begin, end)))
        mine = log_ms[first:last].copy()
        kind = ("whole", "tail")[turn % 2]
        hit = np.ones(last - first, bool)
        if kind == "tail":
            hit = rng.random(last - first) < 0.12
            usual = np.log(800.0) + slower[part[first:last][hit] // 5]
            mine[hit] = np.maximum(mine[hit], usual) + 0.7 * np.quantile(residual, 0.95)
        mine[hit] += np.log(2)
        edges = [START_S * SECOND_US + edge * STEP_US for edge in (begin, end)]
        shifts.append(Shift(edges[0], edges[1], kind, slice(first, last), np.exp(mine)))
    day_us = 1_440 * MINUTE_US
    calm = (START_S * SECOND_US + days[0] * day_us, START_S * SECOND_US + (days[0] + days[1]) * day_us)
    return Shifted(calls_of(moment, np.exp(log_ms)), shifts, calm)


def _load(per_min: float, minutes: int, rng: np.random.Generator) -> tuple[Ints, Floats]:
    """The twelve-second step of each call, and how much slower than usual each minute is, as a logarithm."""
    at = np.arange(minutes)
    swing = 1 + 0.5 * np.sin(2 * np.pi * at / 1_440) * (1 - 0.3 * (at // 1_440 % 7 >= 5))
    number = rng.poisson(per_min * swing * rng.gamma(8, 1 / 8, minutes))
    noise = np.zeros(minutes)
    steps = rng.normal(0, 0.12 * np.sqrt(1 - 0.9**2), minutes)
    for minute in range(1, minutes):
        noise[minute] = 0.9 * noise[minute - 1] + steps[minute]
    slower = noise - 0.5 * np.log(1 - 0.75 * np.minimum(swing / 1.5, 1.05))
    hiccups = rng.random(minutes) < 1 / 10_080
    slower[hiccups] += rng.uniform(0.5, 1.5, int(hiccups.sum()))
    minute_of = np.repeat(at, number)
    return np.sort(rng.integers(0, 5, len(minute_of)) + 5 * minute_of), slower


def window_starts(calls: Ints, calls_min: int) -> Ints:
    """The step that each window begins with, of calls a step of 12 s: a window is at least what is left of its minute
    and ends with the step that has brought its last due call, as the detector cuts them."""
    starts, due = [0], 0
    for step, number in enumerate(calls.tolist()):
        due += number
        begun = starts[-1] - 1
        if number and due >= calls_min and (step // 5 != begun // 5 or step % 5 == 4):
            starts.append(step + 1)
            due = 0
    return np.array(starts, np.int64)


def nezha(data: Path) -> tuple[Calls, list[tuple[int, int, str]]]:
    """Root spans as calls of one model, a microsecond for a millisecond, and its cpu and network faults.

    An operation stands for a size of prompt, since operations differ in time as prompts of different size do.
    """
    with gzip.open(data / "latency" / "nezha_root_spans.csv.gz", "rt") as opened:
        rows = [
            (int(row["StartTimeUnixNano"]) // 1_000, float(row["Duration"]), row["OperationName"])
            for row in csv.DictReader(opened)
        ]
    moment: Ints = np.array([row[0] for row in rows], np.int64)
    taken: Floats = np.array([row[1] for row in rows])
    _, operation = np.unique([row[2] for row in rows], return_inverse=True)
    prompt = 4 ** (operation.astype(np.int64) % 20)
    order = np.argsort(moment, kind="stable")
    faults = []
    with (data / "latency" / "nezha_faults.csv").open() as opened:
        for row in csv.DictReader(opened):
            if row["inject_type"] in {"cpu_contention", "cpu_consumed", "network_delay"}:
                at = datetime.fromtimestamp(int(row["inject_timestamp"]), UTC)
                begin = int(at.timestamp()) * SECOND_US
                faults.append((begin, begin + 5 * MINUTE_US, row["inject_type"]))
    return calls_of(moment[order], np.maximum(taken[order], 1.0), prompt_tokens=prompt[order]), faults
