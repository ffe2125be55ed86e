"""The time rules T4 to T8 as tests: what becomes of a record, and which seconds close."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from collector.event import SCHEMA_VERSION, AnyRecord, AuditEvent, Goodbye, Heartbeat, Hello, Tick, from_timestamp_us
from detectors.config import DetectConfig, TimeConfig
from detectors.time import NEVER, PartitionClock
from tests.sim.layout import Layout, lay_out
from tests.sim.pipe import run
from tests.sim.traffic import Traffic

T0_S = 1_800_000_000


class Log:
    """A clock under test and its growing log; times are seconds after T0."""

    def __init__(self, config: TimeConfig | None = None) -> None:
        self.clock = PartitionClock(config or TimeConfig())
        self.offsets: Iterator[int] = count()
        self.seqs: dict[str, int] = {}
        self.waiting: list[tuple[int, str]] = []

    def put(
        self, kind: type[AnyRecord], at_s: float, append_s: float | None = None, lane: str = "c0", skip: int = 0
    ) -> str:
        """Appends a record of the lane, its `seq` the next one plus `skip`."""
        seq = self.seqs.get(lane, -1) + 1 + skip
        self.seqs[lane] = max(seq, self.seqs.get(lane, -1))
        fields: dict[str, Any] = {}
        if kind is AuditEvent:
            fields = {"tenant": "acme", "session_id": "", "user_id": "u_1", "prompt_hash": "", "model_version": "m"}
            fields |= {
                "guardrail_results": [],
                "response_tokens": 1,
                "latency_ms": 1.0,
                "blocked": False,
                "status": "ok",
            }
        record = kind(
            schema_version=SCHEMA_VERSION,
            event_id=f"{lane}-{seq}",
            timestamp=from_timestamp_us(int((T0_S + at_s) * 1e6)),
            collector_id=lane,
            boot="b",
            seq=seq,
            **fields,
        )
        append_ms = int((T0_S + (at_s if append_s is None else append_s)) * 1000)
        flag = self.clock.observe(record, append_ms=append_ms, offset=next(self.offsets))
        if flag == "taken":
            self.waiting.append((int(at_s // 1), record.event_id))
        return flag

    def closed(self) -> list[tuple[int, list[str]]]:
        """Seconds after T0 that were closed since the last call and have events, and the ids of these."""
        through = self.clock.state.closed_through
        due = [row for row in self.waiting if through is not None and row[0] + T0_S <= through]
        self.waiting = [row for row in self.waiting if row not in due]
        assert sum(self.clock.state.pending.values()) == self.clock.state.pending_count == len(self.waiting)
        return [(second, [name for at, name in due if at == second]) for second in sorted({at for at, _ in due})]

    def troubles(self) -> list[tuple[str, str, int]]:
        return [(trouble.problem, trouble.collector_id, trouble.lost) for trouble in self.clock.troubles()]

    @property
    def watermark_s(self) -> float:
        return self.clock.watermark_us / 1e6 - T0_S


def test_a_second_closes_when_the_least_promise_has_passed_it() -> None:
    """T8: second s closes when W >= s + 1, and not before."""
    log = Log()
    log.put(Hello, 0)
    assert log.put(AuditEvent, 0.5) == "taken"
    log.put(Heartbeat, 0.999999)
    assert log.closed() == []
    log.put(Heartbeat, 1.0)
    assert log.closed() == [(0, ["c0-1"])]


def test_a_lane_that_lags_holds_time_back_until_it_says_goodbye() -> None:
    """T5, T6: W is the least promise of the live lanes."""
    log = Log()
    log.put(Hello, 0, lane="slow")
    log.put(Hello, 0, lane="fast")
    log.put(AuditEvent, 3, lane="fast")
    assert log.watermark_s == 0
    log.put(Goodbye, 3, lane="slow")
    assert log.watermark_s == 3


def test_a_lane_dies_after_sixty_seconds_of_the_partitions_clock() -> None:
    """T5: 60 s of A without a moved promise, no sooner; the next record revives it."""
    log = Log()
    log.put(Hello, 0, lane="dead")
    for second in range(61):
        log.put(Heartbeat if second else Hello, second, lane="alive")
    assert log.watermark_s == 0
    log.put(Heartbeat, 60.5, lane="alive")
    assert log.watermark_s == 60.5
    log.put(Heartbeat, 58, append_s=61, lane="dead")
    log.put(Heartbeat, 65, lane="alive")
    assert log.watermark_s == 60.5, "the revived lane holds time back again, and W never goes back"


def test_an_outage_is_not_silence() -> None:
    """T4: a gap in append times adds at most 5 s, so ten minutes without a broker kill no lane."""
    log = Log()
    log.put(Hello, 0, lane="c0")
    log.put(Hello, 0, lane="c1")
    log.put(Heartbeat, 600, lane="c0")
    assert log.watermark_s == 0
    assert log.put(AuditEvent, 1, append_s=600, lane="c1") == "taken"


def test_a_broker_clock_that_goes_back_adds_nothing() -> None:
    """T4: gaps are at least 0."""
    log = Log()
    log.put(Hello, 10)
    log.put(Heartbeat, 11, append_s=5)
    log.put(Heartbeat, 12, append_s=11)
    assert log.clock.state.clock_ms == 1_000


def test_a_repeated_record_is_dropped_and_a_hole_is_told() -> None:
    """T7: seq <= last is a duplicate; a jump in seq is taken and told with how many are missing."""
    log = Log()
    log.put(Hello, 0)
    assert log.put(AuditEvent, 0.1) == "taken"
    assert log.put(AuditEvent, 0.1, skip=-1) == "duplicate"
    assert log.put(AuditEvent, 0.2, skip=7) == "taken"
    assert log.troubles() == [("hole", "c0", 7)]


def test_a_late_event_is_told_and_never_reaches_the_detectors() -> None:
    """T7: its second is already closed."""
    log = Log()
    log.put(Hello, 0, lane="c0")
    log.put(Heartbeat, 5, lane="c0")
    log.put(Hello, 5, lane="c1")
    assert log.put(AuditEvent, 3, append_s=5, lane="c1") == "late"
    log.put(Heartbeat, 9, lane="c0")
    log.put(Heartbeat, 9, lane="c1")
    assert (log.closed(), log.troubles()) == ([], [("late", "c1", 1)])


def test_a_clock_two_hours_ahead_is_quarantined_and_the_hundred_good_events_after_it_are_taken() -> None:
    """T7: it moves no promise and counts as silence."""
    log = Log()
    log.put(Hello, 0)
    assert log.put(AuditEvent, 7_200, append_s=0.1) == "quarantined"
    assert [log.put(AuditEvent, 0.2 + 0.01 * number) for number in range(100)] == ["taken"] * 100
    log.put(Heartbeat, 2)
    assert [(second, len(ids)) for second, ids in log.closed()] == [(0, 80), (1, 20)]
    assert log.troubles() == [("quarantined", "c0", 1)]


def test_sixty_seconds_ahead_is_still_taken() -> None:
    """T7: the limit itself is allowed."""
    log = Log()
    log.put(Hello, 0)
    assert log.put(AuditEvent, 60, append_s=0) == "taken"
    assert log.put(AuditEvent, 60.000001, append_s=0) == "quarantined"


def test_a_lane_whose_hello_is_quarantined_does_not_hold_time_back() -> None:
    """A hostile clock is no reason to stop."""
    log = Log()
    log.put(Hello, 0, lane="good")
    log.put(Hello, 7_200, append_s=0.1, lane="ahead")
    log.put(Heartbeat, 5, lane="good")
    assert log.watermark_s == 5


def test_ticks_move_time_where_no_lane_lives() -> None:
    """T6: with no live lane W is the last tick less 5 s; with one, ticks say nothing."""
    log = Log()
    log.put(Hello, 0)
    log.put(AuditEvent, 1)
    log.put(Tick, 20, lane="reader")
    assert log.watermark_s == 1
    log.put(Goodbye, 21)
    assert (log.watermark_s, log.closed()) == (15, [(1, ["c0-1"])])
    log.put(Tick, 30, lane="reader")
    assert log.watermark_s == 25


def test_twelve_ticks_bury_a_lane_that_died_without_goodbye() -> None:
    """T4, T5: ticks let the clock grow, so an idle partition goes on."""
    log = Log()
    log.put(Hello, 0)
    for number in range(1, 13):
        log.put(Tick, 5 * number, lane="reader")
    assert log.watermark_s == 0
    log.put(Tick, 65, lane="reader")
    assert log.watermark_s == 60


def test_a_ticks_own_clock_is_not_believed() -> None:
    """A reader with a clock years ahead moves nothing: the append time counts."""
    log = Log()
    log.put(Tick, 10**6, append_s=10, lane="reader")
    assert log.watermark_s == 5


def test_a_collector_that_is_not_expected_is_quarantined() -> None:
    """T5: with a list in the config only these count, and a stranger holds nothing back."""
    log = Log(TimeConfig(collectors=("c0",)))
    log.put(Hello, 0)
    assert log.put(Hello, 0, lane="stranger") == "quarantined"
    log.put(Heartbeat, 4)
    assert (log.watermark_s, log.troubles()) == (4, [("quarantined", "stranger", 1)])


def test_lanes_are_bounded_and_the_living_keep_their_place() -> None:
    """At the limit the longest dead lane makes room; with none dead the newcomer is quarantined."""
    log = Log(TimeConfig(lanes_max=2))
    log.put(Hello, 0, lane="a")
    log.put(Hello, 0, lane="b")
    assert log.put(Hello, 1, lane="c") == "quarantined"
    log.put(Goodbye, 2, lane="a")
    assert log.put(Hello, 3, lane="c", skip=-1) == "control"
    assert sorted(name.partition("\n")[0] for name in log.clock.state.lanes) == ["b", "c"]


def test_waiting_events_are_bounded() -> None:
    """At the limit the oldest second closes early, which is counted."""
    log = Log(TimeConfig(pending_events_max=100))
    log.put(Hello, 0, lane="stuck")
    log.put(Hello, 0, lane="c0")
    for number in range(101):
        log.put(AuditEvent, number * 0.05)
    assert [(second, len(ids)) for second, ids in log.closed()] == [(0, 20)]
    assert log.clock.counters["forced_seconds"] == 1


def test_nothing_closes_before_the_first_promise() -> None:
    """An empty partition knows no time."""
    clock = PartitionClock(TimeConfig())
    assert (clock.watermark_us, clock.state.closed_through, clock.troubles()) == (NEVER, None, [])


@pytest.mark.parametrize("moment_us", [-(10**15), 0, 10**15])
def test_hostile_timestamps_close_without_counting_through_the_years(moment_us: int) -> None:
    """A jump over decades is one step, not a billion."""
    log = Log()
    log.put(Hello, moment_us / 1e6 - T0_S, append_s=moment_us / 1e6 - T0_S)
    log.put(Heartbeat, 0)
    assert log.watermark_s == 0


@pytest.mark.parametrize("partitions", [1, 4])
def test_ten_minutes_without_a_broker_make_nothing_late(partitions: int) -> None:
    """Four collectors, the broker away for ten minutes, journals draining at 24, 12, 6 and 48 records a second."""
    traffic = Traffic(seed=1, rate=8.0)
    traffic.calm(0, 1_500)
    layout = Layout(partitions=partitions, collectors=4, heartbeat_ms=1_000, outage_s=(400, 1_000), seed=1)
    out = run(lay_out(traffic.events, layout), DetectConfig(enabled=False), batch=997)
    assert (out.flags["taken"], out.flags["late"], out.flags["duplicate"]) == (len(traffic.events), 0, 0)
