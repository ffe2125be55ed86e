"""High volume on the deployed path: false alarms a week on real arrivals, and floods injected into them.

Real: request rates of 170 ServeGen clients and their burstiness in every ten minutes of a week; prompt and completion
lengths of Azure. The clients are dealt to tenants by size in turn, and each tenant thinned to so many requests a week.
A client's requests within ten minutes are a gamma-mixed Poisson number (the inter-arrival CV squared times the mean is
its variance, at most 25 times it), at random moments. Not real: that a client is one user with one session, and the
second week, which is the first again with new draws. Azure's and Mooncake's traces are an hour: too short.

The first two days are cold start, told apart. Injected: an hour of flood by a client of the tenant that was active for
a day, from the eighth day on: k times its own mean active rate on top of what it does; none twice. Found: told under
the user's, session's or its API key's name from its begin until ten minutes after its end. Thresholds: the defaults.
"""

import csv
import gzip
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from detectors.config import DetectConfig
from detectors.finding import Finding
from tests.bench.detection_pipe import SECOND_US, Floats, Ints, calls_of, others_than, passed

START_US: Final = 1_800_000_000 * SECOND_US // (86_400 * SECOND_US) * (86_400 * SECOND_US)
BIN_S: Final = 600
BINS: Final = 1_008
DAY_S: Final = 86_400
WEEK_S: Final = 7 * DAY_S
COLD_S: Final = 2 * DAY_S
FLOODS: Final = (3, 10, 30)
FLOOD_S: Final = 3_600
STEP_S: Final = 10
"""Requests come at multiples of it, which spares empty seconds and changes no window."""
CV_MAX: Final = 5.0
EVEN_CV: Final = 0.5
"""Arrivals with less are machine-like: a clock has 0, chance 1."""


def served(folder: Path) -> tuple[Floats, Floats]:
    """Requests in each ten minutes of a week and their CV, a client a row, largest first."""
    rates: dict[tuple[str, str], Floats] = defaultdict(lambda: np.zeros((2, BINS)))
    for path in sorted(folder.glob("servegen_*_week1.csv.gz")):
        with gzip.open(path, "rt") as lines:
            for row in csv.DictReader(lines):
                place = int(float(row["t_s"]) // BIN_S)
                if place < BINS:
                    rates[path.name, row["client"]][:, place] = (
                        float(row["rate_rps"]) * BIN_S,
                        float(row["interarrival_cv"]),
                    )
    table = np.array(sorted(rates.values(), key=lambda client: -float(client[0].sum())))
    return table[:, 0], table[:, 1]


def lengths(folder: Path) -> tuple[Ints, Ints]:
    """Azure's prompt and completion tokens."""
    with gzip.open(folder / "azure_2023_conv.csv.gz", "rt") as opened:
        rows = [line.rstrip().split(",") for line in opened.readlines()[1:]]
    sizes = np.array([[int(row[1]), int(row[2])] for row in rows], np.int64)
    return sizes[:, 0], sizes[:, 1]


def numbers(mean: Floats, cv: Floats, rng: np.random.Generator) -> Ints:
    """Requests drawn for each client and bin."""
    spread = np.minimum(cv, CV_MAX) ** 2
    over = np.maximum(spread - 1, 1e-6)
    mixed = rng.gamma(np.maximum(mean / over, 1e-9), over)
    return rng.poisson(np.where(mean > 0, mixed, 0))


def moments(counts: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """(s in µs, client) of each request."""
    client, place = np.nonzero(counts)
    many = counts[client, place]
    begin = np.repeat(place * BIN_S, many)
    return (begin + rng.integers(0, BIN_S // STEP_S, len(begin)) * STEP_S) * SECOND_US, np.repeat(client, many)


def floods(counts: Ints, weeks: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """(client, begin in s, k): as many as there are clients for, each once."""
    bins = np.arange(counts.shape[1])
    told: list[tuple[int, int, int]] = []
    for client in rng.permutation(len(counts)).tolist():
        active = np.flatnonzero((counts[client] > 0) & (bins >= WEEK_S // BIN_S) & (bins < weeks * BINS - 12))
        if (counts[client, : WEEK_S // BIN_S] > 0).sum() >= DAY_S // BIN_S and len(active):
            told.append((client, int(rng.choice(active)) * BIN_S, FLOODS[len(told) % len(FLOODS)]))
    return told


def tenant(
    rates: tuple[Floats, Floats], sizes: tuple[Ints, Ints], weekly: int, weeks: int, seed: int
) -> tuple[list[Finding], list[tuple[int, int, int]], int]:
    """(findings, floods, events) of one tenant."""
    rng = np.random.default_rng(seed)
    mean = np.tile(rates[0] * (weekly / rates[0].sum()), weeks)
    counts = numbers(mean, np.tile(rates[1], weeks), rng)
    at_us, user = moments(counts, rng)
    told = floods(counts, weeks, rng)
    for client, begin_s, times in told:
        active = counts[client][counts[client] > 0]
        many = int(rng.poisson(times * active.mean() * FLOOD_S / BIN_S))
        at_us = np.append(at_us, (begin_s + rng.integers(0, FLOOD_S // STEP_S, many) * STEP_S) * SECOND_US)
        user = np.append(user, np.full(many, client))
    order = np.lexsort((user, at_us))
    which = rng.integers(0, len(sizes[0]), len(order))
    fields = {"prompt_tokens": sizes[0][which], "response_tokens": sizes[1][which], "user": user[order]}
    calls = calls_of(START_US + at_us[order] + np.arange(len(order)), np.full(len(order), 900.0), **fields)
    config: dict[str, Any] = {name: {"enabled": False} for name in others_than("volume")}
    config["time"] = {"silence_max_ms": 86_400_000}
    return passed(calls, DetectConfig.model_validate(config)), told, len(order)


def judged(findings: list[Finding], told: list[tuple[int, int, int]]) -> dict[str, Any]:
    """False alarms, cold and later, and which floods were found after how long."""
    opened = [each for each in findings if each.state == "open"]
    episodes = [((each.updated_us - START_US) / SECOND_US, each.entity.id.partition("/")[0]) for each in opened]
    found: dict[int, list[float | None]] = {times: [] for times in FLOODS}
    right: set[tuple[float, str]] = set()
    for client, begin_s, times in told:
        name = f"u_{client:032x}"
        mine = [at for at in episodes if at[1] == name and begin_s <= at[0] < begin_s + FLOOD_S + BIN_S]
        right.update(mine)
        found[times].append(min(at[0] for at in mine) - begin_s if mine else None)
    wrong = [at_s for at_s, name in episodes if (at_s, name) not in right]
    return {"cold": sum(at < COLD_S for at in wrong), "later": sum(at >= COLD_S for at in wrong), "found": found}


def measure(data: Path, seed: int, *, quick: bool) -> dict[str, Any]:
    """Raw figures."""
    folder = data / "traces"
    rates, sizes = served(folder), lengths(folder)
    tenants, weekly, weeks = (2, 10_000, 2) if quick else (4, 100_000, 2)
    cold, later, events = 0, [], 0
    found: dict[int, list[float | None]] = {times: [] for times in FLOODS}
    for number in range(tenants):
        mine = rates[0][number::tenants], rates[1][number::tenants]
        findings, told, size = tenant(mine, sizes, weekly, weeks, seed * 1_000 + number)
        figures = judged(findings, told)
        cold, events = cold + figures["cold"], events + size
        later.append(figures["later"])
        for times in FLOODS:
            found[times] += figures["found"][times]
    watched = weeks - COLD_S / WEEK_S
    means = rng_of_means(later, seed)
    return {
        "false_a_week": round(sum(later) / tenants / watched, 3),
        "false_a_week_95": [round(float(np.quantile(means, q)) / watched, 3) for q in (0.025, 0.975)],
        "false_of_each_tenant": later,
        "false_first_two_days": round(cold / tenants, 3),
        "floods": {f"x{times}": _recall(found[times]) for times in FLOODS},
        "even_pace_share": round(float((rates[1][rates[0] > 0] < EVEN_CV).mean()), 3),
        "tenants": tenants,
        "events": events,
        "about": {
            "real": "ServeGen's rates and CV by client and ten minutes, Azure's lengths",
            "injected": "an hour at k times the client's own mean active rate, on top",
            "simulated": "moments within ten minutes; week two is week one drawn again; a client is a user",
        },
    }


def rng_of_means(later: list[int], seed: int) -> Floats:
    """Bootstrap means over tenants."""
    rng = np.random.default_rng(seed)
    means: Floats = rng.choice(np.array(later, np.float64), (2_000, len(later))).mean(axis=1)
    return means


def _recall(delays: list[float | None]) -> dict[str, Any]:
    known = sorted(delay for delay in delays if delay is not None)
    return {
        "floods": len(delays),
        "found": round(len(known) / len(delays), 3) if delays else None,
        "median_delay_s": round(float(np.median(known))) if known else None,
    }


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """One row; the figure that is asked for is the budget."""
    budget = DetectConfig().volume.budget_per_week
    return [
        {
            "figure": "high volume by client",
            "goal": f"false alarms a week and tenant <= the budget of {budget:g}; recall of floods printed",
            "measured": {name: value for name, value in figures.items() if name != "about"},
            "met": figures["false_a_week"] <= budget,
            "why": "ServeGen's clients after two days; x3, x10, x30 of the client's own mean active rate for an hour",
        }
    ]
