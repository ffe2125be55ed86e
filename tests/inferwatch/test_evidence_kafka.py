"""A log on a real Kafka, verified where it lies, exported, and after somebody wrote to the topic."""

import asyncio
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from collector.kafka import BatchWriter, KafkaConfig, make_producer
from collector.signing import create_signing_key
from inferwatch.config import Config
from inferwatch.evidence import Range, verify_files, verify_kafka
from tests.collector.publishing import Maker, ask, read_raw, wait

pytestmark = pytest.mark.kafka


async def _append(kafka: KafkaConfig, partition: int, raw: bytes) -> None:
    producer = make_producer(kafka, client_id="intruder")
    await producer.start()
    try:
        writer = BatchWriter(producer, kafka.topic("events"))
        await writer.append(None, raw, partition)
        await writer.flush(10)
    finally:
        await producer.stop()


def test_a_log_on_kafka_is_verified_exported_and_guarded(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """Two boots with a rotation between, sound and exported as they are; a record that somebody adds is named."""
    key_file = tmp_path / "signing.key"
    signer = create_signing_key(key_file)
    make = Maker(kafka_config, tmp_path / "journal")
    settings = {"evidence_signing_key_file": key_file, "evidence_checkpoint_ms": 200, "journal_segment_bytes": 16_384}
    asked = []
    for turns in (150, 60):
        publisher = make(**settings)
        publisher.start()
        asked += [ask(publisher, turn) for turn in range(turns)]
        wait(lambda made=publisher: made.lag() == 0)
        assert publisher.stop(30) is True
    config = Config(kafka=kafka_config, evidence={"signing_keys": [signer.public_key]})  # type: ignore[arg-type]
    report = asyncio.run(verify_kafka(config, Range(), asked[70].event_id, tmp_path / "log"))
    assert (report.verdict, report.problems, report.boots, report.lanes) == ("sound", [], 2, 8)
    assert report.proof is not None
    assert asked[70].event_id in report.proof.record
    exported = sorted((tmp_path / "log").iterdir())
    assert [file.name for file in exported] == [f"events-{partition}.jsonl" for partition in range(4)]
    assert verify_files(config, exported).verdict == "sound"
    later = Range(begin=datetime.now(UTC) + timedelta(hours=1))
    assert asyncio.run(verify_kafka(config, later)).records == 0

    raw = next(raw for raw in read_raw(kafka_config)[2] if raw[9:12] == b"inf")
    asyncio.run(_append(kafka_config, 2, raw.replace(b'"status":"ok"', b'"status":"error"')))
    report = asyncio.run(verify_kafka(config, Range()))
    assert (report.verdict, [(problem.what, problem.partition) for problem in report.problems]) == (
        "broken",
        [("inserted", 2)],
    )
    shutil.rmtree(tmp_path / "log")
