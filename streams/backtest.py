"""`inferwatch backtest`: judges the events on Kafka again, in one process, and gives the same findings, byte for byte.

Promise (a) of docs/time.md made use of: the engines are those of the stages, fed from the first offset that Kafka still
has, since what a detector says depends on all it has seen. Reads only; memory as both stages together. Where retention
has taken the beginning, baselines start later than the deployed ones did, and findings may differ.
"""

from collections.abc import AsyncIterator

from collector.kafka import KafkaConfig, TopicPartition, ensure_topics, make_consumer, wait_for_broker
from detectors.config import DetectConfig
from detectors.engine import PartitionEngine, TenantEngine
from detectors.finding import Finding
from streams.deadletter import Unusable
from streams.stage1 import EventShard


async def backtest(kafka: KafkaConfig, detect: DetectConfig, *, timeout_s: float = 10.0) -> AsyncIterator[Finding]:
    """Every revision of every finding that the events now on Kafka give, in the order of the seconds judged.

    What stage 1 could not use, is passed over here too. Raises BrokerAway or TopicMismatch.
    """
    await wait_for_broker(kafka, timeout_s)
    topic = kafka.topic("events")
    partitions = (await ensure_topics(kafka))[topic]
    engines = [PartitionEngine(detect, topic=topic, partition=p, partitions=partitions) for p in range(partitions)]
    shards = [EventShard(engine, rollup_partitions=1) for engine in engines]
    merged = TenantEngine(detect, partition=0, partitions=partitions)
    consumer = make_consumer(kafka, group_id=None)
    await consumer.start()
    try:
        places = [TopicPartition(topic, partition) for partition in range(partitions)]
        ends = await consumer.end_offsets(places)
        consumer.assign(places)
        await consumer.seek_to_beginning(*places)
        while any([await consumer.position(place) < ends[place] for place in places]):
            for place, records in (await consumer.getmany(timeout_ms=500)).items():
                for record in records:
                    try:
                        shards[place.partition].observe(record)
                    except Unusable:
                        continue  # its dead letter was written when stage 1 met it
                for rollup in engines[place.partition].take():
                    merged.observe(rollup)
            for finding in merged.take():
                yield finding
    finally:
        await consumer.stop()
