"""The records of lanes as the store has them, in the log's order and as on the wire: what `inferwatch verify` reads.

An event is written again from its row: the encoder gives the same bytes for the same fields, and ingest keeps the wire
bytes of any event for which it would not. Heartbeats are not stored. Memory: one page.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Final

from collector.event import encode
from sinks.clickhouse.rows import record_of

Query = Callable[[str, Mapping[str, object]], Sequence[Mapping[str, object]]]
PAGE_OFFSETS: Final = 20_000

_PARTITIONS: Final = """
SELECT kafka_partition AS p, min(kafka_offset) AS first, max(kafka_offset) AS last FROM (
    SELECT kafka_partition, kafka_offset FROM events
    WHERE append_time BETWEEN {begin:DateTime64(3)} AND {end:DateTime64(3)}
    UNION ALL
    SELECT kafka_partition, kafka_offset FROM lane_records
    WHERE append_time BETWEEN {begin:DateTime64(3)} AND {end:DateTime64(3)}
) GROUP BY p ORDER BY p
"""
_EVENTS: Final = """
SELECT * FROM events
WHERE kafka_partition = {partition:UInt32} AND kafka_offset BETWEEN {first:UInt64} AND {last:UInt64}
ORDER BY kafka_offset
"""
_RECORDS: Final = """
SELECT kafka_offset, raw FROM lane_records
WHERE kafka_partition = {partition:UInt32} AND kafka_offset BETWEEN {first:UInt64} AND {last:UInt64}
ORDER BY kafka_offset
"""


def lane_log(query: Query, begin: datetime, end: datetime) -> Iterator[tuple[int, list[bytes], list[int]]]:
    """(partition, records, offsets), page by page, of what the broker took between two moments."""
    for found in query(_PARTITIONS, {"begin": begin, "end": end}):
        partition, last = int(str(found["p"])), int(str(found["last"]))
        for first in range(int(str(found["first"])), last + 1, PAGE_OFFSETS):
            page = {"partition": partition, "first": first, "last": min(last, first + PAGE_OFFSETS - 1)}
            raws = {int(str(row["kafka_offset"])): encode(record_of(row)) for row in query(_EVENTS, page)}
            # What was kept as on the wire goes over what the columns give.
            raws |= {int(str(row["kafka_offset"])): str(row["raw"]).encode() for row in query(_RECORDS, page)}
            offsets = sorted(raws)
            yield partition, [raws[offset] for offset in offsets], offsets
