"""Records as columns of the store's tables, and a stored row as the record it was. Pure.

Moments become integers of the column's unit (µs or ms since the epoch), so nothing is lost to a float or a time zone.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from operator import attrgetter
from typing import Final, NamedTuple, TypeAlias

import msgspec
import orjson

from collector.event import AuditEvent, Rejection, timestamp_us
from detectors.finding import Finding, encode
from detectors.time import Flag

Columns: TypeAlias = dict[str, Sequence[object]]
"""Column name -> values, all of one length."""


class StoredEvent(NamedTuple):
    """An event, where it lay in Kafka, and what the time rules made of it."""

    event: AuditEvent
    partition: int
    offset: int
    append_ms: int
    """The broker's append time, ms since the epoch."""
    flag: Flag


class StoredRecord(NamedTuple):
    """A record of a lane as it was on the wire, and where it lay in Kafka."""

    raw: bytes
    kind: str
    partition: int
    offset: int
    append_ms: int


_PLAIN: Final = (
    "event_id", "schema_version", "tenant", "session_id", "user_id", "prompt_hash", "model_version", "response_tokens",
    "latency_ms", "blocked", "status", "http_request_id", "route", "operation", "http_status", "finish_reason",
    "reason", "prompt_tokens", "max_tokens", "ttft_ms", "queue_ms", "ms_per_output_token", "stream", "n",
    "weights_digest", "key_id", "api_key", "client_address", "turn_hash", "system_hash", "minhash", "view",
    "key_epoch", "chain", "trace_id", "tokens_from", "released_chars", "chunks_removed", "collector_id", "boot",
    "seq",
)  # fmt: skip
"""Fields stored as they are, in columns of the same name. A test holds that no field of the event is forgotten."""
_plain_of = attrgetter(*_PLAIN)

_GUARD: Final = {
    "guard_names": "guard",
    "guard_versions": "version",
    "guard_stages": "stage",
    "guard_decisions": "decision",
    "guard_scores": "score",
    "guard_labels": "label",
    "guard_latency_ms": "latency_ms",
    "guard_errors": "error",
}
_guard_of = attrgetter(*_GUARD.values())
_NO_GUARDS: Final[tuple[tuple[object, ...], ...]] = ((),) * len(_GUARD)


def event_columns(rows: Sequence[StoredEvent]) -> Columns:
    """The columns of `events`."""
    events = [row.event for row in rows]
    columns: Columns = dict(zip(_PLAIN, zip(*map(_plain_of, events), strict=True), strict=True))
    columns |= dict(zip(_GUARD, zip(*map(_guard_arrays, events), strict=True), strict=True))
    columns |= {
        "timestamp": [timestamp_us(event.timestamp) for event in events],
        "kind": ["rejection" if isinstance(event, Rejection) else "inference" for event in events],
        "adapter_name": [None if event.adapter is None else event.adapter.name for event in events],
        "adapter_digest": ["" if event.adapter is None else event.adapter.digest for event in events],
        "media": [msgspec.json.encode(event.media).decode() if event.media else "" for event in events],
        "media_count": [event.media_count for event in events],
        "kafka_partition": [row.partition for row in rows],
        "kafka_offset": [row.offset for row in rows],
        "append_time": [row.append_ms for row in rows],
    }
    flags = [row.flag for row in rows]
    return columns | {name: [flag == name for flag in flags] for name in ("late", "duplicate", "quarantined")}


def _guard_arrays(event: AuditEvent) -> Sequence[tuple[object, ...]]:
    """One tuple for each guard column."""
    results = event.guardrail_results
    return list(zip(*map(_guard_of, results), strict=True)) if results else _NO_GUARDS


def lane_columns(rows: Sequence[StoredRecord]) -> Columns:
    """The columns of `lane_records`."""
    return {
        "kafka_partition": [row.partition for row in rows],
        "kafka_offset": [row.offset for row in rows],
        "append_time": [row.append_ms for row in rows],
        "kind": [row.kind for row in rows],
        "raw": [row.raw.decode() for row in rows],
    }


def record_of(row: Mapping[str, object]) -> AuditEvent:
    """The record that a row of `SELECT * FROM events` was made of, equal in every field: backtests read it so.

    Raises `msgspec.ValidationError` when the row was not written by `event_columns`.
    """
    fields = {name: row[name] for name in _PLAIN}
    arrays = [msgspec.convert(row[column], list[object]) for column in _GUARD]
    fields["guardrail_results"] = [
        dict(zip(_GUARD.values(), values, strict=True)) for values in zip(*arrays, strict=True)
    ]
    fields["timestamp"] = row["timestamp"]
    if row["adapter_name"] is not None:
        fields["adapter"] = {"name": row["adapter_name"], "digest": row["adapter_digest"]}
    if row["media"]:
        fields["media"] = msgspec.json.decode(str(row["media"]))
    fields["media_count"] = row["media_count"]
    kind = Rejection if row["kind"] == "rejection" else AuditEvent
    return msgspec.convert({**fields, "kind": row["kind"]}, kind)


def finding_columns(findings: Sequence[Finding]) -> Columns:
    """The columns of `findings`."""
    same = (
        "uid", "revision", "state", "schema_version", "tenant", "detector", "detector_version", "config_digest",
        "severity", "confidence", "model", "counts", "summary", "atlas", "owasp", "runbook", "cold_start",
    )  # fmt: skip
    columns: Columns = {name: [getattr(finding, name) for finding in findings] for name in same}
    for moment in ("first_seen", "last_seen", "updated"):
        columns[moment] = [getattr(finding, f"{moment}_us") for finding in findings]
    for name in ("name", "observed", "baseline", "threshold", "unit", "improbability"):
        columns[f"statistic_{name}"] = [getattr(finding.statistic, name) for finding in findings]
    return columns | {
        "entity_kind": [finding.entity.kind for finding in findings],
        "entity_id": [finding.entity.id for finding in findings],
        "evidence_event_ids": [finding.evidence.event_ids for finding in findings],
        "evidence_offsets": [
            [(r.topic, r.partition, r.first, r.last) for r in finding.evidence.offsets] for finding in findings
        ],
        "evidence_replay": [finding.evidence.replay for finding in findings],
        "json": [encode(finding).decode() for finding in findings],
    }


class _Health(msgspec.Struct, frozen=True):
    """What every health record on iw.status has."""

    process_id: str
    role: str
    at: datetime
    version: str = ""
    config_digest: str = ""
    lag: int = 0
    watermark: datetime | None = None
    late: int = 0
    drops: int = 0


def status_columns(records: Sequence[Mapping[str, object]]) -> Columns:
    """The columns of `process_reports`. Raises `msgspec.ValidationError` naming the field that is missing or odd."""
    reports = [msgspec.convert({k: v for k, v in record.items() if v != ""}, _Health) for record in records]
    same = ("process_id", "role", "version", "config_digest", "lag", "late", "drops")
    columns: Columns = {name: [getattr(report, name) for report in reports] for name in same}
    return columns | {
        "at": [timestamp_us(report.at) // 1000 for report in reports],
        "watermark": [None if report.watermark is None else timestamp_us(report.watermark) for report in reports],
        "json": [orjson.dumps(dict(record)).decode() for record in records],
    }
