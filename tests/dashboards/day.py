"""A seeded day of events and findings, put into a real chDB through the store.

Calm traffic of two models under a daily curve, three guards, a few errors and aborted streams; and four staged
episodes in the last two hours: a burst of blocked prompts, a session that rephrases, a slow half hour, and long
completions. Every id is a digest of its number, so the same seed gives the same rows.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from collector.event import SCHEMA_VERSION, AuditEvent, Decision, GuardResult, Rejection, from_timestamp_us
from collector.uuid7 import uuid7
from detectors.finding import Entity, Evidence, Finding, OffsetRange, Statistic, finding_uid
from sinks.clickhouse.rows import StoredEvent

MODELS = ("support-8b@41c0de2f", "code-assist-14b@9b7e11aa")
GUARDS = ("injection", "secrets", "output-policy")
DAY_S = 86_400


def digest(text: str, length: int = 32) -> str:
    """Hex digits that stand for `text`."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()[:length]


def user_id(name: str) -> str:
    """A pseudonym as the collector writes them."""
    return f"u_{digest(name)}"


def session_id(name: str) -> str:
    """Likewise, of a session."""
    return f"s_{digest('session ' + name)}"


@dataclass
class Maker:
    """Numbers events as four partitions of a topic would."""

    seed: int
    offsets: list[int]

    def event(self, at_us: int, user: str, *, number: int, blocked: bool = False, **fields: object) -> StoredEvent:
        """One answered or blocked request; `fields` override."""
        partition = int(digest(user, 4), 16) % len(self.offsets)
        offset = self.offsets[partition]
        self.offsets[partition] += 1
        decision: Decision = "block" if blocked else "allow"
        score = 0.97 if blocked else 0.03
        verdicts = [GuardResult(guard="injection", version="3", stage="input", decision=decision, score=score)]
        verdicts.append(GuardResult(guard="secrets", version="1", stage="input", decision="allow", score=0.0))
        if not blocked:
            verdicts.append(
                GuardResult(guard="output-policy", version="2", stage="output", decision="allow", score=0.05)
            )
        values: dict[str, object] = {
            "schema_version": SCHEMA_VERSION,
            "event_id": uuid7(lambda: at_us * 1000, lambda: bytes.fromhex(digest(f"{self.seed}/{number}", 20))),
            "timestamp": from_timestamp_us(at_us),
            "collector_id": "gpu-host-1",
            "boot": "b1",
            "seq": offset,
            "tenant": "acme",
            "session_id": session_id(user),
            "user_id": user_id(user),
            "prompt_hash": f"hmac:{digest(f'prompt {number}', 32)}{digest(f'more {number}', 32)}",
            "model_version": MODELS[0],
            "guardrail_results": verdicts,
            "response_tokens": 0,
            "latency_ms": 2.4,
            "blocked": blocked,
            "status": "blocked_input" if blocked else "ok",
            "http_request_id": uuid7(lambda: at_us * 1000, lambda: bytes.fromhex(digest(f"http/{number}", 20))),
            "route": "/v1/chat/completions",
            "operation": "chat",
            "http_status": 403 if blocked else 200,
            "prompt_tokens": 120,
            "view": "messages",
        }
        event_class = Rejection if fields.get("status") == "rejected" else AuditEvent
        event = event_class(**{**values, **fields})  # type: ignore[arg-type]  # from one dict
        return StoredEvent(event, partition, offset, at_us // 1000 + 40, "taken")


def answered(rng: random.Random, slowdown: float = 1.0) -> dict[str, object]:
    """What an answered request brings."""
    model = 0 if rng.random() < 0.72 else 1
    tokens = max(1, round(rng.lognormvariate(4.6 + 0.4 * model, 0.7)))
    per_token = rng.lognormvariate(math.log(11 + 6 * model), 0.12) * slowdown
    queue_ms = rng.expovariate(1 / 6) * slowdown**2
    ttft_ms = queue_ms + rng.lognormvariate(math.log(70), 0.3) * slowdown
    return {
        "model_version": MODELS[model],
        "response_tokens": tokens,
        "prompt_tokens": max(4, round(rng.lognormvariate(5.4, 0.8))),
        "latency_ms": ttft_ms + tokens * per_token,
        "ttft_ms": ttft_ms,
        "queue_ms": queue_ms,
        "ms_per_output_token": per_token,
        "stream": rng.random() < 0.6,
    }


def events(seed: int, end_us: int, *, per_second: float = 0.5, day_s: int = DAY_S) -> Iterator[StoredEvent]:
    """The day, in order of time, ending just before `end_us`."""
    rng = random.Random(seed)  # noqa: S311  # a repeatable day, no secret
    maker = Maker(seed, [1_000, 1_000, 1_000, 1_000])
    staged = sorted(_staged(rng, day_s), key=lambda part: part[0])
    at_s, number = 0.0, 0
    while True:
        at_s += rng.expovariate(per_second * (1 + 0.55 * math.sin(2 * math.pi * (at_s / DAY_S - 0.4))))
        while staged and (staged[0][0] <= at_s or at_s >= day_s):
            moment_s, user, fields = staged.pop(0)
            number += 1
            yield maker.event(end_us + round((moment_s - day_s) * 1e6), user, number=number, **fields)  # type: ignore[arg-type]
        if at_s >= day_s:
            return
        number += 1
        slow = 5.0 if day_s - 2_700 < at_s < day_s - 1_500 else 1.0
        moment_us = end_us + round((at_s - day_s) * 1e6)
        yield maker.event(moment_us, f"person-{rng.randrange(90)}", number=number, **_everyday(rng, slow))  # type: ignore[arg-type]


def _everyday(rng: random.Random, slow: float) -> dict[str, object]:
    fate = rng.random()
    if fate < 0.012:
        return {"blocked": True}
    if fate < 0.017:
        return {"status": "rejected", "reason": "unknown_key", "http_status": 401, "guardrail_results": []}
    fields = answered(rng, slow)
    if fate < 0.027:
        return {**fields, "status": "aborted"}
    if fate < 0.029:
        return {**fields, "status": "error", "http_status": 500, "response_tokens": 0}
    return fields


def _staged(rng: random.Random, day_s: int) -> Iterator[tuple[float, str, dict[str, object]]]:
    for number in range(260):
        yield day_s - 6_300 + rng.random() * 600, f"crowd-{number % 48}", {"blocked": True}
    for number in range(70):
        yield day_s - 3_600 + 22 * number, "prober", {"blocked": number % 9 != 4}
    for number in range(40):
        fields = {**answered(rng), "response_tokens": 3_800 + rng.randrange(200), "latency_ms": 46_000.0}
        yield day_s - 1_100 + 24 * number, f"drain-{number % 2}", fields


def findings(end_us: int) -> list[Finding]:
    """Four findings as the detectors would raise them, with their revisions, oldest revision first."""
    prober = f"{user_id('prober')}/{session_id('prober')}"
    told = (
        (
            "block_rate",
            Entity(kind="model", id=f"{MODELS[0]}/injection"),
            "high",
            (105, 95, 80),
            Statistic(name="CUSUM of prompt blocks, 3 times", observed=61.4, baseline=0.0, threshold=8.0, unit="nats"),
            26.7,
            "Blocks of injection on support-8b rose from 1.2 % to 38 %: 260 of 690 requests by 48 users in 10 min.",
            {"requests": 690, "blocked": 260, "users": 48, "distinct_prompts": 260},
        ),
        (
            "probing",
            Entity(kind="session", id=prober),
            "critical",
            (58, 40, 35),
            Statistic(
                name="distinct blocked prompts of one family", observed=62, baseline=0.4, threshold=8, unit="prompts"
            ),
            14.2,
            "One session had 62 different prompts blocked that are near copies of each other, and 8 were answered.",
            {"blocked": 62, "answered": 8, "families": 1},
        ),
        (
            "latency",
            Entity(kind="model", id=f"{MODELS[1]}/"),
            "medium",
            (44, 30, 26),
            Statistic(name="time per output token, p99", observed=93.1, baseline=19.8, threshold=39.6, unit="ms"),
            9.3,
            "Answers of code-assist-14b take 4.7 times as long per token as in the hour before; prompts did not grow.",
            {"requests": 212, "slow": 188},
        ),
        (
            "token_length",
            Entity(kind="user", id=user_id("drain-0")),
            "medium",
            (17, 9, 3),
            Statistic(name="completions beyond the 99.9th percentile", observed=19, baseline=0.02, threshold=4),
            11.8,
            "One user had 19 completions of about 3,900 tokens; of all others one in a thousand is longer than 610.",
            {"requests": 19, "response_tokens": 74_100},
        ),
    )
    return [
        revision
        for detector, entity, severity, ago_min, statistic, odds, summary, counts in told
        for revision in _revisions(
            [end_us - 60_000_000 * minutes for minutes in ago_min],
            detector=detector,
            entity=entity,
            severity=severity,
            statistic=msgspec.structs.replace(statistic, improbability=odds),
            summary=summary,
            counts=counts,
        )
    ]


def _revisions(moments_us: list[int], *, detector: str, entity: Entity, **fields: object) -> Iterator[Finding]:
    """Three revisions of one episode; that of `block_rate` is closed."""
    states = ("open", "update", "close" if detector == "block_rate" else "update")
    offsets = [OffsetRange(topic="iw.events", partition=part, first=1_200 + 7 * part, last=1_900) for part in (0, 2)]
    for number, (moment_us, state) in enumerate(zip(moments_us, states, strict=True), 1):
        yield Finding(
            schema_version="1.0",
            uid=finding_uid("acme", detector, entity, moments_us[0]),
            revision=number,
            state=state,  # type: ignore[arg-type]  # one of the words above
            tenant="acme",
            detector=detector,
            detector_version="1",
            config_digest="5ad1c0ffee01",
            confidence="high",
            entity=entity,
            model=MODELS[1] if detector == "latency" else MODELS[0],
            first_seen_us=moments_us[0],
            last_seen_us=moment_us,
            updated_us=moment_us + 1_000_000,
            evidence=Evidence(offsets=offsets, replay=f"inferwatch backtest --from 0:1200 --detector {detector}"),
            atlas=["AML.T0051.000", "AML.T0054"],
            owasp=["LLM01"],
            runbook=[
                "Did the guard, the model, an adapter or a template change just before? Then suspect the rollout.",
                "Open the sample events: one family of prompts, or a guard that turned strict?",
                "Do the named users share an address or an API key? Were any of their other requests answered?",
            ],
            **fields,  # type: ignore[arg-type]  # from one dict
        )


def seeded(seed: int, end_us: int, *, day_s: int = DAY_S) -> tuple[list[StoredEvent], list[Finding]]:
    """The day's events, and its findings with sample events from among them."""
    made = list(events(seed, end_us, day_s=day_s))
    of_user: dict[str, list[str]] = {}
    for row in made:
        of_user.setdefault(row.event.user_id, []).append(row.event.event_id)
    samples = {"probing": of_user[user_id("prober")][-5:], "token_length": of_user[user_id("drain-0")][-5:]}
    raised = [
        msgspec.structs.replace(
            finding, evidence=msgspec.structs.replace(finding.evidence, event_ids=samples.get(finding.detector, []))
        )
        for finding in findings(end_us)
    ]
    return made, raised


def statuses(now_iso: str) -> list[dict[str, object]]:
    """Health records as on iw.status."""

    def record(role: str, **values: object) -> dict[str, object]:
        base: dict[str, object] = {
            "process_id": f"{role}-soc1-41{len(role)}",
            "role": role,
            "state": "running",
            "at": now_iso,
            "version": "0.1.0",
            "config_digest": "5ad1c0ffee01",
            "ready": True,
            "why": "",
            "lag": 0,
            "watermark": "",
            "late": 0,
            "drops": 0,
            "totals": {},
            "levels": {},
        }
        return {**base, **values}

    return [
        record("stage1", lag=12, watermark=now_iso),
        record("stage2", lag=3, watermark=now_iso),
        record("deliver", ready=False, why="webhook: refused 3 times, waiting 8 s", lag=4),
        record("store", lag=31, drops=2, watermark=now_iso),
    ]
