"""Delivery on a real broker: one sink's trouble is its own."""

import asyncio
import json
from collections.abc import Callable, Sequence

import pytest

from collector.kafka import KafkaConfig, TopicPartition, ensure_topics, make_consumer
from detectors.finding import Entity, Evidence, Finding, Statistic, encode, finding_uid
from sinks.config import DeliveryConfig
from sinks.delivery import Refused
from streams.config import StreamsConfig
from streams.deliver import Deliver
from tests.streams import traffic

pytestmark = pytest.mark.kafka

RETRY_SOON = DeliveryConfig(first_wait_s=0.01, wait_max_s=0.05)


class Kept:
    """A sink that keeps what it is given, or fails as told."""

    batch_max = 1

    def __init__(self, name: str, fail: Callable[[Finding], None] = lambda _: None) -> None:
        self.name = name
        self.had: list[tuple[str, int]] = []
        self.closed = False
        self._fail = fail

    async def send(self, findings: Sequence[Finding]) -> None:
        for finding in findings:
            self._fail(finding)
            self.had.append((finding.uid, finding.revision))

    async def close(self) -> None:
        self.closed = True


def _finding(number: int, revision: int = 1) -> Finding:
    entity = Entity(kind="user", id=f"u_{number:032x}")
    return Finding(
        schema_version="1.0",
        uid=finding_uid("acme", "probing", entity, 1),
        revision=revision,
        state="open",
        tenant="acme",
        detector="probing",
        detector_version="1",
        config_digest="test",
        severity="high",
        confidence="high",
        entity=entity,
        model="tiny@0",
        first_seen_us=1,
        last_seen_us=2,
        updated_us=3,
        statistic=Statistic(name="evidence", observed=20.0, baseline=0.0, threshold=13.3),
        counts={"blocked": 3},
        summary="made up",
        evidence=Evidence(),
    )


async def _publish(kafka: KafkaConfig, values: Sequence[bytes], partition: int = 0) -> None:
    await traffic.send(kafka, [(b"uid", value, partition) for value in values], topic="findings")


async def _until(true: Callable[[], bool], timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110  # the condition belongs to another process or task
            await asyncio.sleep(0.02)


async def _committed(kafka: KafkaConfig, sink: str) -> int | None:
    consumer = make_consumer(kafka, group_id=f"{kafka.topic_prefix}-deliver-{sink}")
    await consumer.start()
    try:
        offset: int | None = await consumer.committed(TopicPartition(kafka.topic("findings"), 0))
        return offset
    finally:
        await consumer.stop()


async def test_a_dead_sink_harms_no_other(kafka_config: KafkaConfig) -> None:
    """The good sink has everything; the dead one waits with its own offset, says so, and goes on when it is back."""
    await ensure_topics(kafka_config)
    away = [True]

    def fail(_: Finding) -> None:
        if away[0]:
            raise ConnectionRefusedError("nobody there")

    def refuse_third(finding: Finding) -> None:
        if finding == _finding(3):
            raise Refused("too strange")

    good, dead, picky = Kept("good"), Kept("dead", fail), Kept("picky", refuse_third)
    deliver = Deliver(kafka_config, StreamsConfig(session_timeout_s=2), [good, dead, picky], RETRY_SOON)
    running = asyncio.create_task(deliver.run())
    sent = [_finding(number) for number in range(5)]
    all_of_them = [(finding.uid, 1) for finding in sent]
    await _publish(kafka_config, [*map(encode, sent[:2]), b"\xff no finding", *map(encode, sent[2:])])
    await _until(lambda: good.had == all_of_them and len(picky.had) == 4)
    reading = deliver.reading()
    assert reading.ready
    assert reading.why.startswith("dead: ConnectionRefusedError: nobody there")
    assert (dead.had, reading.levels["dead_behind"], reading.totals["good_delivered"]) == ([], 6, 5), reading
    away[0] = False
    await _until(lambda: dead.had == all_of_them)
    await _until(lambda: deliver.reading().lag == 0)
    deliver.stop()
    await running
    assert [sink.closed for sink in (good, dead, picky)] == [True, True, True]
    assert [await _committed(kafka_config, name) for name in ("good", "dead", "picky")] == [6, 6, 6]
    letters = [json.loads(r.value) for r in await traffic.read(kafka_config, kafka_config.topic("deadletter"), 1)]
    assert sorted((letter["offset"], letter["reason"]) for letter in letters) == [
        (2, "no finding: DecodeError"),
        (2, "no finding: DecodeError"),
        (2, "no finding: DecodeError"),
        (4, "sink picky: too strange"),
    ]


async def test_what_was_not_committed_is_sent_again(kafka_config: KafkaConfig) -> None:
    """A process that ends in the middle of a finding leaves it to the next one; what was committed is not repeated."""
    await ensure_topics(kafka_config)
    stuck = asyncio.Event()

    class Stuck(Kept):
        async def send(self, findings: Sequence[Finding]) -> None:
            await super().send(findings)
            if findings[0] == _finding(1):
                stuck.set()
                await asyncio.sleep(60)

    streams = StreamsConfig(session_timeout_s=2, deliver_records_max=1)
    await _publish(kafka_config, [encode(_finding(number)) for number in range(3)])
    first, second = Stuck("sink"), Kept("sink")
    deliver = Deliver(kafka_config, streams, [first], RETRY_SOON)
    running = asyncio.create_task(deliver.run())
    await asyncio.wait_for(stuck.wait(), 30)
    deliver.stop()
    await running
    deliver = Deliver(kafka_config, streams, [second], RETRY_SOON)
    running = asyncio.create_task(deliver.run())
    await _until(lambda: len(second.had) == 2)
    deliver.stop()
    await running
    assert first.had == [(_finding(0).uid, 1), (_finding(1).uid, 1)]
    assert second.had == [(_finding(1).uid, 1), (_finding(2).uid, 1)]
