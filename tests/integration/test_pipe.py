"""The pipe without an engine: made-up events → Kafka → both stages → findings → the store and a file."""

import asyncio
import json
import time
from pathlib import Path

import pytest

from collector.event import AuditEvent, decode
from collector.kafka import KafkaConfig, ensure_topics
from detectors.finding import decode as decode_finding
from sinks.clickhouse.store import open_store
from sinks.config import StoreConfig
from streams.status import read_status
from tests.streams import traffic
from tests.streams.worker import Worker, wait_until

pytestmark = pytest.mark.kafka


async def test_events_become_rows_findings_and_lines(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """Every event is stored once; every finding is on the topic, in the store and in the file, the same everywhere."""
    await ensure_topics(kafka_config)
    start_us = time.time_ns() // 1000 - 900 * traffic.SECOND_US
    records = traffic.spike(5, 4, start_us)
    events = [decode(value) for _, value, _ in records]
    ids = sorted(event.event_id for event in events if type(event) is AuditEvent)
    roles = ("stage1", "stage2", "ingest", "deliver")
    workers = [Worker(role, kafka_config, tmp_path, tick_after_s=300).start() for role in roles]
    try:
        await traffic.send(kafka_config, records)
        ready = lambda: all(worker.metric("ready") == 1 for worker in workers)  # noqa: E731
        wait_until(ready, "all processes are ready", 90, *workers)
        wanted, found = await traffic.caught_up(kafka_config, *workers)
        lines = tmp_path / "deliver" / "findings.jsonl"
        delivered = lambda: lines.exists() and len(lines.read_bytes().splitlines()) >= len(wanted.findings)  # noqa: E731
        wait_until(delivered, "the file has all findings", 30, *workers)
        settled = lambda: all(worker.metric("lag_records") == 0 for worker in workers)  # noqa: E731
        wait_until(settled, "nothing is left to do", 30, *workers)
        statuses = await read_status(kafka_config)
        stopped = [await asyncio.to_thread(worker.stop, 20) for worker in workers]
    finally:
        for worker in workers:
            worker.__exit__()
    assert stopped == [0, 0, 0, 0]
    assert found == wanted
    assert "block_rate" in {decode_finding(raw).detector for raw in wanted.findings.values()}
    assert [status["role"] for status in statuses] == sorted(roles)
    store = open_store(StoreConfig(url=str(tmp_path / "ingest" / "store")))
    try:
        rows = store.query("SELECT event_id FROM events ORDER BY event_id")
        stored = store.query("SELECT uid, revision, json FROM findings FINAL")
        flagged = store.query("SELECT countIf(late OR duplicate OR quarantined) AS n FROM events")
    finally:
        store.close()
    assert [row["event_id"] for row in rows] == ids
    assert flagged == [{"n": 0}]
    assert {(row["uid"], row["revision"]): str(row["json"]).encode() for row in stored} == wanted.findings
    told = [json.loads(line)["finding_info"]["uid"] for line in lines.read_bytes().splitlines()]
    assert sorted(told) == sorted(uid for uid, _ in wanted.findings)
