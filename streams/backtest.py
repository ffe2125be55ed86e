"""`inferwatch backtest`: judges the events on Kafka again, in one process, and gives the same findings, byte for byte.
From the store: `backtest_store.py`.

Promise (a) of docs/time.md made use of: the engines are those of the stages, fed from the first offset that Kafka still
has, since what a detector says depends on all it has seen. Reads only; memory as both stages together. Where retention
has taken the beginning, baselines start later than the deployed ones did, and findings may differ. Commands of people
are applied at their time; one that the deployed stage read after its time took effect later there.
"""

from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final

from collector.kafka import KafkaConfig, ensure_topics, read_topic, wait_for_broker
from detectors.commands import BadCommand
from detectors.config import DetectConfig
from detectors.engine import PartitionEngine, TenantEngine
from detectors.finding import Finding
from detectors.rollup import Command, Marker
from detectors.time import SECOND_US
from streams.stage1 import EventShard

AHEAD_S: Final = 60
"""Commands are read so long before their time, so that none is late."""


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
    commands, through = deque(await commands_of(kafka)), dict[int, int]()
    async for record in read_topic(kafka, "events"):
        shards[record.partition].observe([record])  # what it refuses has its dead letter since stage 1 met it
        for rollup in engines[record.partition].take():
            if isinstance(rollup, Marker):
                through[rollup.partition] = rollup.closed_through
                soon_us = (min(through.values()) + AHEAD_S) * SECOND_US if len(through) == partitions else 0
                while commands and commands[0].append_ms * 1000 < soon_us:
                    with suppress(BadCommand):  # as above
                        merged.observe(commands.popleft())
            merged.observe(rollup)
        for finding in merged.take():
            yield finding


async def commands_of(kafka: KafkaConfig) -> list[Command]:
    """All that is on iw.commands, in order of append time."""
    found = [
        Command(record.partition, record.offset, record.timestamp, record.value or b"")
        async for record in read_topic(kafka, "commands")
    ]
    return sorted(found, key=lambda command: (command.append_ms, command.partition, command.offset))
