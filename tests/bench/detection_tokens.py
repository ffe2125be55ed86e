"""Completion lengths on the deployed path: long answers injected into Azure's and Mooncake's real ones.

Real: prompt and completion lengths and their times. Injected: users with ten requests in the second half, of which a
share has a long answer (median 900 tokens, log-normal, sd .4, at most the longest of the trace); and a guard that
suspects half of the injected answers and 1 % of the others. Azure names no users: a client is ten requests in turn.
Mooncake's are its conversations, rebuilt from shared prefix blocks; an injected one has six long answers in ten. The
first half of a trace is learned and not scored. Counted are users, since a finding names one. More attackers are
injected than the prevalence of .1 % has, for the sake of their number, so precision is worked out for that prevalence
from the shares of attackers and of honest users told.

The budget is the knob, and follows from the goal alone: a precision of .4 at a recall of .67 and a prevalence of .1 %
allows 1 honest user in 1,000; times the users a week that is `budget_per_week`. Nothing was fitted to the second half.
The same with the default budget is printed beside it, and three attacks that are harder or of another kind.
"""

import gzip
import json
import math
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from detectors.config import DetectConfig
from detectors.finding import Finding
from tests.bench.detection_pipe import SECOND_US, Calls, Floats, Ints, calls_of, others_than, passed

START_US: Final = 1_800_000_000 * SECOND_US
Trace = tuple[Ints, Ints, Ints, Ints]
"""(µs, prompt tokens, completion tokens, user)."""
TOGETHER_US: Final = 1_200 * SECOND_US
OTHERS: Final = others_than("token_length")
PREVALENCE: Final = 0.001
TURNS: Final = 10
HIT, FALSE_HIT = 0.5, 0.01
TRIALS, TRIALS_BESIDE = 8, 3
ATTACKER: Final = 1_000_000
WEEK_S: Final = 7 * 86_400


class Case(NamedTuple):
    """One kind of attack on one trace."""

    trace: str
    long_share: float
    attackers: int = 4
    wanted: tuple[float, float] | None = None
    """Precision and recall that the budget is for; None: the default budget."""
    guarded: bool = True
    """Whether the guard suspects anything."""
    together: bool = False
    """All attackers within twenty minutes."""


AZURE, MOONCAKE = (0.6, 0.5), (0.4, 0.67)
CASES: Final = {
    "azure": Case("azure", 1.0, wanted=AZURE),
    "mooncake": Case("mooncake", 0.6, attackers=4, wanted=MOONCAKE),
    "azure, default budget": Case("azure", 1.0),
    "mooncake, default budget": Case("mooncake", 0.6, attackers=4),
    "azure, three long answers in ten": Case("azure", 0.3, wanted=AZURE),
    "azure, one long answer in ten": Case("azure", 0.1, wanted=AZURE),
    "azure, twelve users together, no guard": Case("azure", 0.6, 12, AZURE, guarded=False, together=True),
}


def azure(data: Path) -> Trace:
    """(µs, prompt tokens, completion tokens, user)."""
    with gzip.open(data / "traces" / "azure_2023_conv.csv.gz", "rt") as opened:
        rows = [line.rstrip().split(",") for line in opened.readlines()[1:]]
    moment = np.array([row[0][:26] for row in rows], "datetime64[us]").astype(np.int64)
    sizes = np.array([[int(row[1]), int(row[2])] for row in rows])
    return START_US + moment - moment[0], sizes[:, 0], sizes[:, 1], np.arange(len(rows)) // TURNS


def mooncake(data: Path) -> Trace:
    """The same; the user is the conversation."""
    with gzip.open(data / "traces" / "mooncake_conversation.jsonl.gz", "rt") as opened:
        rows = [json.loads(line) for line in opened]
    known: dict[tuple[int, ...], int] = {}
    user = []
    for number, row in enumerate(rows):
        blocks = row["hash_ids"]
        found = (known.get(tuple(blocks[:size])) for size in range(len(blocks), 1, -1))
        user.append(next((each for each in found if each is not None), number))
        if len(blocks) > 2:
            known[tuple(blocks[:-1])] = user[-1]
    moment = np.array([row["timestamp"] for row in rows], np.int64) * 1_000
    sizes = np.array([[row["input_length"], row["output_length"]] for row in rows])
    return START_US + moment, sizes[:, 0], sizes[:, 1], np.array(user)


TRACES: Final = {"azure": (azure, "azure_2023_conv.csv.gz"), "mooncake": (mooncake, "mooncake_conversation.jsonl.gz")}


def injected(trace: Trace, case: Case, rng: np.random.Generator) -> Calls:
    """The trace with attackers in its second half."""
    order = np.argsort(trace[0], kind="stable")
    moment, prompt, answer, user = (column[order] for column in trace)
    half, end = len(moment) // 2, len(moment)
    false_hit, hit = (FALSE_HIT, HIT) if case.guarded else (0.0, 0.0)
    score = np.where(rng.random(end) < false_hit, 0.9, 0.1)
    pieces = [(moment, prompt, answer, user, score)]
    if case.together:
        half = int(rng.integers(half, np.searchsorted(moment, moment[-1] - TOGETHER_US)))
        end = int(np.searchsorted(moment, moment[half] + TOGETHER_US))
    for number in range(case.attackers):
        at = np.sort(rng.choice(np.arange(half, end), TURNS, replace=False))
        like = rng.integers(half, end, TURNS)
        length = np.exp(rng.normal(math.log(900), 0.4, TURNS)).astype(np.int64)
        long = rng.random(TURNS) < case.long_share
        length = np.where(long, np.minimum(length, answer.max()), answer[like])
        suspect = np.where(rng.random(TURNS) < np.where(long, hit, false_hit), 0.9, 0.1)
        pieces.append((moment[at] + 1, prompt[like], length, np.full(TURNS, ATTACKER + number), suspect))
    moment, prompt, answer, user = (np.concatenate([piece[place] for piece in pieces]) for place in range(4))
    scores: Floats = np.concatenate([piece[4] for piece in pieces])
    order = np.lexsort((user, moment))
    order = order[answer[order] > 0]
    latency_ms = (200 + 10 * answer).astype(np.float64)
    moment = moment[order] + np.arange(len(order))
    fields = {"response_tokens": answer, "prompt_tokens": prompt, "user": user, "score": scores}
    return calls_of(moment, latency_ms[order], **{name: values[order] for name, values in fields.items()})


def users_told(findings: list[Finding], since_us: int) -> tuple[set[int], set[int]]:
    """Users whom a finding that opened from then on names, and those of a High one."""
    opened = {each.uid for each in findings if each.state == "open" and each.updated_us >= since_us}
    mine = [(int(each.entity.id.removeprefix("u_"), 16), each) for each in findings if each.uid in opened]
    before = {each.entity.id for each in findings if each.updated_us < since_us}
    mine = [(user, each) for user, each in mine if each.entity.id not in before]
    return {user for user, _ in mine}, {user for user, each in mine if each.severity == "high"}


def config_of(trace: Trace, case: Case) -> DetectConfig:
    """This detector alone, with the budget that the goal allows."""
    table: dict[str, Any] = {name: {"enabled": False} for name in OTHERS}
    table["time"] = {"silence_max_ms": 86_400_000}
    if case.wanted is not None:
        table["token_length"] = {"budget_per_week": round(honest_a_week(trace) * false_share(case.wanted), 1)}
    return DetectConfig.model_validate(table)


def honest_a_week(trace: Trace) -> float:
    """Users a week, as the second half has them."""
    half = len(trace[0]) // 2
    span_s = (trace[0][-1] - trace[0][half]) / SECOND_US
    return float(len(np.unique(trace[3][half:])) / span_s * WEEK_S)


def false_share(wanted: tuple[float, float]) -> float:
    """The share of honest users that may be told."""
    precision, recall = wanted
    return recall * PREVALENCE * (1 - precision) / precision


def trial(trace: Trace, case: Case, config: DetectConfig, seed: int) -> dict[str, int]:
    """Counts of one injection."""
    calls = injected(trace, case, np.random.default_rng(seed))
    half_us = int(np.sort(trace[0])[len(trace[0]) // 2])
    told, high = users_told(passed(calls, config), half_us)
    attackers = set(np.unique(calls.user[calls.user >= ATTACKER]).tolist())
    marked = attackers & set(calls.user[calls.score > 0.5].tolist())
    return {
        "attackers": len(attackers),
        "marked": len(marked),
        "honest": len(np.unique(calls.user[calls.moment_us >= half_us])) - len(attackers),
        "told_right": len(told & attackers),
        "told_wrong": len(told - attackers),
        "high_right": len(high & attackers),
        "high_wrong": len(high - attackers),
    }


def measure(data: Path, seed: int, *, quick: bool) -> dict[str, Any]:
    """Raw figures."""
    figures: dict[str, Any] = {"about": {"real": "lengths and times", "injected": "long answers, guard scores; users"}}
    for name, case in CASES.items():
        read, file = TRACES[case.trace]
        if not (data / "traces" / file).exists():
            figures[name] = {"absent": f"traces/{file}"}
            continue
        trace = read(data)
        config = config_of(trace, case)
        many = TRIALS if name == case.trace else TRIALS_BESIDE
        trials = [trial(trace, case, config, seed * 1_000 + turn) for turn in range(1 if quick else many)]
        sums = {key: sum(each[key] for each in trials) for key in trials[0]}
        figures[name] = sums | {
            "budget_per_week": config.token_length.budget_per_week,
            "precision": at_prevalence(sums, "told"),
            "recall": _share(sums["told_right"], sums["attackers"]),
            "signal_hit_rate": _share(sums["marked"], sums["attackers"]),
            "high_precision": at_prevalence(sums, "high"),
            "high_recall": _share(sums["high_right"], sums["attackers"]),
        }
    return figures


def at_prevalence(sums: dict[str, int], what: str) -> float | None:
    """Precision where one user in a thousand is an attacker."""
    right = PREVALENCE * sums[f"{what}_right"] / sums["attackers"]
    wrong = (1 - PREVALENCE) * sums[f"{what}_wrong"] / sums["honest"]
    return round(right / (right + wrong), 3) if right + wrong else None


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 3) if whole else None


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """One row."""
    least = {"azure": AZURE, "mooncake": MOONCAKE}
    measured = {name: figures[name] for name in least if "recall" in figures[name]}
    others = {name: figures[name] for name in CASES if name not in least and "recall" in figures[name]}
    met = len(measured) == len(least)
    for name, told in measured.items():
        wanted_high = 0.9 * (told["signal_hit_rate"] or 0) * (told["recall"] or 0)
        met &= (told["precision"] or 0) >= least[name][0] and (told["recall"] or 0) >= least[name][1]
        met &= (told["high_precision"] or 0) >= 0.95 and (told["high_recall"] or 0) >= wanted_high
    return [
        {
            "figure": "token length at 0.1 % prevalence",
            "goal": "High: precision >= .95, recall >= .9 x hit rate x length recall; alone .6 / .5 and .4 / .67",
            "measured": (measured | {"beside": others}) if measured else None,
            "met": met,
            "why": "by user, precision for .1 % of users; guards suspect half of injected answers, 1 % of others",
        }
    ]
