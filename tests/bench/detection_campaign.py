"""Distributed campaigns on the deployed path: variants of a prompt by 200 users; months of blocked prompts without.

    .venv/bin/python -m tests.bench.detection --data DIR --only campaign --json

Real: the prompts (`prompts/` of the data), and their keyed MinHash as the collector makes it. Simulated: who sends them
and when. Injected: the campaigns; each variant has some of its words replaced by words of other prompts.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from collector.event import Goodbye, Hello
from collector.minhash import MinHash
from detectors.config import DetectConfig
from detectors.engine import PartitionEngine, TenantEngine
from detectors.finding import Finding
from tests.bench.blocked_log import DAY_S, Writer, sketched

USERS: Final = 200
PROMPTS_A_USER: Final = 3
REPLACED: Final = (0.0, 0.1, 0.2, 0.3, 0.4)
SPAN_S: Final = 6 * 3_600.0
BLOCKS_A_DAY: Final = 25
MONTH_DAYS: Final = 30
ONLY: Final = DetectConfig.model_validate(
    {name: {"enabled": False} for name in ("block_rate", "latency", "probing", "token_length")}
)


def prompts_of(data: Path) -> tuple[list[str], list[str]]:
    """(attack prompts of fifteen words and more, benign prompts)."""
    attack = [each.get("user_input") or "" for each in json.loads((data / "prompts/prompt_injection.json").read_text())]
    benign = [
        each.get("prompt") or each.get("mutated_prompt") or ""
        for each in json.loads((data / "prompts/mitre_frr.json").read_text())
    ]
    return [text for text in attack if len(text.split()) >= 15], [text for text in benign if text]


def variant(text: str, share: float, words: Sequence[str], rng: np.random.Generator) -> str:
    """The text with that share of its words replaced."""
    return " ".join(word if rng.random() >= share else words[int(rng.integers(len(words)))] for word in text.split(" "))


def found(at_s: Any, users: Any, sketches: Sequence[str], end_s: float) -> list[Finding]:
    """All findings of campaigns that these blocked requests give."""
    one = PartitionEngine(ONLY, topic="iw.events", partition=0, partitions=1)
    two = TenantEngine(ONLY, partition=0, partitions=1)
    writer = Writer()
    findings: list[Finding] = []
    records = [writer.end(Hello, -1.0), sketched(writer, at_s, users, sketches), writer.end(Goodbye, end_s)]
    for each in records:
        refused = one.observe_log(*each)
        if refused:
            raise ValueError(f"stage 1 refused {len(refused)} records: {refused[0][1]}")
        for rollup in one.take():
            two.observe(rollup)
        findings += [finding for finding in two.take() if finding.detector == "campaign"]
    return findings


def measure(data: Path, seed: int, *, quick: bool) -> dict[str, Any]:
    """Raw figures; without the data's prompts it says so."""
    if not (data / "prompts").is_dir():
        return {"about": "the data has no prompts", "months": 0}
    attacks, benign = prompts_of(data)
    words = [word for text in benign for word in text.split()]
    rng = np.random.default_rng([seed, 77])
    minhash = MinHash(b"bench")
    quiet = [minhash.encode(text) for text in benign]
    months, campaigns = (1, 1) if quick else (12, 20)
    false = [month(rng, quiet) for _ in range(months)]
    figures: dict[str, Any] = {
        "about": "prompts real, senders simulated, campaigns injected among ordinary blocked prompts",
        "months": months,
        "false_campaigns_a_month": round(float(np.mean(false)), 3),
        "blocked_prompts_a_month": BLOCKS_A_DAY * MONTH_DAYS,
    }
    for share in REPLACED:
        runs = []
        for _ in range(campaigns):
            text = attacks[int(rng.integers(len(attacks)))]
            made = [minhash.encode(variant(text, share, words, rng)) for _ in range(USERS * PROMPTS_A_USER)]
            runs.append(campaign_of(rng, quiet, made))
        figures[f"replaced {share:.0%}"] = {
            "found": round(float(np.mean([bool(run["incidents"]) for run in runs])), 3),
            "one_incident": round(float(np.mean([run["incidents"] == 1 for run in runs])), 3),
            "incidents_median": float(np.median([run["incidents"] for run in runs])),
            "episodes_median": float(np.median([run["episodes"] for run in runs])),
            "users_named_median": float(np.median([run["users"] for run in runs])),
        }
    return figures


def month(rng: np.random.Generator, quiet: Sequence[str]) -> int:
    count = BLOCKS_A_DAY * MONTH_DAYS
    at_s = np.sort(rng.random(count)) * MONTH_DAYS * DAY_S
    which = np.concatenate([rng.permutation(len(quiet)) for _ in range(count // len(quiet) + 1)])[:count]
    told = found(at_s, rng.integers(0, 500, count), [quiet[number] for number in which], MONTH_DAYS * DAY_S + 3_600)
    return len({finding.incident for finding in told})


def campaign_of(rng: np.random.Generator, quiet: Sequence[str], made: Sequence[str]) -> dict[str, int]:
    """Half a day of ordinary blocked prompts, the campaign in the middle."""
    ordinary = BLOCKS_A_DAY // 2
    at_s = np.concatenate([rng.random(ordinary) * 2 * SPAN_S, SPAN_S / 2 + rng.random(len(made)) * SPAN_S])
    users = np.concatenate([rng.integers(0, 500, ordinary), 1_000 + rng.permutation(np.arange(len(made)) % USERS)])
    sketches = [quiet[int(rng.integers(len(quiet)))] for _ in range(ordinary)] + list(made)
    order = np.argsort(at_s)
    told = found(at_s[order], users[order], [sketches[number] for number in order], 2 * SPAN_S + 3_600)
    return {
        "incidents": len({finding.incident for finding in told}),
        "episodes": len({finding.uid for finding in told}),
        "users": max((finding.counts["users"] for finding in told), default=0),
    }


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The row of the table that this part answers."""
    figure = "distributed campaign, 200 users × 3"
    goal = "found ≥ .95 and one incident to 30 % of words replaced; ≤ 1 false campaign a month"
    if not figures["months"]:
        return [{"figure": figure, "goal": goal, "measured": None, "met": False, "why": figures["about"]}]
    rows = {name: figures[name] for name in figures if name.startswith("replaced")}
    to_thirty = [rows[f"replaced {share:.0%}"] for share in REPLACED if share <= 0.3]
    met = all(row["found"] >= 0.95 and row["one_incident"] >= 0.95 for row in to_thirty)
    met = met and figures["false_campaigns_a_month"] <= 1
    measured = {"false_campaigns_a_month": figures["false_campaigns_a_month"]} | rows
    return [{"figure": figure, "goal": goal, "measured": measured, "met": bool(met), "why": figures["about"]}]
