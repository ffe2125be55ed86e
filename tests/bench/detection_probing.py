"""Probing on the deployed path: recall of attacks at a fixed share of honest sessions flagged, cold start, ablations.

All of it is simulated (`probing_clients.py`): honest clients for ten days, attacks injected on the eighth to the tenth,
by strangers and by clients known for a week. An honest session is flagged when a revision of a finding names it, or its
user while it ran. Thresholds are chosen on another seed than the one scored, from the signals that stage 1 sends with
a low threshold; recall and false alarms are of the lifecycle's findings, of a seed of their own. Honest clients who
were never blocked can't be flagged: runs that choose thresholds leave out their events, not their sessions; the scored
runs have everything. Ablations and curves are read off signals, thresholds chosen anew for each.
"""

import math
import multiprocessing
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from detectors.config import DetectConfig
from tests.bench.probing_clients import DAY_S, NOVEL, Client, population, probing
from tests.bench.probing_log import SECOND_US, START_S, Passed, moments_us, only_probing, passed, user_of

DAYS: Final = 10
CLIENTS: Final = 2_000
WORKERS: Final = 6
ATTACKS: Final = {0.66: 100, 0.3: 100, 0.1: 30}
"""A row of the table, by the share that the guard blocks."""
SHARES: Final = {"0.01 %": (1e-4, (0.66,)), "0.1 %": (1e-3, (0.3, 0.1))}
"""Honest sessions that may be flagged, and the guards whose attacks are injected there."""
COVERS: Final = (0, 4)
KNOWN_DAYS: Final = {"stranger": 0.0, "known": 7.0}
BEGINS_DAY: Final = {"burst": 8.0, "10 min": 8.0, "1 h": 7.0, "1 d": 7.0}
WITHIN: Final = {
    "burst": ("attempts", 10, 20), "10 min": ("hours", 3, 12), "1 h": ("hours", 24, 72), "1 d": ("hours", 240, 720),
}  # fmt: skip
FLOOR: Final = 1.5
"""Threshold of the runs that choose thresholds: weaker signals are not needed."""
COLD, WARM = (0.0, 3 * DAY_S), (7 * DAY_S, 10 * DAY_S)
WINDOWS: Final = {"first 3 days": COLD, "days 8 to 10": WARM}
ABLATIONS: Final[dict[str, dict[str, Any]]] = {
    "all signals": {},
    "no past of the client's own": {"prior_prompts": 1e12},
    "no fading": {"half_life_s": 10**9, "slow_half_life_s": 10**9},
    "rewording after a block as any other prompt": {"retry_s": 0},
    "every rewording after a block as the first": {"retries_max": 10**6},
    "no slow evidence": {"slow_extra": 1e6},
    "no allowance for swings": {"swing": 1.0},
    "no bar from the client's own record": {"record_share": 0.0},
    "long runs not learned": {"learn_prompts": 10**9},
}
SAME_ABLATION: Final = "likeness of prompts hidden"
FIGURES: Final = (
    "probing at 0.01 % of benign sessions flagged, guard blocking 66 %",
    "the same at 0.1 %, guard blocking 30 %; 10 %",
)


class Attack(NamedTuple):
    """One client who probes, and the row of the table that he counts in."""

    name: str
    style: str
    client: Client


class Told(NamedTuple):
    """What was said of a client at a moment, and the threshold in nats that would just have been passed."""

    user: str
    at_us: int
    strength: float


def config_of(**probing_settings: Any) -> DetectConfig:
    """Only this detector; a lane may be silent for long, since simulated traffic is thin."""
    settings = {"probing": probing_settings, "time": {"silence_max_ms": 86_400_000}}
    return DetectConfig.model_validate(only_probing() | settings)


def attacks_of(seed: int, guards: Sequence[float], part: float = 1.0) -> list[Attack]:
    """`ATTACKS` of each style, guard, cover and past, or a part of them."""
    rng = random.Random(seed)  # noqa: S311 seeded on purpose
    found = []
    for style, begin_day in BEGINS_DAY.items():
        for guard in guards:
            for cover in COVERS:
                for known, days in KNOWN_DAYS.items():
                    name = f"{style}, guard {guard:.0%}, cover {cover}, {known}"
                    for _ in range(math.ceil(ATTACKS[guard] * part)):
                        begin_s = (begin_day + rng.random()) * DAY_S
                        client = probing(style, begin_s, rng, guard=guard, cover=cover, past_days=days)
                        found.append(Attack(name, style, client))
    return found


def sessions_of(clients: Sequence[Client], window: tuple[float, float]) -> float:
    """Sessions in the window, weighted as the mix is."""
    total = 0.0
    for client in clients:
        inside = (client.at_s >= window[0]) & (client.at_s < window[1])
        total += client.weight * len(np.unique(client.sessions()[inside]))
    return total


def flagged(
    told: Sequence[Told], clients: Sequence[Client], numbers: Sequence[int], window: tuple[float, float]
) -> list[tuple[float, float, str]]:
    """(strength, weight, kind) of each honest session of which something was said in the window, strongest first."""
    places = {user_of(number): client for number, client in zip(numbers, clients, strict=True)}
    strongest: dict[tuple[str, int], float] = {}
    for said in told:
        client = places.get(said.user)
        at_s = said.at_us / SECOND_US - START_S
        if client is not None and window[0] <= at_s < window[1]:
            place = int(np.searchsorted(moments_us(client), said.at_us, side="right")) - 1
            session = int(client.sessions()[max(place, 0)])
            strongest[said.user, session] = max(said.strength, strongest.get((said.user, session), 0.0))
    rows = [(value, places[user].weight, places[user].kind) for (user, _), value in strongest.items()]
    return sorted(rows, reverse=True)


def share_of(rows: Sequence[tuple[float, float, str]], total: float, least: float = 0.0) -> dict[str, float]:
    """Share of all sessions that was flagged with at least this strength, and of which kind of client."""
    shares: dict[str, float] = {"all": 0.0}
    for strength, weight, kind in rows:
        if strength >= least:
            shares["all"] += weight / total
            shares[kind] = shares.get(kind, 0.0) + weight / total
    return {kind: float(f"{share:.3g}") for kind, share in shares.items()}


def threshold_for(share: float, rows: Sequence[tuple[float, float, str]], total: float) -> float:
    """The least threshold in nats that flags at most this share of sessions."""
    room = share * total
    for strength, weight, _ in rows:
        room -= weight
        if room < 0:
            return strength + 1e-3
    return FLOOR


def of_signals(out: Passed) -> list[Told]:
    """What stage 1 said."""
    return [
        Told(each.entity.id.partition("/")[0], each.last_seen_us, each.counts["most_milli"] / 1_000)
        for each in out.signals
        if each.kind == "probing"
    ]


def of_findings(out: Passed) -> list[Told]:
    """What people are told: each revision but the one that closes."""
    return [
        Told(each.entity.id.partition("/")[0], each.last_seen_us, 1.0)
        for each in out.findings
        if each.detector == "probing" and each.state != "close"
    ]


def recall(told: Sequence[Told], attacks: Sequence[Attack], numbers: Sequence[int], least: float) -> dict[str, Any]:
    """By name: the share found within the two limits of its style."""
    first: dict[str, int] = {}
    begins = {user_of(n): int(moments_us(a.client)[a.client.attack][0]) for n, a in zip(numbers, attacks, strict=True)}
    for said in told:
        if said.strength >= least and said.at_us >= begins.get(said.user, 2**62):
            first[said.user] = min(said.at_us, first.get(said.user, said.at_us))
    found: dict[str, list[float]] = {}
    for number, attack in zip(numbers, attacks, strict=True):
        moments = moments_us(attack.client)[attack.client.attack]
        at_us = first.get(user_of(number))
        took = float("inf")
        if at_us is not None:
            took = float((moments <= at_us).sum()) if attack.style == "burst" else (at_us - moments[0]) / 3.6e9
        found.setdefault(attack.name, []).append(took)
    rows: dict[str, Any] = {}
    for name, times in found.items():
        unit, soon, late = WITHIN[name.partition(",")[0]]
        rows[name] = {
            f"within {limit} {unit}": round(float(np.mean(np.array(times) <= limit)), 3) for limit in (soon, late)
        }
    return rows


class Run(NamedTuple):
    """Signals with the low threshold, of honest clients who were ever blocked and of attacks."""

    told: list[Told]
    clients: Sequence[Client]
    """All honest ones."""
    ever: list[Client]
    honest: range
    probers: range


def floor_run(clients: Sequence[Client], attacks: Sequence[Attack], settings: dict[str, Any]) -> Run:
    """Through stage 1."""
    ever = [client for client in clients if client.blocked.any()]
    everyone = [*ever, *(attack.client for attack in attacks)]
    out = passed(everyone, range(len(everyone)), config_of(**settings, threshold=FLOOR), told=False)
    return Run(of_signals(out), clients, ever, range(len(ever)), range(len(ever), len(everyone)))


def scored(clients: Sequence[Client], attacks: Sequence[Attack], threshold: float) -> dict[str, Any]:
    """Findings with this threshold, of everybody: sessions flagged, cold and warm, and recall."""
    everyone = [*clients, *(attack.client for attack in attacks)]
    out = passed(everyone, range(len(everyone)), config_of(threshold=threshold))
    told, honest = of_findings(out), range(len(clients))
    rows = {name: flagged(told, clients, honest, window) for name, window in WINDOWS.items()}
    return {
        "threshold_nats": round(threshold, 2),
        "events": out.events,
        "findings": len(out.findings),
        "honest_sessions_flagged": {
            name: share_of(rows[name], sessions_of(clients, window)) for name, window in WINDOWS.items()
        },
        "honest_sessions_told_unweighted": {name: len(found) for name, found in rows.items()},
        "recall": recall(told, attacks, range(len(clients), len(everyone)), 1.0),
    }


def cold_of(run: Run, threshold: float, attacks: Sequence[Attack]) -> dict[str, Any]:
    """What the bars of new clients and tenants do, read off signals: the cap on clients told is stage 2's alone."""
    rows, total = flagged(run.told, run.ever, run.honest, COLD), sessions_of(run.clients, COLD)
    extra = DetectConfig().probing.cold_extra
    found = recall(run.told, attacks, run.probers, threshold + extra)
    return {
        "clients in their first 3 days, where the tenant is no longer new": share_of(rows, total, threshold),
        "the same, tenant new, but without the cap on clients": share_of(rows, total, threshold + extra),
        "recall, tenant new": {name: row for name, row in found.items() if name.endswith("stranger")},
        "sessions a client in 3 days": round(total, 2),
    }


def hidden(client: Client) -> Client:
    """Every prompt as if it were like no other."""
    return replace(client, prompt=np.full_like(client.prompt, NOVEL))


def ablation(clients: Sequence[Client], attacks: Sequence[Attack], name: str) -> dict[str, Any]:
    """One signal off, the threshold chosen anew: recall at 0.1 %, guard blocking 66 %."""
    total, settings = sessions_of(clients, WARM), ABLATIONS.get(name, {})
    if name == SAME_ABLATION:
        clients = [hidden(client) for client in clients]
        attacks = [attack._replace(client=hidden(attack.client)) for attack in attacks]
    run = floor_run(clients, attacks, settings)
    threshold = threshold_for(1e-3, flagged(run.told, run.ever, run.honest, WARM), total)
    cold = share_of(flagged(run.told, run.ever, run.honest, COLD), sessions_of(clients, COLD), threshold)["all"]
    rows = recall(run.told, attacks, run.probers, threshold)
    return {"threshold_nats": round(threshold, 1), "new clients flagged": cold, "recall": rows}


def curves(
    chosen: Sequence[tuple[float, float, str]], total: float, run: Run, attacks: Sequence[Attack]
) -> list[dict[str, Any]]:
    """For several shares asked for: the threshold, the share measured on another seed, and recall there."""
    warm, sessions = flagged(run.told, run.ever, run.honest, WARM), sessions_of(run.clients, WARM)
    rows = []
    for share in (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3):
        threshold = threshold_for(share, chosen, total)
        rows.append({
            "asked": share,
            "threshold_nats": round(threshold, 2),
            "measured": share_of(warm, sessions, threshold)["all"],
            "recall": recall(run.told, attacks, run.probers, threshold),
        })  # fmt: skip
    return rows


_given: dict[str, Any] = {}
"""What the jobs share: set before they are forked."""


def _job(name: str) -> dict[str, Any]:
    """One of the runs that need the thresholds."""
    seed, part, chosen, total = _given["seed"], _given["part"], _given["chosen"], _given["total"]
    fresh = _given["fresh"]
    if name in SHARES:
        share, guards = SHARES[name]
        return scored(fresh, attacks_of(seed + 2_000, guards, part), threshold_for(share, chosen, total))
    if name == "curves":
        both = attacks_of(seed + 5_000, (0.66, 0.3), part / 3)
        run = floor_run(fresh, both, {})
        return {
            "cold": cold_of(run, threshold_for(1e-4, chosen, total), both),
            "curves": curves(chosen, total, run, both),
        }
    return ablation(fresh[::4], attacks_of(seed + 6_000, (0.66,), part / 6), name)


def measure(data: Path, seed: int, *, quick: bool) -> dict[str, Any]:  # every part is given the data
    """All figures. 2,000 honest clients for ten days are 640,000 events; with `quick` a hundred."""
    clients, part = (100, 0.01) if quick else (CLIENTS, 1.0)
    calm = population(clients, DAYS, seed + 1_000)
    quiet = floor_run(calm, [], {})
    _given.update(
        seed=seed,
        part=part,
        chosen=flagged(quiet.told, quiet.ever, quiet.honest, WARM),
        total=sessions_of(calm, WARM),
        fresh=population(clients, DAYS, seed),
    )
    names = [*SHARES, "curves", *ABLATIONS, SAME_ABLATION]
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("fork")) as pool:
        found = dict(zip(names, pool.map(_job, names), strict=True))
    return {
        "about": {
            "real": "nothing: who is blocked by mistake and how attacks are paced is simulated",
            "injected": "all attacks, labelled",
            "honest_clients": clients,
            "honest_sessions_chosen_on": sum(len(np.unique(c.sessions())) for c in calm),
            "attacks_a_row": {f"guard {guard:.0%}": number for guard, number in ATTACKS.items()},
            "thresholds": f"chosen on seed {seed + 1_000}, scored on seed {seed}",
        },
        "at": {name: found[name] for name in SHARES},
        **found["curves"],
        "ablations": {name: found[name] for name in (*ABLATIONS, SAME_ABLATION)},
    }


def _low(rows: dict[str, Any], style: str, guard: str, cover: int, limit: str) -> float:
    """The smaller recall of strangers and known clients."""
    row = f"{style}, guard {guard}, cover {cover}"
    return float(min(rows[f"{row}, {known}"][f"within {limit}"] for known in KNOWN_DAYS))


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Two rows. Of strangers and known clients the worse recall counts."""
    strict, loose = figures["at"]["0.01 %"], figures["at"]["0.1 %"]
    rows = strict["recall"]
    cold = strict["honest_sessions_flagged"]["first 3 days"]["all"]
    warm = max(strict["honest_sessions_flagged"]["days 8 to 10"]["all"], SHARES["0.01 %"][0])
    first: dict[str, Any] = {
        "burst in 20": _low(rows, "burst", "66%", 0, "20 attempts"),
        "burst in 10": _low(rows, "burst", "66%", 0, "10 attempts"),
        "one in 10 min in 3 h": _low(rows, "10 min", "66%", 0, "3 hours"),
        "one an hour in 24 h": _low(rows, "1 h", "66%", 0, "24 hours"),
        "covered: burst in 20": _low(rows, "burst", "66%", 4, "20 attempts"),
        "covered: one in 10 min in 3 h": _low(rows, "10 min", "66%", 4, "3 hours"),
        "covered: one an hour in 24 h": _low(rows, "1 h", "66%", 4, "24 hours"),
        "cold start, times": round(cold / warm, 2),
        "one a day in 30 d": _low(rows, "1 d", "66%", 0, "720 hours"),
        "sessions flagged": strict["honest_sessions_flagged"]["days 8 to 10"]["all"],
    }
    least = dict(zip(first, (0.95, 0.6, 0.95, 0.95, 0.9, 0.9, 0.9), strict=False))
    missed = [name for name, goal in least.items() if first[name] < goal]
    missed += ["cold start, times"] * (first["cold start, times"] > 2)
    second: dict[str, Any] = {
        "burst in 20": _low(loose["recall"], "burst", "30%", 0, "20 attempts"),
        "one in 10 min in 12 h": _low(loose["recall"], "10 min", "30%", 0, "12 hours"),
        "one an hour in 72 h": _low(loose["recall"], "1 h", "30%", 0, "72 hours"),
        "sessions flagged": loose["honest_sessions_flagged"]["days 8 to 10"]["all"],
        "guard 10 %": {
            style: _low(loose["recall"], style, "10%", 0, f"{WITHIN[style][2]} {WITHIN[style][0]}")
            for style in ("burst", "10 min", "1 h")
        },
    }
    missed_too = [name for name, goal in zip(second, (0.9, 0.98, 0.95), strict=False) if second[name] < goal]
    limits = ("burst >= .95 in 20, >= .6 in 10; 10 min >= .95 in 3 h; 1 h >= .95 in 24 h; covered >= .9; cold <= 2", "")
    return [
        {
            "figure": FIGURES[0],
            "goal": limits[0],
            "measured": first,
            "met": not missed,
            "why": _why(missed, "the worse of strangers and clients known for a week"),
        },
        {
            "figure": FIGURES[1],
            "goal": ">= .9 (20 requests) / .98 (12 h) / .95 (72 h); at 10 % printed",
            "measured": second,
            "met": not missed_too,
            "why": _why(missed_too, "the worse of strangers and clients known for a week"),
        },
    ]


def _why(missed: Sequence[str], said: str) -> str:
    return f"missed: {', '.join(missed)}; {said}" if missed else said
