"""Reads a log from Kafka, the store or files, and hands it to the verifier; writes it into files.

A file holds one partition: `events-PARTITION.jsonl`, one record a line, as on the wire, in the log's order. Any Kafka
client that prints the values of a partition one a line makes such files too.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from collector.event import timestamp_us
from collector.kafka import KafkaConfig, TopicPartition, ensure_topics, make_consumer, wait_for_broker
from collector.trust import TrustedKeys
from collector.verification import Report, Verification
from inferwatch.config import Config
from sinks.clickhouse.clients import clients_of
from sinks.clickhouse.lane_log import lane_log
from sinks.clickhouse.store import Store

_FILE: Final = re.compile(r"(\d{1,5})\.jsonl\Z")
_CHUNK_BYTES: Final = 524_288
_LATEST: Final = datetime(2200, 1, 1, tzinfo=UTC)
_EARLIEST: Final = datetime(1971, 1, 1, tzinfo=UTC)


class Range(NamedTuple):
    """Of the broker's time; None: from the first, to the last."""

    begin: datetime | None = None
    end: datetime | None = None

    @property
    def whole(self) -> bool:
        """Everything that there is."""
        return self.begin is None and self.end is None


class Export:
    """Writes what was read; nothing where there is no folder. Raises FileExistsError rather than mix two logs."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True)

    def write(self, partition: int, raws: Sequence[bytes]) -> None:
        """The next records of a partition."""
        if self._folder is not None and raws:
            with (self._folder / f"events-{partition}.jsonl").open("ab") as out:
                out.write(b"\n".join(raws) + b"\n")


def verification_of(config: Config, *, whole: bool, beats: bool = True, event: str = "") -> Verification:
    """A run with the keys that the configuration trusts."""
    revoked = {key_id: timestamp_us(moment) for key_id, moment in config.evidence.revoked.items()}
    keys = TrustedKeys(config.evidence.signing_keys, revoked)
    return Verification(keys, whole=whole, beats=beats, wanted=event)


def verify_files(config: Config, files: Sequence[Path], event: str = "", *, beats: bool = True) -> Report:
    """Files of an export, from the store without `beats`; whole only where no partition's file is missing.

    Raises ValueError for another name.
    """
    numbers: dict[int, Path] = {}
    for file in files:
        named = _FILE.search(file.name)
        if named is None or int(named[1]) in numbers:
            raise ValueError(f"{file}: name one file for each partition, NAME-PARTITION.jsonl")
        numbers[int(named[1])] = file
    verification = verification_of(config, whole=set(numbers) == set(range(len(numbers))), beats=beats, event=event)
    for partition, file in sorted(numbers.items()):
        for first, raws in read_lines(file):
            verification.feed(partition, raws, range(first, first + len(raws)))
    return verification.report()


def read_lines(file: Path) -> Iterator[tuple[int, list[bytes]]]:
    """(number of the first line, lines), some thousands at a time. Memory: twice 512 KiB, and a line; larger pieces
    are mapped and unmapped each time, which costs 1 µs a record."""
    number, rest = 0, b""
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            raws = (rest + chunk).split(b"\n")
            rest = raws.pop()
            yield number, raws
            number += len(raws)
    if rest:
        yield number, [rest]


async def verify_kafka(config: Config, asked: Range, event: str = "", export: Path | None = None) -> Report:
    """The events topic. Raises BrokerAway or TopicMismatch."""
    await wait_for_broker(config.kafka, config.streams.broker_timeout_s)
    await ensure_topics(config.kafka)
    verification, out = verification_of(config, whole=asked.whole, event=event), Export(export)
    await _read(config.kafka, asked, verification, out)
    return verification.report()


async def _read(kafka: KafkaConfig, asked: Range, verification: Verification, out: Export) -> None:
    consumer = make_consumer(kafka, group_id=None, max_partition_fetch_bytes=4 * 1024 * 1024)
    await consumer.start()
    try:
        places = [TopicPartition(kafka.topic("events"), partition) for partition in range(kafka.count("events"))]
        consumer.assign(places)
        ends = await consumer.end_offsets(places)
        starts = await consumer.beginning_offsets(places)
        for moment, bounds in ((asked.begin, starts), (asked.end, ends)):
            if moment is not None:
                found = await consumer.offsets_for_times(dict.fromkeys(places, int(moment.timestamp() * 1000)))
                bounds.update({place: at.offset if at else ends[place] for place, at in found.items()})
        for place in places:
            consumer.seek(place, starts[place])
        waiting = {place for place in places if starts[place] < ends[place]}
        while waiting:
            for place, records in (await consumer.getmany(*waiting, timeout_ms=500)).items():
                kept = [record for record in records if record.offset < ends[place]]
                raws = [record.value or b"" for record in kept]
                verification.feed(place.partition, raws, [record.offset for record in kept])
                out.write(place.partition, raws)
            waiting = {place for place in waiting if await consumer.position(place) < ends[place]}
    finally:
        await consumer.stop()


def verify_store(config: Config, asked: Range, event: str = "", export: Path | None = None) -> Report:
    """The store, which keeps no heartbeats. Raises StoreInUse where chDB's own process runs, StoreError."""
    verification = verification_of(config, whole=asked.whole, beats=False, event=event)
    out = Export(export)
    with closing(Store(config.store, clients_of(config.store))) as store:
        for partition, raws, offsets in lane_log(store.query, asked.begin or _EARLIEST, asked.end or _LATEST):
            verification.feed(partition, raws, offsets)
            out.write(partition, raws)
    return verification.report()
