"""The records of lanes as the store has them, in the log's order and as on the wire: what `inferwatch verify` reads.

An event is written again from its row: the encoder gives the same bytes for the same fields, and ingest keeps the wire
bytes of any event for which it would not. Such bytes count only beside a row that says the same. Heartbeats are not
stored. Memory: one page.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Final

import msgspec

from collector.event import AuditEvent, BadEvent, decode, encode
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


_NEXT: Final = """
SELECT min(kafka_offset) AS next FROM (
    SELECT kafka_offset FROM events WHERE kafka_partition = {partition:UInt32} AND kafka_offset >= {first:UInt64}
    UNION ALL
    SELECT kafka_offset FROM lane_records WHERE kafka_partition = {partition:UInt32} AND kafka_offset >= {first:UInt64}
)
"""


def lane_log(query: Query, begin: datetime, end: datetime) -> Iterator[tuple[int, list[bytes], list[int]]]:
    """(partition, records, offsets), page by page, of what the broker took between two moments.

    An offset comes as often as there are different records at it. A row of which no record can be made comes as empty
    bytes: somebody else has written it.
    """
    for found in query(_PARTITIONS, {"begin": begin, "end": end}):
        partition, first, last = (int(str(found[name])) for name in ("p", "first", "last"))
        while first <= last:
            page = {"partition": partition, "first": first, "last": min(last, first + PAGE_OFFSETS - 1)}
            raws = _page(query, page)
            if raws:
                yield partition, [raw for _, raw in raws], [offset for offset, _ in raws]
                first = page["last"] + 1
            else:  # a made-up offset may be very far away
                (row,) = query(_NEXT, {"partition": partition, "first": page["first"]})
                first = max(int(str(row["next"])), page["last"] + 1)


def _page(query: Query, page: Mapping[str, object]) -> list[tuple[int, bytes]]:
    """Offset and bytes of each record. Of an event the row is what counts: it is what people see."""
    raws: dict[int, list[bytes]] = {}
    for row in query(_EVENTS, page):
        at, raw = raws.setdefault(int(str(row["kafka_offset"])), []), _written(row)
        if raw not in at:  # a row that was inserted twice
            at.append(raw)
    for row in query(_RECORDS, page):
        at, raw = raws.setdefault(int(str(row["kafka_offset"])), []), str(row["raw"]).encode()
        shown = _shown(raw)
        if shown is None:
            at.append(raw)
        elif shown in at:  # what was kept as on the wire goes over what the columns give
            at[at.index(shown)] = raw
    return [(offset, raw) for offset in sorted(raws) for raw in raws[offset]]


def _written(row: Mapping[str, object]) -> bytes:
    try:
        return encode(record_of(row))
    except msgspec.MsgspecError:
        return b""


def _shown(raw: bytes) -> bytes | None:
    """What the columns of an event give that came as these bytes; None for any other record."""
    try:
        record = decode(raw)
    except BadEvent:
        return None
    return encode(record) if isinstance(record, AuditEvent) else None
