"""Has aiokafka hand over whole fetches as columns, without making an object of each record once more.

What aiokafka unpacks in C becomes a `Fetched`. It is the one place that knows how aiokafka keeps what it fetched;
`streams/surface.py` lists the names.
"""

from typing import Any

import numpy as np
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException

from streams.batch import Fetched

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
        offsets: list[int] = []
        append_ms: list[int] = []
        while unpacked._records.has_next():
            batch = unpacked._records.next_batch()
            if unpacked._check_crcs and not batch.validate_crc():
                raise CorruptRecordException(f"invalid checksum in {tp}")
            if not batch.is_control_batch:
                records = list(batch)
                if records and records[0].offset < unpacked.next_fetch_offset:
                    records = [record for record in records if record.offset >= unpacked.next_fetch_offset]
                values += [record.value for record in records]
                offsets += [record.offset for record in records]
                append_ms += [record.timestamp for record in records]
            unpacked.next_fetch_offset = batch.next_offset
        self._update_position()
        self._partition_records = None
        if not values:
            return []
        return Fetched(tp.topic, tp.partition, values, np.array(offsets, np.int64), np.array(append_ms, np.int64))


def enable(topic: str) -> None:
    """From now on fetches of the topic come as `Fetched`, in this process; all other topics as usual."""
    _topics.add(topic)
    fetcher.FetchResult = _FetchResult


def enabled() -> frozenset[str]:
    """The topics that come as `Fetched`."""
    return frozenset(_topics)
