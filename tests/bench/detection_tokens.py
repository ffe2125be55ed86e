"""Completion lengths on the deployed path: long answers injected into Azure's and Mooncake's real ones.

Real: prompt and completion lengths and their times. Injected: users with long answers (median 900 tokens, log-normal,
sd .4, at most the longest of the trace), .1 % of the users of the second half; and a guard that suspects half of the
injected answers and 1 % of the others. Azure names no users: a client is ten requests in turn. Mooncake's are its
conversations, rebuilt from shared prefix blocks; an injected one has ten turns, six in ten of them long. The first half
of a trace is learned and not scored. What is counted is users, since a finding names one; by single completions the
task is another, and harder. Thresholds are the config's defaults; nothing was fitted to the second half.
"""

import gzip
import json
import math
from pathlib import Path
from typing import Any, Final

import numpy as np

from detectors.config import DetectConfig
from detectors.finding import Finding
from tests.bench.detection_pipe import SECOND_US, Calls, Floats, Ints, calls_of, passed

START_US: Final = 1_800_000_000 * SECOND_US
ALONE: Final = {name: {"enabled": False} for name in ("block_rate", "latency", "probing")}
PREVALENCE: Final = 0.001
TURNS: Final = 10
HIT, FALSE_HIT = 0.5, 0.01
REPETITIONS: Final = 20
ATTACKER: Final = 1_000_000
LONG_SHARE: Final = {"azure": 1.0, "mooncake": 0.6}


def azure(data: Path) -> tuple[Ints, Ints, Ints, Ints]:
    """(µs, prompt tokens, completion tokens, user)."""
    with gzip.open(data / "traces" / "azure_2023_conv.csv.gz", "rt") as opened:
        rows = [line.rstrip().split(",") for line in opened.readlines()[1:]]
    moment = np.array([row[0][:26] for row in rows], "datetime64[us]").astype(np.int64)
    sizes = np.array([[int(row[1]), int(row[2])] for row in rows])
    return START_US + moment - moment[0], sizes[:, 0], sizes[:, 1], np.arange(len(rows)) // TURNS


def mooncake(data: Path) -> tuple[Ints, Ints, Ints, Ints]:
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


def injected(trace: tuple[Ints, Ints, Ints, Ints], long_share: float, rng: np.random.Generator) -> Calls:
    """The trace with as many attackers as the prevalence allows, at least one, in its second half."""
    order = np.argsort(trace[0], kind="stable")
    moment, prompt, answer, user = (column[order] for column in trace)
    half = len(moment) // 2
    attackers = max(1, round(PREVALENCE * len(np.unique(user[half:]))))
    score = np.where(rng.random(len(moment)) < FALSE_HIT, 0.9, 0.1)
    pieces = [(moment, prompt, answer, user, score)]
    for number in range(attackers):
        at = np.sort(rng.choice(np.arange(half, len(moment)), TURNS, replace=False))
        like = rng.integers(half, len(moment), TURNS)
        length = np.exp(rng.normal(math.log(900), 0.4, TURNS)).astype(np.int64)
        long = rng.random(TURNS) < long_share
        length = np.where(long, np.minimum(length, answer.max()), answer[like])
        suspect = np.where(rng.random(TURNS) < np.where(long, HIT, FALSE_HIT), 0.9, 0.1)
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
    """Users whom a finding names from then on, and those of a High one."""
    mine = [(int(each.entity.id.removeprefix("u_"), 16), each) for each in findings if each.updated_us >= since_us]
    return {user for user, _ in mine}, {user for user, each in mine if each.severity == "high"}


def trial(trace: tuple[Ints, Ints, Ints, Ints], long_share: float, seed: int) -> dict[str, int]:
    """Counts of one injection."""
    calls = injected(trace, long_share, np.random.default_rng(seed))
    findings = passed(calls, DetectConfig.model_validate(ALONE))
    told, high = users_told(findings, int(np.median(calls.moment_us)))
    attackers = set(np.unique(calls.user[calls.user >= ATTACKER]).tolist())
    long = (calls.score > 0.5) & (calls.response_tokens > np.quantile(calls.response_tokens, 0.9))
    marked = attackers & set(calls.user[long].tolist())
    return {
        "attackers": len(attackers),
        "marked": len(marked),
        "told": len(told),
        "told_right": len(told & attackers),
        "high": len(high),
        "high_right": len(high & attackers),
    }


def measure(data: Path, seed: int, *, quick: bool) -> dict[str, Any]:
    """Raw figures."""
    figures: dict[str, Any] = {"about": {"real": "lengths and times", "injected": "long answers, guard scores; users"}}
    for name, (read, file) in TRACES.items():
        if not (data / "traces" / file).exists():
            figures[name] = {"absent": f"traces/{file}"}
            continue
        trace = read(data)
        trials = [trial(trace, LONG_SHARE[name], seed * 1_000 + turn) for turn in range(1 if quick else REPETITIONS)]
        sums = {key: sum(each[key] for each in trials) for key in trials[0]}
        figures[name] = sums | {
            "precision": _share(sums["told_right"], sums["told"]),
            "recall": _share(sums["told_right"], sums["attackers"]),
            "signal_hit_rate": _share(sums["marked"], sums["attackers"]),
            "high_precision": _share(sums["high_right"], sums["high"]),
            "high_recall": _share(sums["high_right"], sums["attackers"]),
        }
    return figures


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 3) if whole else None


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """One row."""
    least = {"azure": (0.6, 0.5), "mooncake": (0.4, 0.67)}
    measured = {name: figures[name] for name in least if "recall" in figures[name]}
    met = len(measured) == len(least)
    for name, told in measured.items():
        wanted_high = 0.9 * (told["signal_hit_rate"] or 0) * (told["recall"] or 0)
        met &= (told["precision"] or 0) >= least[name][0] and (told["recall"] or 0) >= least[name][1]
        met &= (told["high_precision"] or 0) >= 0.95 and (told["high_recall"] or 0) >= wanted_high
    return [
        {
            "figure": "token length at 0.1 % prevalence",
            "goal": "High: precision >= .95, recall >= .9 x hit rate x length recall; alone .6 / .5 and .4 / .67",
            "measured": measured or None,
            "met": met,
            "why": "by user; half of the injected answers carry the guard's suspicion, 1 % of the others",
        }
    ]
