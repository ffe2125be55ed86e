"""Has aiokafka hand over whole fetches as columns, without making an object of each record once more.

What aiokafka unpacks in C becomes a `Fetched`. It is the one place that knows how aiokafka keeps what it fetched;
`streams/surface.py` lists the names.
"""

from typing import Any

import numpy as np
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from numpy.typing import NDArray

from streams.batch import LOG_APPEND_TIME, Fetched

Ints = NDArray[np.int64]

_topics: set[str] = set()


class _FetchResult(fetcher.FetchResult):  # type: ignore[misc]  # aiokafka has no types
    """One fetch of one partition, handed over at once."""

    def getall(self, max_records: int | None = None) -> Any:
        tp = self._topic_partition
        unpacked: Any = getattr(self, "_partition_records")  # noqa: B009  # aiokafka has no types
        if tp.topic not in _topics or max_records is not None or not self.has_more():
            return super().getall(max_records)
        if unpacked._isolation_level == fetcher.READ_COMMITTED:
            return super().getall(max_records)
        if not self.check_assignment(tp):
            return []
        values: list[bytes | None] = []
        offsets: list[Ints] = []
        append_ms: list[Ints] = []
        while unpacked._records.has_next():
            batch = unpacked._records.next_batch()
            if unpacked._check_crcs and not batch.validate_crc():
                raise CorruptRecordException(f"invalid checksum in {tp}")
            if not batch.is_control_batch:
                records = list(batch)
                first = unpacked.next_fetch_offset
                if records and records[0].offset < first:
                    records = [record for record in records if record.offset >= first]
                values += [record.value for record in records]
                offsets.append(_offsets(batch, records))
                append_ms.append(_times(batch, records))
            unpacked.next_fetch_offset = batch.next_offset
        self._update_position()
        self._partition_records = None
        if not values:
            return []
        return Fetched(tp.topic, tp.partition, values, np.concatenate(offsets), np.concatenate(append_ms))


def _offsets(batch: Any, records: list[Any]) -> Ints:
    """Without asking each record, where the batch has no gaps."""
    if records and batch.next_offset - records[0].offset == len(records):
        return np.arange(records[0].offset, batch.next_offset, dtype=np.int64)
    return np.array([record.offset for record in records], np.int64)


def _times(batch: Any, records: list[Any]) -> Ints:
    """The broker stamps a whole batch alike."""
    if batch.timestamp_type == LOG_APPEND_TIME:
        return np.full(len(records), batch.max_timestamp, np.int64)
    return np.array([record.timestamp for record in records], np.int64)


def enable(topic: str) -> None:
    """From now on fetches of the topic come as `Fetched`, in this process; all other topics as usual."""
    _topics.add(topic)
    fetcher.FetchResult = _FetchResult


def enabled() -> frozenset[str]:
    """The topics that come as `Fetched`."""
    return frozenset(_topics)
