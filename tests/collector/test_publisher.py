"""The publisher on a real Kafka: each request has its one event, in order, with its time, lane and number."""

import asyncio
import json
import logging
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from collector import event as events
from collector.event import AuditEvent, Heartbeat, Hello, Integrity, Rejection
from collector.guards.health import DRIFT_TOLD, REFERENCE_SCORES, Health
from collector.identity import Pseudonyms
from collector.journal import JournalBusy, dead_boots
from collector.kafka import BrokerAway, KafkaConfig, make_consumer
from collector.publisher import ClockApart, Closed, system_clock_us
from tests.collector.guards.test_stack import ActingGuard
from tests.collector.publishing import (
    KNOWN,
    Maker,
    ask,
    check_lanes,
    ends,
    folders,
    lanes,
    noise,
    read,
    repeats,
    wait,
)

pytestmark = pytest.mark.kafka


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


def test_an_oversized_event_never_reaches_the_producer(make: Maker) -> None:
    """Larger than the topic takes: an integrity record in its place, counted; 100 good events after it are stored."""
    publisher = make()
    publisher.start()
    fat = ask(publisher, 1, guardrail_results=noise(1500))
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


def test_no_broker_at_the_start_is_one_sentence(tmp_path: Path) -> None:
    """Nobody listens: BrokerAway names the address, no folder is left, begin says that nothing runs."""
    maker = Maker(KafkaConfig(bootstrap_servers="127.0.0.1:1"), tmp_path / "journal")
    publisher = maker(start_timeout_ms=500)
    with pytest.raises(BrokerAway, match=r"no Kafka at 127\.0\.0\.1:1 after"):
        publisher.start()
    assert folders(maker) == []
    with pytest.raises(Closed, match="not running"):
        ask(publisher, 1)


def test_the_health_record_is_written(make: Maker) -> None:
    """On the status topic, keyed by process: lag, drops, what the collector counts, how far guards have drifted."""
    publisher = make(status_ms=100)
    guard = ActingGuard()
    publisher.counters.guards = health = Health((guard,), lambda *_: None)
    for score in (0.1, 0.9):
        for _ in range(REFERENCE_SCORES):
            health.scored(guard, "input", score)
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
    assert last["guard_drift"] == health.told()["guard_drift"]
    assert last["guard_drift"]["injection/input"] > DRIFT_TOLD


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
