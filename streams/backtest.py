"""`inferwatch backtest`: judges the events on Kafka again, in one process, and gives the same findings, byte for byte.

Promise (a) of docs/time.md made use of: the engines are those of the stages, fed from the first offset that Kafka still
has, since what a detector says depends on all it has seen. Reads only; memory as both stages together. Where retention
has taken the beginning, baselines start later than the deployed ones did, and findings may differ.
"""

from collections.abc import AsyncIterator

from collector.kafka import KafkaConfig, ensure_topics, read_topic, wait_for_broker
from detectors.config import DetectConfig
from detectors.engine import PartitionEngine, TenantEngine
from detectors.finding import Finding
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
    async for record in read_topic(kafka, "events"):
        shards[record.partition].observe([record])  # what it refuses has its dead letter since stage 1 met it
        for rollup in engines[record.partition].take():
            merged.observe(rollup)
        for finding in merged.take():
            yield finding
