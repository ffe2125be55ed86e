"""The two promises: the same log gives the same bytes, and another layout gives the same findings but for offsets."""

import random
from datetime import UTC, datetime

import msgspec
import pytest

from collector.event import SCHEMA_VERSION, Heartbeat, Hello, from_timestamp_us
from detectors import finding, rollup
from detectors.config import DetectConfig, LatencyConfig
from detectors.engine import BadSnapshot, PartitionEngine, PartitionMismatch, TenantEngine
from detectors.finding import Evidence, Finding
from detectors.rollup import Marker, Partial
from tests.sim.campaigns import DEMO, four_campaigns
from tests.sim.layout import Layout, Logged, lay_out
from tests.sim.pipe import run

CONFIG = DetectConfig(latency=LatencyConfig(window_s=5, min_calls=20))


def bare(findings: list[Finding]) -> list[Finding]:
    """Findings without their offsets: what promise (b) is about."""
    return [
        msgspec.structs.replace(each, evidence=Evidence(event_ids=each.evidence.event_ids, replay=each.evidence.replay))
        for each in findings
    ]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_the_same_log_gives_the_same_bytes_whatever_the_batches_and_restarts(seed: int) -> None:
    """Promise (a), on 1, 4 and 16 partitions; a restarted engine reads its last records once more."""
    print("seed", seed)
    for partitions in (1, 4, 16):
        layout = Layout(partitions=partitions, collectors=2, heartbeat_ms=1_000, seed=seed)
        logs = lay_out(four_campaigns(seed).events, layout)
        plain = [finding.encode(each) for each in run(logs, CONFIG, batch=10**6).findings]
        assert len(plain) >= 6
        for batch, restart in ((1, 0.001), (37, 0.05), (500, 0.5)):
            again = run(logs, CONFIG, batch=batch, seed=seed + batch, restart=restart).findings
            assert [finding.encode(each) for each in again] == plain, (partitions, batch)


@pytest.mark.parametrize("seed", range(4))
def test_another_layout_gives_the_same_findings_but_for_offsets(seed: int) -> None:
    """Promise (b): 1, 4 or 16 partitions, one to four collectors, an outage, other interleavings."""
    print("seed", seed)
    events = four_campaigns(seed).events
    wanted = bare(run(lay_out(events, Layout(partitions=1, seed=seed)), CONFIG).findings)
    assert len(wanted) >= 6
    for layout in (
        Layout(partitions=4, collectors=1, seed=seed + 1),
        Layout(partitions=16, collectors=3, heartbeat_ms=1_000, seed=seed + 2),
        Layout(partitions=4, collectors=4, outage_s=(20, 80), seed=seed + 3),
    ):
        out = run(lay_out(events, layout), CONFIG, batch=211, seed=seed)
        assert out.flags["late"] == 0
        assert bare(out.findings) == wanted, layout


def test_restarts_at_any_record_change_nothing() -> None:
    """Snapshot and restore after every single record of the attack."""
    logs = lay_out(four_campaigns(7, calm_s=30, which="b").events, Layout(partitions=2, heartbeat_ms=1_000))
    plain = [finding.encode(each) for each in run(logs, CONFIG).findings]
    again = [finding.encode(each) for each in run(logs, CONFIG, batch=1, restart=1.0).findings]
    assert again == plain


def test_a_partition_that_is_silent_holds_all_back_and_is_named() -> None:
    """T9: stage 2 waits for every marker, however long."""
    engine = TenantEngine(DetectConfig(), partition=0, partitions=3)
    assert engine.waiting_for == [0, 1, 2]
    engine.observe(Marker("iw.events", 0, 3, 100))
    engine.observe(Marker("iw.events", 2, 3, 50))
    assert (engine.closed_through, engine.waiting_for) == (None, [1])
    engine.observe(Marker("iw.events", 1, 3, 70))
    assert (engine.closed_through, engine.waiting_for) == (50, [2])


def test_a_marker_of_another_layout_is_refused() -> None:
    """T9: the number of partitions changes only by drain, switch, resume."""
    engine = TenantEngine(DetectConfig(), partition=0, partitions=4)
    with pytest.raises(PartitionMismatch, match="partition 1 of 8 came, but stage 2 reads 4"):
        engine.observe(Marker("iw.events", 1, 8, 1))


def test_rollups_written_twice_or_by_a_zombie_change_nothing() -> None:
    """T10: overwriting by (partition, second, kind, key); old markers and closed seconds are ignored."""
    logs = lay_out(four_campaigns(3, calm_s=30, which="b").events, Layout(partitions=2, heartbeat_ms=1_000))
    told = []
    for partition, log in enumerate(logs):
        engine = PartitionEngine(CONFIG, topic="iw.events", partition=partition, partitions=2)
        for logged in log:
            engine.observe(logged.record, append_ms=logged.append_ms, offset=logged.offset)
            told += engine.take()
    rng = random.Random(5)  # noqa: S311 seeded on purpose
    plain = TenantEngine(CONFIG, partition=0, partitions=2)
    noisy = TenantEngine(CONFIG, partition=0, partitions=2)
    for number, each in enumerate(told):
        plain.observe(each)
        noisy.observe(each)
        noisy.observe(told[rng.randrange(number + 1)])
    assert noisy.take() == plain.take()


def test_records_read_again_are_skipped() -> None:
    """Effectively once: an offset at or below the applied one says "replayed" and changes no state."""
    engine = PartitionEngine(DetectConfig(), topic="t", partition=0, partitions=1)
    log = _beats(5)
    for logged in log:
        engine.observe(logged.record, append_ms=logged.append_ms, offset=logged.offset)
    before = engine.snapshot()
    assert {engine.observe(each.record, append_ms=each.append_ms, offset=each.offset) for each in log} == {"replayed"}
    assert engine.snapshot() == before


def test_take_ends_with_a_marker_and_is_empty_where_nothing_closed() -> None:
    """One marker a take, however many seconds closed."""
    engine = PartitionEngine(DetectConfig(), topic="t", partition=3, partitions=8)
    assert engine.take() == []
    for logged in _beats(5):
        engine.observe(logged.record, append_ms=logged.append_ms, offset=logged.offset)
    assert engine.take() == [Marker("t", 3, 8, 1_800_000_003)]
    assert engine.take() == []


@pytest.mark.parametrize("raw", [b"", b"\x80", b"\xc1", b"\xff" * 40, b'{"version":1}'])
def test_a_damaged_snapshot_is_refused_in_one_sentence(raw: bytes) -> None:
    """Never pickle, never a traceback of the decoder."""
    with pytest.raises(BadSnapshot, match="no snapshot of stage 1"):
        PartitionEngine(DetectConfig(), topic="t", partition=0, partitions=1).restore(raw)
    with pytest.raises(BadSnapshot, match="no snapshot of stage 2"):
        TenantEngine(DetectConfig(), partition=0, partitions=1).restore(raw)


def test_a_snapshot_of_another_partition_is_refused() -> None:
    """State is never mixed up."""
    raw = PartitionEngine(DetectConfig(), topic="t", partition=0, partitions=4).snapshot()
    with pytest.raises(BadSnapshot, match="partition 0 of 4, wanted 1 of 4"):
        PartitionEngine(DetectConfig(), topic="t", partition=1, partitions=4).restore(raw)


def test_waiting_rollups_are_bounded() -> None:
    """At the limit the oldest second is judged with what is there, and counted."""
    logs = lay_out(four_campaigns(1, calm_s=60, which="").events, Layout(partitions=2, heartbeat_ms=1_000))
    engine = PartitionEngine(CONFIG, topic="t", partition=0, partitions=2)
    tenant = TenantEngine(DetectConfig(pending_rollups_max=100), partition=0, partitions=2)
    for logged in logs[0]:
        engine.observe(logged.record, append_ms=logged.append_ms, offset=logged.offset)
    for each in engine.take():
        tenant.observe(each)
    assert tenant.counters["waiting"] <= 100 < tenant.counters["waiting"] + tenant.counters["forced_seconds"] * 20
    assert tenant.counters["forced_seconds"] > 0


def test_a_switched_off_detector_says_nothing() -> None:
    """`enabled = false` in any sub-table."""
    config = DetectConfig.model_validate(
        {"block_rate": {"enabled": False}, "latency": {"window_s": 5, "min_calls": 20}}
    )
    out = run(lay_out(four_campaigns(1).events, Layout()), config)
    assert {each.detector for each in out.findings} == set(DEMO) - {"block_rate"}


def test_rollups_survive_their_wire() -> None:
    """encode then decode gives the same rollup, of each type."""
    logs = lay_out(four_campaigns(2, calm_s=20, which="br").events, Layout(partitions=1))
    engine = PartitionEngine(CONFIG, topic="t", partition=0, partitions=1)
    for logged in logs[0]:
        engine.observe(logged.record, append_ms=logged.append_ms, offset=logged.offset)
    told = engine.take()
    assert {type(each).__name__ for each in told} == {"Partial", "Signal", "Marker"}
    assert [rollup.decode(rollup.encode(each)) for each in told] == told


@pytest.mark.parametrize("raw", [b"", b"\x93\xa7partial", b"\xc1", b"{}", b"\x00" * 99])
def test_bytes_that_are_no_rollup_are_refused_without_being_quoted(raw: bytes) -> None:
    """BadRollup and nothing else."""
    with pytest.raises(rollup.BadRollup, match="no rollup of this version"):
        rollup.decode(raw)


@pytest.mark.parametrize("year", [1, 1969, 9999])
def test_a_timestamp_at_the_end_of_time_harms_nothing(year: int) -> None:
    """The first and the last date there is, blocked and long, before and after time has started."""
    moment = datetime(year, 12, 31, 23, 59, 59, tzinfo=UTC)
    traffic = four_campaigns(4, calm_s=70, which="brt")
    (log,) = lay_out(traffic.events, Layout(partitions=1, heartbeat_ms=1_000))
    for position in (5, 700):
        record = msgspec.structs.replace(log[position].record, timestamp=moment, seq=log[position].record.seq)
        log[position] = Logged(record, log[position].append_ms, log[position].offset)
    out = run([log], CONFIG, batch=50, restart=0.1)
    assert out.flags["late"] + out.flags["quarantined"] + out.flags["control"] > 0
    assert {each.detector for each in out.findings} >= {"block_rate", "probing", "token_length"}


def _beats(seconds: int) -> list[Logged]:
    records = []
    for seq in range(seconds):
        at_s = 1_800_000_000 + seq
        kind = Heartbeat if seq else Hello
        record = kind(
            schema_version=SCHEMA_VERSION,
            event_id=str(seq),
            timestamp=from_timestamp_us(at_s * 1_000_000),
            collector_id="c",
            boot="b",
            seq=seq,
        )
        records.append(Logged(record, at_s * 1_000, seq))
    return records


def test_a_rollup_that_makes_no_sense_stops_no_other_detector() -> None:
    """Whoever writes it to iw.rollups: it is counted, and what comes after it is judged."""
    engine = TenantEngine(CONFIG, partition=0, partitions=1)
    nonsense = Partial(0, 5, "acme", "block_rate", "m\ng", {}, {}, {}, [], [], 0, 0)
    for kind in ("block_rate", "latency", "token_length", "probing", "unheard_of"):
        engine.observe(msgspec.structs.replace(nonsense, kind=kind, key="m\n1.1"))
    engine.observe(Marker("iw.events", 0, 1, 10))
    assert (engine.closed_through, engine.take()) == (10, [])
    assert engine.counters["failed_judgements"] == 3
