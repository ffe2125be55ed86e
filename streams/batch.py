"""Batches, and contiguous delivery of them: what every road from Kafka to a stage has in common. Knows no Faust."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from collector.kafka import ConsumerRecord


class Batch:
    """The records of one partition that were fetched together, in offset order; it passes for one Faust record."""

    __slots__ = ("offset", "partition", "records", "timestamp", "timestamp_type", "topic")
    headers = key = checksum = None
    serialized_key_size = serialized_value_size = 0

    def __init__(self, topic: str, partition: int, records: Sequence[ConsumerRecord]) -> None:
        last = records[-1]
        self.topic, self.partition, self.records = topic, partition, records
        self.offset, self.timestamp, self.timestamp_type = last.offset, last.timestamp, last.timestamp_type

    @property
    def value(self) -> "Batch":
        """What the agent receives."""
        return self


class Sequencer:
    """Contiguous delivery of one partition: trims what was applied, refuses a hole. Pure; the caller does the seek."""

    __slots__ = ("holes", "next", "repeats")

    def __init__(self, start: int) -> None:
        self.next = start
        """The offset that must come next."""
        self.repeats = 0
        self.holes = 0

    def accept(self, records: Sequence[ConsumerRecord]) -> Sequence[ConsumerRecord] | None:
        """The records that are new, maybe none; None at a hole: seek to `next`, the missing ones are still there."""
        if records[0].offset > self.next:
            self.holes += 1
            return None
        fresh = records
        if records[0].offset < self.next:
            fresh = [record for record in records if record.offset >= self.next]
            self.repeats += len(records) - len(fresh)
        self.next = max(self.next, records[-1].offset + 1)
        return fresh


class Positions(Protocol):
    """The stage, as far as the consumer must know it."""

    def next_offset(self, partition: int) -> int | None:
        """Where the partition is read from; None while its state is not restored."""

    def settled(self) -> Mapping[int, int]:
        """Partition → offset up to which outputs are acknowledged and state is stored: what may be committed."""

    async def before_revoke(self) -> None:
        """Called before the partitions go: the last moment to store state."""
