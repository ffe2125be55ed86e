"""The publisher on a real Kafka: each request has its one event, in order, whatever dies on the way."""

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import structlog
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from collector import event as events
from collector.config import JournalConfig, PublisherConfig
from collector.event import AnyRecord, AuditEvent, Goodbye, Heartbeat, Hello, Integrity, Rejection
from collector.identity import Pseudonyms
from collector.journal import JournalBusy, JournalFull, dead_boots
from collector.kafka import BrokerAway, KafkaConfig, TopicPartition, make_consumer, partition_for
from collector.publisher import ClockApart, Closed, Publisher, system_clock_us

pytestmark = pytest.mark.kafka
ROOT = Path(__file__).parent.parent.parent
KNOWN: dict[str, object] = {"tenant": "default", "session_id": "s_" + "5" * 32}


class Stored(NamedTuple):
    """A record as Kafka has it."""

    partition: int
    offset: int
    append_ms: int
    key: bytes | None
    record: AnyRecord


async def _read(kafka: KafkaConfig) -> list[Stored]:
    consumer = make_consumer(kafka, group_id=None)
    await consumer.start()
    try:
        places = [TopicPartition(kafka.topic("events"), p) for p in range(kafka.count("events"))]
        consumer.assign(places)
        ends = await consumer.end_offsets(places)
        await consumer.seek_to_beginning(*places)
        stored: list[Stored] = []
        while any([await consumer.position(place) < ends[place] for place in places]):
            for place, messages in (await consumer.getmany(timeout_ms=200)).items():
                stored += [
                    Stored(place.partition, m.offset, m.timestamp, m.key, events.decode(m.value)) for m in messages
                ]
    finally:
        await consumer.stop()
    return sorted(stored, key=lambda one: (one.partition, one.offset))


def read(kafka: KafkaConfig) -> list[Stored]:
    """Everything on the events topic, by partition and offset."""
    return asyncio.run(_read(kafka))


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
        """`changes`: settings of the publisher, or of the journal with `journal_` in front."""
        journal = {name[8:]: value for name, value in changes.items() if name.startswith("journal_")}
        settings = {name: value for name, value in changes.items() if not name.startswith("journal_")}
        made = Publisher(
            self.kafka,
            PublisherConfig.model_validate(settings),
            JournalConfig.model_validate({"dir": self.folder} | journal),
            collector_id="host-1",
            model_version="tiny@1",
            boot=boot,
            clock_us=clock_us,
        )
        self.made.append(made)
        return made


@pytest.fixture
def make(kafka_config: KafkaConfig, tmp_path: Path) -> Iterator[Maker]:
    """Publishers for one test."""
    maker = Maker(kafka_config, tmp_path / "journal")
    yield maker
    for publisher in maker.made:
        publisher.stop(1)


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
        yield
    finally:
        os.kill(broker.pid, signal.SIGCONT)


def folders(make: Maker) -> list[str]:
    """The boots that have a folder."""
    return [path.name for path in make.folder.iterdir() if path.is_dir()] if make.folder.exists() else []


def test_what_finish_returned_is_what_kafka_has(make: Maker) -> None:
    """Requests of four threads and rejections: every event stored as returned, once, each lane in order."""
    publisher = make()
    publisher.start()
    returned: list[AuditEvent] = []

    def work(worker: int) -> None:
        returned.extend(ask(publisher, worker * 100 + turn) for turn in range(100))
        returned.append(publisher.reject(key=f"a_{worker}", http_status=401, reason="unknown key"))

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    change = publisher.change(key="default", subject="model", before="a@1", after="a@2")
    assert publisher.stop() is True
    stored = read(make.kafka)
    check_lanes(stored)
    by_id = {one.record.event_id: one.record for one in stored}
    assert [by_id[event.event_id] for event in returned] == returned
    assert by_id[change.event_id] == change
    assert Counter(type(r) for r in by_id.values() if isinstance(r, AuditEvent)) == {AuditEvent: 400, Rejection: 4}
    assert repeats(stored) == 0
    assert folders(make) == []
    with pytest.raises(Closed):
        ask(publisher, 1)


def test_silent_lanes_get_heartbeats_with_the_counters(make: Maker) -> None:
    """Each lane's promise moves at least every few periods; the counters are the collector's."""
    publisher = make(heartbeat_ms=50)
    publisher.start()
    publisher.counters.engine_requests += 3
    publisher.counters.guard_error("ngrams")
    ticket = publisher.begin(key="u_1", known=KNOWN)
    ask(publisher, 2)
    publisher.reject(key="u_3", reason="no key", http_status=401)
    time.sleep(1)
    publisher.finish(ticket, status="ok")
    publisher.stop()
    stored = read(make.kafka)
    check_lanes(stored)
    for lane in lanes(stored).values():
        beats = [record for record in lane if isinstance(record, Heartbeat)]
        assert len(beats) >= 6
        gaps = [(b.timestamp - a.timestamp).total_seconds() for a, b in pairwise(lane)]
        assert max(gaps) < 0.5
        last = beats[-1]
        assert (last.engine_requests, last.events, last.rejections, last.in_flight) == (3, 1, 1, 1)
        assert (last.guard_errors, last.journal_bytes > 0, last.dropped) == ({"ngrams": 1}, True, 0)


def test_a_stop_ends_what_is_open_as_aborted(make: Maker) -> None:
    """No request is left without an end at a clean stop; a late finish gets the event that was made."""
    publisher = make()
    publisher.start()
    ticket = publisher.begin(key="u_1", known=KNOWN)
    assert publisher.stop() is True
    assert ends(read(make.kafka)) == {ticket.event_id: "aborted"}
    assert publisher.finish(ticket, status="ok").status == "aborted"
    assert publisher.stop() is False


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
    fat = ask(publisher, 1, guardrail_results=_noise(30))
    wait(lambda: publisher.lag() == 0)
    while not publisher._feeder._sender.replaced:  # the broker takes its time to heed the new limit
        before.append(fat)
        fat = ask(publisher, 1, guardrail_results=_noise(30))
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


def _noise(count: int) -> list[events.GuardResult]:
    """Guard results that do not compress."""
    return [
        events.GuardResult(guard=os.urandom(100).hex(), version="1", stage="input", decision="allow")
        for _ in range(count)
    ]


def test_an_oversized_event_never_reaches_the_producer(make: Maker) -> None:
    """Larger than the topic takes: an integrity record in its place, counted; 100 good events after it are stored."""
    publisher = make()
    publisher.start()
    fat = ask(publisher, 1, guardrail_results=_noise(1500))
    good = [ask(publisher, 1) for _ in range(100)]
    wait(lambda: publisher.lag() == 0)
    assert publisher.counters.oversized == 1
    assert publisher._feeder._sender.refused == 0
    publisher.stop()
    stored = read(make.kafka)
    check_lanes(stored)
    assert set(ends(stored)) == {event.event_id for event in good}
    told = [one.record for one in stored if isinstance(one.record, Integrity)]
    assert [(r.problem, r.subject_id, r.seq) for r in told] == [("event too large", fat.event_id, fat.seq)]


@pytest.mark.parametrize("hours", [2, -2])
def test_a_clock_far_off_refuses_to_start_unless_allowed(make: Maker, hours: int) -> None:
    """One sentence with the difference; with the setting, 100 events two hours off are all stored."""

    def clock_us() -> int:
        return system_clock_us() + hours * 3_600_000_000

    way = "ahead of" if hours > 0 else "behind"
    with pytest.raises(ClockApart, match=rf"clock is 7\d\d\d\.\d s {way} the Kafka broker's: set it right, or"):
        make(clock_us=clock_us).start()
    assert folders(make) == []
    publisher = make(clock_us=clock_us, clock_offset_allowed=True)
    publisher.start()
    asked = [ask(publisher, turn) for turn in range(100)]
    assert publisher.stop() is True
    stored = read(make.kafka)
    check_lanes(stored)
    assert set(ends(stored)) == {event.event_id for event in asked}
    hello = next(one.record for one in stored if isinstance(one.record, Hello))
    assert abs(hello.clock_offset_ms - hours * 3_600_000) < 5000


def test_a_clock_that_jumps_ahead_while_running_loses_nothing(make: Maker) -> None:
    """100 good events after a jump of two hours are all stored, in order."""
    ahead_us = [0]
    publisher = make(clock_us=lambda: system_clock_us() + ahead_us[0])
    publisher.start()
    asked = [ask(publisher, 1)]
    ahead_us[0] = 7_200_000_000
    asked.append(ask(publisher, 1))
    ahead_us[0] = 0
    asked += [ask(publisher, turn) for turn in range(100)]
    assert publisher.stop() is True
    stored = read(make.kafka)
    check_lanes(stored)
    assert set(ends(stored)) == {event.event_id for event in asked}


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


def test_two_publishers_share_a_folder_but_not_a_boot(make: Maker) -> None:
    """Processes of one host live side by side; neither settles the other; the same boot twice is refused."""
    one, two, again = make(boot="boot-1"), make(boot="boot-2"), make(boot="boot-1")
    one.start()
    two.start()
    with pytest.raises(JournalBusy, match="belongs to another running process"):
        again.start()
    first, second = ask(one, 1), ask(two, 1)
    assert dead_boots(make.folder) == []
    assert (one.stop(), two.stop()) == (True, True)
    stored = read(make.kafka)
    check_lanes(stored)
    assert set(ends(stored)) == {first.event_id, second.event_id}


def test_a_journal_removed_under_us_ends_the_service(make: Maker) -> None:
    """Somebody deletes the folder: what was begun can no longer be promised, so no request may begin."""
    publisher = make(heartbeat_ms=50)
    publisher.start()
    shutil.rmtree(make.folder)
    with pytest.raises(Closed, match="no request may begin"):
        wait(lambda: not ask(publisher, 1), 10)
    publisher.stop(2)


def test_no_broker_at_the_start_is_one_sentence(tmp_path: Path) -> None:
    """Nobody listens: BrokerAway names the address, no folder is left, begin says that nothing runs."""
    maker = Maker(KafkaConfig(bootstrap_servers="127.0.0.1:1"), tmp_path / "journal")
    publisher = maker(start_timeout_ms=500)
    with pytest.raises(BrokerAway, match=r"no Kafka at 127\.0\.0\.1:1 after"):
        publisher.start()
    assert folders(maker) == []
    with pytest.raises(Closed, match="not running"):
        ask(publisher, 1)


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


def test_the_health_record_is_written(make: Maker) -> None:
    """On the status topic, keyed by process: lag, drops, what the collector counts."""
    publisher = make(status_ms=100)
    publisher.start()
    ask(publisher, 1)
    time.sleep(0.6)
    publisher.stop()

    async def status() -> list[tuple[bytes, dict[str, Any]]]:
        consumer = make_consumer(make.kafka, make.kafka.topic("status"), group_id=None)
        await consumer.start()
        try:
            found = await consumer.getmany(timeout_ms=3000)
            return [(m.key, json.loads(m.value)) for messages in found.values() for m in messages]
        finally:
            await consumer.stop()

    records = asyncio.run(status())
    process_id = f"collector-host-1-{publisher.boot}"
    assert {key for key, _ in records} == {process_id.encode()}
    assert records[0][1]["state"] == "starting"
    last = records[-1][1]
    assert (last["process_id"], last["role"], last["state"]) == (process_id, "collector", "running")
    assert (last["totals"]["events"], last["drops"], last["ready"]) == (1, 0, True)


def test_no_text_is_anywhere(make: Maker, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """A canary that was hashed, named and refused appears in no journal, topic, log or repr."""
    canary = "canary-7f3a91-in-a-prompt"
    names = Pseudonyms(bytes(range(32)))
    publisher = make()
    publisher.start()
    known = {
        **KNOWN,
        "user_id": names.user(canary),
        "session_id": names.session(canary),
        "prompt_hash": names.digest(canary),
        "turn_hash": names.digest(canary),
        "minhash": names.minhash(canary),
    }
    with caplog.at_level(logging.DEBUG):
        ticket = publisher.begin(key=names.user(canary), known=known)
        publisher.finish(ticket, status="ok", reason=canary * 50)  # out of bounds: replaced
        publisher.finish(publisher.begin(key=names.user(canary), known=known), status="ok")
        wait(lambda: publisher.lag() == 0)
    on_disk = b"".join(path.read_bytes() for path in make.folder.rglob("*") if path.is_file())
    publisher.stop()
    in_kafka = b"".join(events.encode(one.record) + (one.key or b"") for one in read(make.kafka))
    shown = capsys.readouterr()
    for where in (on_disk.decode("latin-1"), in_kafka.decode(), caplog.text, shown.out, shown.err, repr(publisher)):
        assert canary not in where
    assert names.digest(canary) in in_kafka.decode()
