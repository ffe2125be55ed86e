"""The publisher when things die: each request still has its one event, or the loss is counted and told."""

import asyncio
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import MutableMapping
from typing import Any

import pytest
import structlog
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from collector.event import AuditEvent, Hello, Integrity
from collector.journal import JournalFull
from collector.kafka import KafkaConfig
from collector.publisher import Closed
from tests.collector.publishing import (
    ROOT,
    Maker,
    ask,
    check_lanes,
    ends,
    folders,
    lanes,
    noise,
    read,
    repeats,
    stalled,
    wait,
)

pytestmark = pytest.mark.kafka


CHILD = r"""
import os, sys, threading
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from collector.config import JournalConfig, PublisherConfig
from collector.kafka import KafkaConfig
from collector.publisher import Publisher
kafka = KafkaConfig(bootstrap_servers=sys.argv[1], topic_prefix=sys.argv[2])
publisher = Publisher(kafka, PublisherConfig(), JournalConfig(dir=Path(sys.argv[3]), segment_bytes=65536),
                      collector_id="host-1", model_version="tiny@1", boot=sys.argv[4])
publisher.start()
def work(worker):
    open_ones = []
    for turn in range(1_000_000):
        ticket = publisher.begin(key=f"u_{worker}_{turn % 9}", known={"tenant": "default"})
        os.write(1, f"begun {ticket.event_id}\n".encode())
        open_ones.append(ticket)
        if len(open_ones) > 10:
            done = open_ones.pop(turn % 10)
            publisher.finish(done, status="ok")
            os.write(1, f"done {done.event_id}\n".encode())
for worker in range(2):
    threading.Thread(target=work, args=(worker,)).start()
"""


def kill_in_flight(make: Maker, boot: str, lines: int) -> tuple[set[str], set[str]]:
    """Run a loaded process until it has said so much, and SIGKILL it; what it said was begun, and done."""
    arguments = [make.kafka.bootstrap_servers, make.kafka.topic_prefix, str(make.folder), boot]
    command = [sys.executable, "-c", CHILD, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [next(process.stdout) for _ in range(lines)]
        process.kill()
        said += process.stdout.read().splitlines()
    words = [line.split() for line in said if len(line.split()) == 2 and len(line.split()[1]) == 36]
    return {i for word, i in words if word == "begun"}, {i for word, i in words if word == "done"}


def test_nothing_begun_is_without_its_event_after_sigkill(make: Maker) -> None:
    """A process killed under load, twice over: the next start ends its lanes with each request's one event."""
    begun, done = kill_in_flight(make, "boot-a", 300)
    more_begun, more_done = kill_in_flight(make, "boot-b", 3000)  # settles boot-a first
    publisher = make()
    publisher.start()
    assert folders(make) == [publisher.boot]
    publisher.stop()
    stored = read(make.kafka)
    told = ends(stored)
    assert begun | more_begun <= set(told)
    assert {told[event_id] for event_id in done | more_done} == {"ok"}
    lost = {event_id for event_id, status in told.items() if status == "lost"}
    assert len(lost) >= 20
    assert not lost & (done | more_done)
    check_lanes([one for one in stored if one.record.boot in ("boot-a", "boot-b")], "recovered")
    check_lanes([one for one in stored if one.record.boot == publisher.boot])
    starts = {one.record.boot: one.record.timestamp for one in reversed(stored) if isinstance(one.record, Hello)}
    assert sorted(starts, key=lambda boot: starts[boot]) == ["boot-a", "boot-b", publisher.boot]


def test_a_broker_killed_under_load_loses_and_doubles_nothing(make: Maker, broker: Any) -> None:
    """Requests go on while Kafka is dead, none of them slow; when it is back everything is stored in order."""
    publisher = make()
    publisher.start()
    asked: list[AuditEvent] = []
    took_s: list[float] = []
    stopped = threading.Event()

    def work() -> None:
        turn = 0
        while not stopped.is_set():
            start_s = time.perf_counter()
            asked.append(ask(publisher, turn % 50))
            took_s.append(time.perf_counter() - start_s)
            turn += 1
            time.sleep(0.002)

    worker = threading.Thread(target=work)
    worker.start()
    time.sleep(0.5)
    broker.kill9()
    time.sleep(1.5)
    broker.start()
    wait(lambda: publisher.lag() < 50, 60)
    time.sleep(0.3)
    stopped.set()
    worker.join()
    assert publisher.stop(30) is True
    stored = read(make.kafka)
    check_lanes(stored)
    assert set(ends(stored)) == {event.event_id for event in asked}
    assert repeats(stored) == 0
    assert sorted(took_s)[int(len(took_s) * 0.99)] < 0.05


def test_a_stalled_broker_holds_up_no_request_and_is_told_once(make: Maker, broker: Any) -> None:
    """Kafka hangs without closing a connection: requests pass, one line says so, one says that it is over."""
    lines: list[str] = []

    def note(_logger: Any, _level: str, entry: MutableMapping[str, Any]) -> str:
        lines.append(str(entry["event"]))
        return ""

    structlog.configure(processors=[note])
    try:
        publisher = make(broker_silence_ms=300)
        publisher.start()
        took_s = []
        with stalled(broker):
            for turn in range(200):
                start_s = time.perf_counter()
                ask(publisher, turn)
                took_s.append(time.perf_counter() - start_s)
                time.sleep(0.005)
        wait(lambda: publisher.lag() == 0)
        assert publisher.stop(30) is True
    finally:
        structlog.reset_defaults()
    assert sorted(took_s)[int(len(took_s) * 0.99)] < 0.05
    assert len(ends(read(make.kafka))) == 200
    assert [line for line in lines if "Kafka" in line] == [
        "Kafka does not take events; they wait in the journal",
        "Kafka takes events again",
    ]


async def _limit_messages(kafka: KafkaConfig, size: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()
    try:
        configs = {"max.message.bytes": str(size), "message.timestamp.type": "LogAppendTime"}
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, kafka.topic("events"), configs)])
    finally:
        await admin.close()


def test_a_refused_batch_is_not_the_end_of_its_lane(make: Maker) -> None:
    """Kafka takes less than it said: the one fat event becomes an integrity record, all others around it are stored."""
    publisher = make()
    publisher.start()
    before = [ask(publisher, 1) for _ in range(50)]
    wait(lambda: publisher.lag() == 0)
    asyncio.run(_limit_messages(make.kafka, 3000))
    fat = ask(publisher, 1, guardrail_results=noise(30))
    wait(lambda: publisher.lag() == 0)
    while not publisher._feeder._sender.replaced:  # the broker takes its time to heed the new limit
        before.append(fat)
        fat = ask(publisher, 1, guardrail_results=noise(30))
        wait(lambda: publisher.lag() == 0)
    after = [ask(publisher, 1) for _ in range(100)]
    wait(lambda: publisher.lag() == 0, 60)
    assert publisher.stop(30) is True
    stored = read(make.kafka)
    check_lanes(stored)
    assert set(ends(stored)) == {event.event_id for event in before + after}
    told = [one.record for one in stored if isinstance(one.record, Integrity)]
    assert [(r.problem, r.subject_id, r.seq, r.timestamp) for r in told] == [
        ("refused by Kafka", fat.event_id, fat.seq, fat.timestamp)
    ]


@pytest.mark.parametrize("when_full", ["refuse", "drop-oldest"])
def test_a_full_journal_does_what_the_setting_says(make: Maker, broker: Any, when_full: str) -> None:
    """Kafka away for long. `refuse`: JournalFull, nothing lost. `drop-oldest`: goes on, each record lost is counted."""
    publisher = make(
        journal_bytes_max=65_536, journal_segment_bytes=4096, journal_when_full=when_full, heartbeat_ms=5000
    )
    publisher.start()
    asked, refused = [], 0
    with stalled(broker):
        for turn in range(400):
            try:
                asked.append(ask(publisher, turn))
            except JournalFull:
                refused += 1
    wait(lambda: publisher.lag() == 0)
    asked.append(ask(publisher, 1))
    assert publisher.stop(30) is True
    stored = read(make.kafka)
    if when_full == "refuse":
        assert refused > 0
        check_lanes(stored)
        assert set(ends(stored)) == {event.event_id for event in asked}
        assert publisher.counters.dropped == 0
    else:
        holes = sum(lane[-1].seq + 1 - len(lane) for lane in lanes(stored).values())
        assert refused == 0
        assert holes == publisher.counters.dropped == len(asked) - len(ends(stored))
        assert holes > 0
        assert asked[-1].event_id in ends(stored)


def test_a_journal_removed_under_us_ends_the_service(make: Maker) -> None:
    """Somebody deletes the folder: what was begun can no longer be promised, so no request may begin."""
    publisher = make(heartbeat_ms=50)
    publisher.start()
    shutil.rmtree(make.folder)
    with pytest.raises(Closed, match="no request may begin"):
        wait(lambda: not ask(publisher, 1), 10)
    publisher.stop(2)


def test_a_stop_while_the_broker_is_away_keeps_the_rest(make: Maker, broker: Any) -> None:
    """False within the time given; the next start sends the rest, goodbye included, as it was."""
    publisher = make(boot="boot-1")
    publisher.start()
    with stalled(broker):
        asked = [ask(publisher, turn) for turn in range(20)]
        start_s = time.monotonic()
        assert publisher.stop(0.5) is False
        assert time.monotonic() - start_s < 8
    assert folders(make) == ["boot-1"]
    heir = make()
    heir.start()
    assert folders(make) == [heir.boot]
    heir.stop()
    stored = read(make.kafka)
    check_lanes(stored)
    assert set(ends(stored)) == {event.event_id for event in asked}
