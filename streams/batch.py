"""Batches, and contiguous delivery of them: what every road from Kafka to a stage has in common. Knows no Faust."""

from collections.abc import Mapping, Sequence
from typing import Final, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from collector.kafka import ConsumerRecord

LOG_APPEND_TIME: Final = 1


class Fetched(Sequence[ConsumerRecord]):
    """Records of one partition in order of offset. As a sequence it makes a record only for whom asks for one."""

    __slots__ = ("append_ms", "offsets", "partition", "topic", "values")

    def __init__(
        self,
        topic: str,
        partition: int,
        values: list[bytes | None],
        offsets: NDArray[np.int64],
        append_ms: NDArray[np.int64],
    ) -> None:
        self.topic, self.partition = topic, partition
        self.values, self.offsets, self.append_ms = values, offsets, append_ms

    @classmethod
    def of(cls, records: Sequence[ConsumerRecord]) -> "Fetched":
        """Records, at least one, of one partition that came one by one."""
        if isinstance(records, Fetched):
            return records
        offsets = np.array([record.offset for record in records], np.int64)
        append_ms = np.array([record.timestamp for record in records], np.int64)
        values = [record.value for record in records]
        return cls(records[0].topic, records[0].partition, values, offsets, append_ms)

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> ConsumerRecord: ...
    @overload
    def __getitem__(self, index: slice) -> "Fetched": ...
    def __getitem__(self, index: int | slice) -> "ConsumerRecord | Fetched":
        if isinstance(index, slice):
            values, offsets, append_ms = self.values[index], self.offsets[index], self.append_ms[index]
            return Fetched(self.topic, self.partition, values, offsets, append_ms)
        value = self.values[index]
        return ConsumerRecord(
            topic=self.topic,
            partition=self.partition,
            offset=int(self.offsets[index]),
            timestamp=int(self.append_ms[index]),
            timestamp_type=LOG_APPEND_TIME,
            key=None,
            value=value,
            checksum=None,
            serialized_key_size=-1,
            serialized_value_size=-1 if value is None else len(value),
            headers=(),
        )


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
            skip = next((i for i, record in enumerate(records) if record.offset >= self.next), len(records))
            fresh = records[skip:]
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
