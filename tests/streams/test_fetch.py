"""Fetched columns are the records that aiokafka would have made."""

import numpy as np

from collector.kafka import KafkaConfig, TopicPartition, ensure_topics, make_consumer
from streams import fetch
from streams.batch import Fetched, Sequencer
from tests.streams import traffic


async def test_a_fetch_by_columns_has_what_single_records_have(kafka_config: KafkaConfig) -> None:
    """Values, offsets and append times of thousands of records, from the middle of a batch on."""
    await ensure_topics(kafka_config)
    await traffic.send(kafka_config, traffic.spike(1, 4, 1_800_000_000_000_000, calm_s=60, spike_s=5))
    topic = kafka_config.topic("events")
    plain = await _read(kafka_config, topic, 7)
    fetch.enable(topic)
    quick = await _read(kafka_config, topic, 7)
    assert quick == plain
    assert len(plain) > 300


async def _read(kafka: KafkaConfig, topic: str, begin: int) -> list[tuple[int, int, bytes | None]]:
    consumer = make_consumer(kafka, group_id=None)
    await consumer.start()
    try:
        tp = TopicPartition(topic, 1)
        consumer.assign([tp])
        consumer.seek(tp, begin)
        end = (await consumer.end_offsets([tp]))[tp]
        found: list[tuple[int, int, bytes | None]] = []
        while await consumer.position(tp) < end:
            for records in (await consumer.getmany(timeout_ms=200)).values():
                assert isinstance(records, Fetched) == (topic in fetch.enabled())
                found += [(record.offset, record.timestamp, record.value) for record in records]
        return found
    finally:
        await consumer.stop()


def test_columns_are_a_sequence_of_records() -> None:
    """Length, indices, slices and trimming, as a list of records has them."""
    values: list[bytes | None] = [b"a", None, b"ccc"]
    fetched = Fetched("iw.events", 2, values, np.array([5, 6, 7]), np.array([50, 60, 70]))
    assert [(r.offset, r.timestamp, r.value, r.topic, r.partition) for r in fetched] == [
        (5, 50, b"a", "iw.events", 2),
        (6, 60, None, "iw.events", 2),
        (7, 70, b"ccc", "iw.events", 2),
    ]
    assert Fetched.of(fetched) is fetched
    again = Fetched.of(list(fetched))
    assert (again.values, again.offsets.tolist(), again.append_ms.tolist()) == (values, [5, 6, 7], [50, 60, 70])
    fresh = Sequencer(6).accept(fetched)
    assert isinstance(fresh, Fetched)
    assert fresh.offsets.tolist() == [6, 7]
