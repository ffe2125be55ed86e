"""The backtest from the store: events that went through Kafka and chDB give the stages' findings, byte for byte."""

import asyncio
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from collector.event import AuditEvent, BadEvent, decode
from collector.kafka import ConsumerRecord, KafkaConfig, ensure_topics
from detectors.config import DetectConfig
from detectors.finding import Finding, encode
from detectors.finding import decode as decode_finding
from detectors.time import PartitionClock
from sinks.clickhouse.rows import StoredEvent
from sinks.clickhouse.store import Store, open_store
from sinks.config import StoreConfig
from streams import backtest_store as module
from streams.backtest_store import backtest_store
from tests.streams import traffic

pytestmark = pytest.mark.kafka
PARTITIONS = 4


def stored(log: Sequence[ConsumerRecord], detect: DetectConfig) -> Iterator[StoredEvent]:
    """The rows that ingest makes of a log."""
    clocks = {partition: PartitionClock(detect.time) for partition in range(PARTITIONS)}
    for record in log:
        try:
            event = decode(record.value or b"")
        except BadEvent:
            continue
        flag = clocks[record.partition].observe(event, append_ms=record.timestamp, offset=record.offset)
        if isinstance(event, AuditEvent):
            yield StoredEvent(event, record.partition, record.offset, record.timestamp, flag)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(StoreConfig(url=f"chdb://{tmp_path}/store", readers=1))
    yield opened
    opened.close()


@pytest.mark.parametrize("page_rows", [20_000, 501])
async def test_the_store_gives_the_same_findings_again(
    kafka_config: KafkaConfig, store: Store, page_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, offsets included, however the pages are cut; a doubled record and poison change nothing."""
    monkeypatch.setattr(module, "_PAGE", module._PAGE.replace(str(module.PAGE_ROWS), str(page_rows)))
    await ensure_topics(kafka_config)
    detect = DetectConfig()
    start_us = time.time_ns() // 1000 - 900 * traffic.SECOND_US
    sent = traffic.spike(11, PARTITIONS, start_us)
    doubled = next(row for row in sent[2_000:] if row[0])
    place = sent.index(doubled)
    await traffic.send(kafka_config, [*sent[: place + 1], doubled, *sent[place + 1 :], (b"", b"\xff no event", 2)])
    log = await traffic.read(kafka_config, kafka_config.topic("events"), PARTITIONS)
    wanted = {raw for raw in traffic.expected(kafka_config, detect, log).findings.values() if b'"coverage"' not in raw}
    rows = list(stored(log, detect))
    assert [row.flag for row in rows].count("duplicate") == 1
    store.insert_events(rows, token="iw.events:all")
    again = backtest_store(store.query, detect, topic=kafka_config.topic("events"), partitions=PARTITIONS)
    found = [encode(each) for each in again]
    assert wanted
    assert wanted <= set(found)
    assert len(found) == len(set(found))
    assert {each for each in found if each not in wanted} == {encode(each) for each in _after(found, wanted)}, (
        "only revisions of after the log's end"
    )


def _after(found: Sequence[bytes], wanted: set[bytes]) -> list[Finding]:
    """Revisions later than the last one that the log itself leads to."""
    last_us = max(decode_finding(raw).updated_us for raw in wanted)
    return [each for each in map(decode_finding, found) if each.updated_us > last_us]


async def test_the_command_in_a_finding_reads_the_store(
    kafka_config: KafkaConfig, store: Store, tmp_path: Path
) -> None:
    """With `--source store`: it prints the finding, byte for byte."""
    await ensure_topics(kafka_config)
    detect = DetectConfig()
    start_us = time.time_ns() // 1000 - 900 * traffic.SECOND_US
    await traffic.send(kafka_config, traffic.spike(12, PARTITIONS, start_us))
    log = await traffic.read(kafka_config, kafka_config.topic("events"), PARTITIONS)
    wanted = [decode_finding(raw) for raw in traffic.expected(kafka_config, detect, log).findings.values()]
    last = next(each for each in wanted if each.detector == "block_rate")
    store.insert_events(list(stored(log, detect)), token="iw.events:all")
    store.close()
    environment = {
        **os.environ,
        "INFERWATCH_KAFKA__BOOTSTRAP_SERVERS": kafka_config.bootstrap_servers,
        "INFERWATCH_KAFKA__TOPIC_PREFIX": kafka_config.topic_prefix,
        "INFERWATCH_STORE__URL": f"chdb://{tmp_path}/store",
    }
    program, *arguments = shlex.split(last.evidence.replay)
    assert program == "inferwatch"
    answer = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "inferwatch.cli", *arguments, "--source", "store"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-2_000:]
    assert encode(last) in answer.stdout.splitlines()


def test_an_empty_store_gives_nothing() -> None:
    """No rows, no findings, no partition heard."""
    assert list(backtest_store(lambda _sql, _after: [], DetectConfig(), topic="iw.events", partitions=2)) == []
