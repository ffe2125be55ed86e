"""Findings and events for the tests of the sinks: a plain one, and values that try to break every format."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec

from collector.event import Adapter, AuditEvent, GuardResult, Rejection
from detectors.finding import Entity, Evidence, Finding, OffsetRange, Statistic
from sinks.clickhouse.rows import StoredEvent
from sinks.config import DeliveryConfig
from sinks.delivery import Delivery, Sink

GOLDEN: Final = Path(__file__).parent.parent / "golden" / "formats"
OUTSIDE: Final = Path(__file__).parents[2].parent / "shared" / "data" / "golden"
"""Material of others that is not part of the repository; tests that need it skip by name."""
START: Final = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
START_US: Final = 1_795_176_000_000_000
USER: Final = "u_" + "1" * 32
SESSION: Final = "s_" + "2" * 32

HOSTILE: Final = {
    "pipe": "a|b||c",
    "equals": "a=b cs1=forged act=close",
    "backslash": "a\\b\\\\c\\n\\",
    "newlines": "a\nb\r\nc\rd\x85e\u2028f\u2029g",
    "bracket": 'a]b"c\\]d[e id="x"]',
    "header": "<0>1 - - - - - CEF:0|x",
    "bom": "\ufeffa\ufeffb",
    "astral": "🜁𝔘\U0010ffff",
    "controls": "".join(chr(n) for n in range(32)) + "\x7f",
    "surrogates": "a\ud800b\udfffc\udc00\ud800d",
    "megabyte": "0123456789abcdef" * 65536,
    "script": "</script><script>alert(1)</script>",
    "empty": "",
}


def finding(uid: str = "f" * 32, revision: int = 1, **fields: Any) -> Finding:
    """A block-rate finding on one session."""
    values: dict[str, Any] = {
        "schema_version": "1.0",
        "uid": uid,
        "revision": revision,
        "state": "open" if revision == 1 else "update",
        "tenant": "acme",
        "detector": "block_rate",
        "detector_version": "1",
        "config_digest": "0123456789ab",
        "severity": "high",
        "confidence": "medium",
        "entity": Entity(kind="session", id=f"{USER}/{SESSION}"),
        "model": "tiny@0123456",
        "first_seen_us": START_US,
        "last_seen_us": START_US + 60_000_000,
        "updated_us": START_US + 61_000_000,
        "statistic": Statistic(
            name="blocked", observed=42, baseline=1.5, threshold=9, unit="per minute", improbability=7.25
        ),
        "counts": {"events": 60, "blocked": 42},
        "summary": "42 of 60 requests blocked in one minute; 1.5 are usual.",
        "evidence": Evidence(
            offsets=[OffsetRange(topic="iw.events", partition=2, first=100, last=159)],
            event_ids=["0192f7a0-0000-7000-8000-000000000001"],
            replay="inferwatch backtest --partition 2 --from 100 --to 159",
        ),
        "atlas": ["AML.T0051.000", "AML.T0054"],
        "owasp": ["LLM01"],
        "runbook": [
            "Look at the session's guard results.",
            "Ask the owner of the key.",
            "Block the key if it goes on.",
        ],
    }
    return Finding(**(values | fields))


def hostile(value: str) -> Finding:
    """A finding with `value` in every text that isn't a fixed word; its uid stays one."""
    return finding(
        tenant=value,
        detector=value,
        detector_version=value,
        config_digest=value,
        entity=Entity(kind="session", id=f"{value}/{value}"),
        model=value,
        statistic=Statistic(name=value, observed=1, baseline=2, threshold=3, unit=value),
        counts={value: 1},
        summary=value,
        evidence=Evidence(
            offsets=[OffsetRange(topic=value, partition=0, first=0, last=0)], event_ids=[value], replay=value
        ),
        atlas=[value],
        owasp=[value],
        runbook=[value],
        cold_start=value,
        incident=value,
        suppressed_by=value or "c1",
        handled_by=value,
        handled_why=value,
        change=value,
    )


def delivery_of(sink: Sink, letters: list[tuple[str, int, str]], **config: Any) -> Delivery:
    """A delivery that hardly waits; dead letters go to `letters` as (uid, revision, reason)."""

    async def dead_letter(found: Finding, reason: str) -> None:
        letters.append((found.uid, found.revision, reason))

    return Delivery(sink, DeliveryConfig(**({"first_wait_s": 0.001, "wait_max_s": 0.01} | config)), dead_letter)


def event(number: int = 0, cls: type[AuditEvent] = AuditEvent, **fields: Any) -> AuditEvent:
    """An answered request with every field set; `number` tells events apart and moves their time by a millisecond."""
    values: dict[str, Any] = {
        "schema_version": "1.0",
        "event_id": f"0192f7a0-0000-7000-8000-{number:012x}",
        "timestamp": START + timedelta(milliseconds=number, microseconds=1),
        "collector_id": "gpu-1",
        "boot": "b1",
        "seq": number,
        "tenant": "acme",
        "session_id": SESSION,
        "user_id": USER,
        "prompt_hash": "hmac:" + f"{number:064x}",
        "model_version": "tiny@0123456",
        "guardrail_results": [
            GuardResult(guard="injection", version="1", stage="input", decision="allow", score=0.1, latency_ms=1.25),
            GuardResult(guard="secrets", version="2", stage="output", decision="error", label="x", error="OSError"),
        ],
        "response_tokens": 17,
        "latency_ms": 123.456789,
        "blocked": False,
        "status": "ok",
        "http_request_id": "r" * 36,
        "route": "/v1/chat/completions",
        "operation": "chat",
        "http_status": 200,
        "finish_reason": "stop",
        "reason": "none",
        "prompt_tokens": 2**53,
        "max_tokens": 64,
        "ttft_ms": 0.1,
        "queue_ms": 0.0,
        "stream": True,
        "n": 3,
        "adapter": Adapter(name="lora", digest="sha256:ab"),
        "weights_digest": "sha256:cd",
        "key_id": "k1",
        "api_key": "k_" + "3" * 32,
        "client_address": "a_" + "4" * 32,
        "turn_hash": "hmac:01",
        "system_hash": "hmac:02",
        "minhash": "AAAA",
        "view": "messages",
        "key_epoch": "2026-11",
        "chain": "hmac:03",
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "tokens_from": "usage",
        "released_chars": 300,
        "chunks_removed": 2,
    }
    return cls(**(values | fields))


def rejection(number: int, **fields: Any) -> AuditEvent:
    """A request refused at the gate, with hardly a field set."""
    return Rejection(
        schema_version="1.0",
        event_id=f"0192f7a0-0000-7000-9000-{number:012x}",
        timestamp=START + timedelta(milliseconds=number),
        collector_id="gpu-1",
        boot="b1",
        seq=number,
        tenant=fields.get("tenant", "acme"),
        session_id="",
        user_id="",
        prompt_hash="",
        model_version="",
        guardrail_results=[],
        response_tokens=0,
        latency_ms=0.5,
        blocked=False,
        status="rejected",
        reason="unauthorized",
        http_status=401,
    )


def stored(found: AuditEvent, offset: int, flag: Any = "taken", partition: int = 0) -> StoredEvent:
    """Appended one second after it happened to START."""
    return StoredEvent(found, partition, offset, START_US // 1000 + 1000, flag)


def as_json(found: Finding) -> Any:
    """The finding as builtins."""
    return json.loads(msgspec.json.encode(found))
