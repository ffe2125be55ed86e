"""coverage beyond the lanes: inference that nobody audited, and the collector's own test request."""

import json

import msgspec
import numpy as np
import pytest

from collector.event import AuditEvent, Heartbeat, encode
from detectors import finding, rollup
from detectors.coverage import LANES_TOLD_MAX
from detectors.engine import PartitionEngine
from detectors.finding import Finding
from tests.detectors.test_demo import CONFIG
from tests.sim.layout import Layout, Logged, lay_out
from tests.sim.pipe import run
from tests.sim.traffic import Traffic


def logs_with(counts: list[int], partitions: int = 2) -> list[list[Logged]]:
    """A calm half minute; each lane's heartbeats carry these counts of unaudited inference in turn, then the last."""
    traffic = Traffic(5)
    traffic.calm(0, 30)
    logs = lay_out(traffic.events, Layout(partitions=partitions, heartbeat_ms=1_000))
    for log in logs:
        beat = 0
        for place, logged in enumerate(log):
            if isinstance(logged.record, Heartbeat):
                count = counts[min(beat, len(counts) - 1)]
                log[place] = Logged(
                    msgspec.structs.replace(logged.record, unaudited=count), logged.append_ms, logged.offset
                )
                beat += 1
    return logs


def told(findings: list[Finding]) -> list[tuple[str, str, int]]:
    """State, summary and count of each finding of coverage."""
    return [(each.state, each.summary, each.counts["records"]) for each in findings if each.detector == "coverage"]


def test_unaudited_inference_is_one_finding_though_every_lane_carries_the_count() -> None:
    """The number is the collector's: one request and two more are one high finding of two revisions."""
    findings = run(logs_with([0, 0, 0, 1, 1, 3]), CONFIG).findings
    mine = [each for each in findings if each.detector == "coverage"]
    assert {each.uid for each in mine} == {mine[0].uid}
    assert (mine[0].severity, mine[0].tenant, mine[0].entity.kind) == ("high", "platform", "collector")
    assert mine[0].summary == "The engine behind lane c0/b0/0 finished 1 request that nobody audited"
    assert [each.counts["records"] for each in mine[:2]] == [1, 2]


def test_a_guard_that_fails_on_known_texts_is_a_finding() -> None:
    """Each canary that failed counts once, whatever lanes carry the number, beside unaudited inference."""
    logs = logs_with([0, 0, 0, 1])
    for log in logs:
        for place, logged in enumerate(log):
            if isinstance(logged.record, Heartbeat) and logged.record.unaudited:
                beat = msgspec.structs.replace(logged.record, canaries_failed={"injection": 2, "secrets": 1})
                log[place] = Logged(beat, logged.append_ms, logged.offset)
    found = {
        (each.severity, each.summary)
        for each in run(logs, CONFIG).findings
        if each.detector == "coverage" and each.revision == 1
    }
    assert found == {
        ("high", "The engine behind lane c0/b0/0 finished 1 request that nobody audited"),
        ("high", "A guard of lane c0/b0/0 failed on 3 texts whose answer is known"),
    }


def test_made_up_collectors_make_no_flood_of_findings_and_hide_no_hole() -> None:
    """Twenty new names a second for two minutes, all quarantined: as many findings as may be named and one more; the
    expected collector's hole is told by its name."""
    config = CONFIG.model_copy(update={"time": CONFIG.time.model_copy(update={"collectors": ("c0",)})})
    traffic = Traffic(5)
    traffic.calm(0, 120)
    (log,) = lay_out(traffic.events, Layout(partitions=1, heartbeat_ms=1_000))
    kept = [logged for logged in log if logged.record.seq not in (700, 701)]
    flooded: list[Logged] = []
    for logged in kept:
        strangers = 20 if isinstance(logged.record, Heartbeat) else 0
        for number in range(strangers):
            stranger = msgspec.structs.replace(logged.record, collector_id=f"x{len(flooded)}-{number}")
            flooded.append(Logged(stranger, logged.append_ms, len(flooded)))
        flooded.append(Logged(logged.record, logged.append_ms, len(flooded)))
    found = run([flooded], config).findings
    assert len({each.uid for each in found}) == LANES_TOLD_MAX + 2
    assert "(other lanes)/0#quarantined" in {each.entity.id for each in found}
    assert "2 records missing from lane c0/b0/0: the audit has a gap" in {each.summary for each in found}


def test_an_engine_that_is_audited_whole_is_no_finding() -> None:
    """Zero in every heartbeat says nothing."""
    assert told(run(logs_with([0]), CONFIG).findings) == []


@pytest.mark.parametrize(("batch", "restart"), [(1, 0.05), (7, 0.2), (10**6, 0.0)])
def test_the_finding_is_the_same_whatever_the_cut(batch: int, restart: float) -> None:
    """Batches and restarts change no byte of it."""
    logs = logs_with([0, 2, 2, 2, 5, 5, 9])
    plain = [finding.encode(each) for each in run(logs, CONFIG, batch=10**6).findings]
    assert [
        finding.encode(each) for each in run(logs, CONFIG, batch=batch, seed=batch, restart=restart).findings
    ] == plain


def test_the_log_read_in_pieces_gives_the_same_rollups() -> None:
    """Raw bytes a thousand at a time, as deployed, or record by record: the rollups are the same bytes."""
    (log,) = logs_with([0, 2, 2, 2, 5, 5, 9], partitions=1)
    for place in range(3, len(log), 50):
        record = log[place].record
        if isinstance(record, AuditEvent):
            tested = msgspec.structs.replace(record, operation="selftest")
            log[place] = Logged(tested, log[place].append_ms, log[place].offset)
    slow, quick = (PartitionEngine(CONFIG, topic="iw.events", partition=0, partitions=1) for _ in range(2))
    for logged in log:
        slow.observe(logged.record, append_ms=logged.append_ms, offset=logged.offset)
    raws = [encode(logged.record) for logged in log]
    quick.observe_log(raws, np.array([each.append_ms for each in log]), np.array([each.offset for each in log]))
    one, other = ([rollup.encode(each) for each in engine.take()] for engine in (slow, quick))
    assert one == other
    assert any(b"#unaudited" in raw for raw in one)


def test_the_collectors_own_test_request_is_given_to_no_detector() -> None:
    """A self-test has its place in the lane; the findings are those of the same log with it told as nobody's."""
    traffic = Traffic(7)
    traffic.calm(0, 60)
    for number in range(40):
        traffic.one(61 + number / 4, 500, 40, 32, 0, blocked=True, session=number)
    layout = Layout(partitions=1, heartbeat_ms=1_000)
    blocked = {event.event_id for event in traffic.events if event.blocked}
    (log,) = lay_out(traffic.events, layout)
    assert any(each.detector != "coverage" for each in run([log], CONFIG).findings)
    for place, logged in enumerate(log):
        record = logged.record
        if isinstance(record, AuditEvent) and record.event_id in blocked:
            log[place] = Logged(msgspec.structs.replace(record, operation="selftest"), logged.append_ms, logged.offset)
    for batch in (1, 500):
        assert [json.loads(finding.encode(each)) for each in run([log], CONFIG, batch=batch).findings] == []
