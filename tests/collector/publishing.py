"""What the publisher's tests share: publishers on one journal folder, and the events topic, read back and checked."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from collector import event as events
from collector.config import EvidenceConfig, JournalConfig, PublisherConfig
from collector.event import AnyRecord, AuditEvent, Goodbye, Hello
from collector.kafka import KafkaConfig, TopicPartition, make_consumer, partition_for
from collector.publisher import Publisher, system_clock_us

ROOT = Path(__file__).parent.parent.parent


KNOWN: dict[str, object] = {"tenant": "default", "session_id": "s_" + "5" * 32}


class Stored(NamedTuple):
    """A record as Kafka has it."""

    partition: int
    offset: int
    append_ms: int
    key: bytes | None
    record: AnyRecord


async def _read(kafka: KafkaConfig) -> list[tuple[TopicPartition, Any]]:
    consumer = make_consumer(kafka, group_id=None)
    await consumer.start()
    try:
        places = [TopicPartition(kafka.topic("events"), p) for p in range(kafka.count("events"))]
        consumer.assign(places)
        ends = await consumer.end_offsets(places)
        await consumer.seek_to_beginning(*places)
        stored: list[tuple[TopicPartition, Any]] = []
        while any([await consumer.position(place) < ends[place] for place in places]):
            for place, messages in (await consumer.getmany(timeout_ms=200)).items():
                stored += [(place, message) for message in messages]
    finally:
        await consumer.stop()
    return sorted(stored, key=lambda one: (one[0].partition, one[1].offset))


def read(kafka: KafkaConfig) -> list[Stored]:
    """Everything on the events topic, by partition and offset."""
    return [
        Stored(place.partition, m.offset, m.timestamp, m.key, events.decode(m.value))
        for place, m in asyncio.run(_read(kafka))
    ]


def read_raw(kafka: KafkaConfig) -> dict[int, list[bytes]]:
    """The same as on the wire, by partition."""
    found: dict[int, list[bytes]] = {}
    for place, message in asyncio.run(_read(kafka)):
        found.setdefault(place.partition, []).append(message.value)
    return found


def lanes(stored: list[Stored]) -> dict[tuple[str, int], list[AnyRecord]]:
    """The records of each lane as a reader takes them: what repeats an earlier seq is dropped (rule T7)."""
    taken: dict[tuple[str, int], list[AnyRecord]] = {}
    for one in stored:
        lane = taken.setdefault((one.record.boot, one.partition), [])
        if not lane or one.record.seq > lane[-1].seq:
            lane.append(one.record)
    return taken


def check_lanes(stored: list[Stored], goodbye: str = "stopped") -> None:
    """Each lane: hello first with seq 0, no hole, time never back, goodbye last. Each key on its own partition."""
    found = lanes(stored)
    assert found
    for lane in found.values():
        assert [record.seq for record in lane] == list(range(len(lane)))
        assert isinstance(lane[0], Hello)
        assert lane == sorted(lane, key=lambda record: record.timestamp)
        assert isinstance(lane[-1], Goodbye)
        assert lane[-1].reason == goodbye
        assert sum(isinstance(record, Hello | Goodbye) for record in lane) == 2
    for one in stored:
        assert one.key is None or partition_for(one.key, 4) == one.partition


def ends(stored: list[Stored]) -> dict[str, str]:
    """Request → status; a request with two events fails the test."""
    audit = [r for lane in lanes(stored).values() for r in lane if isinstance(r, AuditEvent)]
    assert {i: n for i, n in Counter(r.event_id for r in audit).items() if n > 1} == {}
    return {record.event_id: record.status for record in audit}


def repeats(stored: list[Stored]) -> int:
    """Records stored again with the seq of an earlier one."""
    return len(stored) - sum(map(len, lanes(stored).values()))


class Maker:
    """Makes publishers that share a journal folder, and stops those a test left running."""

    def __init__(self, kafka: KafkaConfig, folder: Path) -> None:
        self.kafka, self.folder = kafka, folder
        self.made: list[Publisher] = []

    def __call__(
        self, *, boot: str | None = None, clock_us: Callable[[], int] = system_clock_us, **changes: Any
    ) -> Publisher:
        """`changes`: settings of the publisher; of the journal or evidence with `journal_`, `evidence_` in front."""
        journal = {name[8:]: value for name, value in changes.items() if name.startswith("journal_")}
        evidence = {name[9:]: value for name, value in changes.items() if name.startswith("evidence_")}
        settings = {name: changes[name] for name in changes if not name.startswith(("journal_", "evidence_"))}
        made = Publisher(
            self.kafka,
            PublisherConfig.model_validate(settings),
            JournalConfig.model_validate({"dir": self.folder} | journal),
            collector_id="host-1",
            model_version="tiny@1",
            evidence=EvidenceConfig.model_validate(evidence),
            boot=boot,
            clock_us=clock_us,
        )
        self.made.append(made)
        return made


def ask(publisher: Publisher, user: int, **fields: Any) -> AuditEvent:
    """One request, begun and answered."""
    ticket = publisher.begin(key=f"u_{user}", known={**KNOWN, "user_id": f"u_{user}"})
    return publisher.finish(ticket, **({"status": "ok", "response_tokens": user} | fields))


def wait(until: Callable[[], bool], timeout_s: float = 30) -> None:
    """Return when `until` holds; fail after the time-out."""
    end_s = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.02)


@contextmanager
def stalled(broker: Any) -> Iterator[None]:
    """Kafka hangs, its connections open. Only a broker of ours: pid 0 would be this very process group."""
    if broker.pid <= 0:
        pytest.skip("the broker is not ours to stop")
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        # Its many threads stop one after another: until the last has, it may still acknowledge.
        end_s = time.monotonic() + 10
        while not all_stopped(broker.pid):
            assert time.monotonic() < end_s, "the broker did not stop"
            time.sleep(0.01)
        yield
    finally:
        os.kill(broker.pid, signal.SIGCONT)


def all_stopped(pid: int) -> bool:
    """Whether every thread of a process is in state T (proc(5), the field after the name in parentheses)."""
    stats = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def folders(make: Maker) -> list[str]:
    """The boots that have a folder."""
    return [path.name for path in make.folder.iterdir() if path.is_dir()] if make.folder.exists() else []


def noise(count: int) -> list[events.GuardResult]:
    """Guard results that do not compress."""
    return [
        events.GuardResult(guard=os.urandom(100).hex(), version="1", stage="input", decision="allow")
        for _ in range(count)
    ]
