"""The store is evidence too: what ingest puts there is verified without Kafka, and a row tampered with is named."""

import time
from pathlib import Path

import pytest

from collector.event import AuditEvent, Heartbeat, decode
from collector.kafka import ConsumerRecord
from collector.trust import TrustedKeys
from collector.verification import Report, Verification
from detectors.config import DetectConfig
from inferwatch.evidence import _EARLIEST, _LATEST
from sinks.clickhouse.lane_log import lane_log
from sinks.clickhouse.store import Store, open_store
from sinks.config import StoreConfig
from streams.ingest import Intake
from streams.progress import Progress
from tests.collector.signed_log import SIGNER, Log, write_log

NOW_MS = time.time_ns() // 1_000_000
"""The store drops what is too old."""


def ingested(log: Log, folder: Path) -> Store:
    """The log in a store of its own."""
    store = open_store(StoreConfig(url=f"chdb://{folder}/store", readers=2, query_timeout_s=30))
    for partition, raws in log.items():
        intake = Intake("iw.events", partition, DetectConfig().time, Progress(folder, "iw.events", partition), 10_000)
        intake.feed(
            [
                ConsumerRecord(
                    topic="iw.events",
                    partition=partition,
                    offset=offset,
                    timestamp=NOW_MS + offset,
                    timestamp_type=1,
                    key=None,
                    value=raw,
                    checksum=None,
                    serialized_key_size=0,
                    serialized_value_size=len(raw),
                    headers=(),
                )
                for offset, raw in enumerate(raws)
            ]
        )
        rows = intake.rows(intake.batch())
        for _ in range(2):  # a batch that is repeated changes nothing
            store.insert_records(intake.records, token=f"t:{partition}")
            store.insert_events(rows, token=f"t:{partition}")
    return store


def verified(store: Store) -> Report:
    verification = Verification(TrustedKeys([SIGNER.public_key]), beats=False)
    for partition, raws, offsets in lane_log(store.query, _EARLIEST, _LATEST):
        verification.feed(partition, raws, offsets)
    return verification.report()


def test_the_store_gives_the_bytes_back_and_a_changed_row_is_named(tmp_path: Path) -> None:
    """Every record but heartbeats as it was on the wire, an event with fields of a later version included."""
    log = write_log(tmp_path / "journal", 21)
    store = ingested(log, tmp_path)
    try:
        kept = {p: raws for p, raws, _ in lane_log(store.query, _EARLIEST, _LATEST)}
        assert kept == {p: [raw for raw in raws if not isinstance(decode(raw), Heartbeat)] for p, raws in log.items()}
        sound = verified(store)
        assert (sound.verdict, sound.lanes, sound.boots) == ("sound", 4, 2)
        offset, raw = next((o, raw) for o, raw in enumerate(log[1]) if o > 30 and isinstance(decode(raw), AuditEvent))
        store._command(
            f"ALTER TABLE events DELETE WHERE kafka_partition = 1 AND kafka_offset = {offset}"
            " SETTINGS mutations_sync = 1"
        )
        report = verified(store)
        assert (report.verdict, report.problems[0].what, report.problems[0].partition) == ("broken", "removed", 1)
        assert report.problems[0].seq <= decode(raw).seq
    finally:
        store.close()


BESIDE = (
    "INSERT INTO events SELECT * REPLACE ('019a0000-0000-7000-8000-00000000dead' AS event_id)"
    " FROM (SELECT * FROM events WHERE {place})"
)
FAR = BESIDE.replace("event_id)", "event_id, toUInt64(18446744073709551615) AS kafka_offset)")
OVER = "ALTER TABLE events UPDATE user_id = 'u_666' WHERE {place} SETTINGS mutations_sync = 1"
NONE = "ALTER TABLE events UPDATE status = 'bogus' WHERE {place} SETTINGS mutations_sync = 1"
GONE = "ALTER TABLE events DELETE WHERE {place} SETTINGS mutations_sync = 1"
KEEP = (
    "INSERT INTO lane_records SELECT kafka_partition, kafka_offset, append_time, kind, '{raw}'"
    " FROM events WHERE {place}"
)


@pytest.mark.parametrize(
    ("statements", "what"),
    [
        ((BESIDE,), "inserted"),
        ((FAR,), "inserted"),
        ((OVER,), "changed"),
        ((KEEP, OVER), "changed"),
        ((KEEP, GONE), "removed"),
        ((NONE,), "inserted"),
    ],
    ids=["beside it", "at an offset far away", "over it", "over it, its bytes kept", "its bytes alone", "no record"],
)
def test_whatever_is_shown_in_the_place_of_an_event_is_named(
    tmp_path: Path, statements: tuple[str, ...], what: str
) -> None:
    """What people see is the table of events: bytes kept beside it do not speak for a row that says something else."""
    log = write_log(tmp_path / "journal", 21)
    store = ingested(log, tmp_path)
    try:
        offset, raw = next((o, raw) for o, raw in enumerate(log[1]) if o > 30 and isinstance(decode(raw), AuditEvent))
        place = f"kafka_partition = 1 AND kafka_offset = {offset}"
        for statement in statements:
            store._command(statement.format(place=place, raw=raw.decode()))
        report = verified(store)
        assert (report.verdict, what in {problem.what for problem in report.problems}) == ("broken", True)
        assert {problem.partition for problem in report.problems} == {1}
    finally:
        store.close()


@pytest.mark.parametrize("extra", [b',"field_of_1_7":[1,2]}'])
def test_an_event_of_a_later_version_keeps_its_bytes(tmp_path: Path, extra: bytes) -> None:
    """Its columns would lose a field, so its bytes are kept beside them."""
    raw = next(raw for raw in write_log(tmp_path / "journal", 22)[0] if isinstance(decode(raw), AuditEvent))
    later = raw[:-1] + extra
    store = ingested({0: [later]}, tmp_path)
    try:
        assert list(lane_log(store.query, _EARLIEST, _LATEST)) == [(0, [later], [0])]
    finally:
        store.close()
