"""Any log, cut anyhow: judged by runs and columns, or record by record, the answer is the same."""

import random
from dataclasses import replace
from datetime import timedelta

import msgspec
import numpy as np
import pytest

from collector.event import AuditEvent, Heartbeat, Hello, Rejection, encode
from detectors import rollup
from detectors.config import DetectConfig
from detectors.engine import PartitionEngine
from detectors.rollup import Marker, Rollup
from tests.sim.campaigns import four_campaigns
from tests.sim.layout import Layout, Logged, lay_out
from tests.sim.traffic import Traffic

CONFIG = DetectConfig.model_validate({"time": {"pending_events_max": 400, "lanes_max": 12, "silence_max_ms": 20_000}})


def engine(config: DetectConfig = CONFIG) -> PartitionEngine:
    return PartitionEngine(config, topic="iw.events", partition=0, partitions=1)


def troubled(log: list[Logged], rng: random.Random) -> list[Logged]:
    """Records lost, doubled, late, ahead of time, of made-up lanes, with odd names; append times that stand still."""
    found: list[Logged] = []
    for logged in log:
        chance = rng.random()
        record, append_ms = logged.record, logged.append_ms
        if chance < 0.01:
            continue
        if chance < 0.02:
            record = msgspec.structs.replace(record, timestamp=record.timestamp - timedelta(seconds=rng.randrange(30)))
        elif chance < 0.03:
            record = msgspec.structs.replace(record, timestamp=record.timestamp + timedelta(seconds=rng.randrange(99)))
        elif chance < 0.04:
            record = msgspec.structs.replace(record, boot=f"made-up-{rng.randrange(20)}\n")
        elif chance < 0.05:
            append_ms += rng.randrange(-9_000, 9_000)
        found += [replace(logged, record=record, append_ms=append_ms)] * (2 if 0.05 < chance < 0.06 else 1)
    return [replace(logged, offset=offset) for offset, logged in enumerate(found)]


def one_by_one(log: list[Logged], config: DetectConfig) -> tuple[list[bytes], dict[str, int], object]:
    reader = engine(config)
    told: list[Rollup] = []
    for logged in log:
        reader.observe(logged.record, append_ms=logged.append_ms, offset=logged.offset)
        told += reader.take()
    return written(told), reader.counters, msgspec.msgpack.decode(reader.snapshot())


def cut(log: list[Logged], sizes: list[int], config: DetectConfig) -> tuple[list[bytes], dict[str, int], object]:
    """By `observe_log`, in batches of these sizes in turn, each with a repetition of the last three before."""
    reader = engine(config)
    told: list[Rollup] = []
    begin = turn = 0
    while begin < len(log):
        end = begin + sizes[turn % len(sizes)]
        batch = log[max(begin - 3, 0) : end]
        refused = reader.observe_log(
            [encode(logged.record) for logged in batch],
            np.array([logged.append_ms for logged in batch], np.int64),
            np.array([logged.offset for logged in batch], np.int64),
        )
        assert refused == []
        told += reader.take()
        if turn % 5 == 4:
            raw = reader.snapshot()
            reader = engine(config)
            reader.restore(raw)
        begin, turn = end, turn + 1
    return written(told), reader.counters, msgspec.msgpack.decode(reader.snapshot())


def written(told: list[Rollup]) -> list[bytes]:
    """Without markers, which follow the batches."""
    return sorted(rollup.encode(each) for each in told if not isinstance(each, Marker))


@pytest.mark.parametrize("seed", range(6))
def test_runs_say_what_single_records_say(seed: int) -> None:
    """One to four collectors, an outage, and in half of the logs every kind of trouble."""
    print("seed", seed)
    rng = random.Random(seed)  # noqa: S311 seeded on purpose
    layout = Layout(partitions=1, collectors=1 + seed % 4, outage_s=(20, 60) if seed % 3 == 1 else None, seed=seed)
    (log,) = lay_out(four_campaigns(seed).events, layout)
    log = troubled(log, rng) if seed % 2 else log
    wanted = one_by_one(log, CONFIG)
    assert len(wanted[0]) > 100
    for sizes in ([1], [7, 300, 2], [10**6]):
        assert cut(log, sizes, CONFIG) == wanted, sizes


def test_a_full_registry_forgets_alike_in_any_cut() -> None:
    """More users than fit: decided a second at a time, so batches change nothing; suspects stay longest."""
    config = DetectConfig.model_validate({"entities_max": 100})
    traffic = Traffic(3, rate=40, users=2_000, block_rate=0.05)
    traffic.calm(0, 120)
    (log,) = lay_out(traffic.events, Layout(partitions=1, heartbeat_ms=1_000))
    wanted = one_by_one(log, config)
    assert wanted[1]["entities.evicted"] > 100
    for sizes in ([500], [13, 1_000], [10**6]):
        assert cut(log, sizes, config) == wanted


def test_rejections_are_read_again_as_any_event_is() -> None:
    """Refused requests, blocked ones among them, in the same microsecond as others: in order, judged, nothing fails."""
    traffic = Traffic(6, rate=40, users=5, block_rate=0.5)
    traffic.calm(0, 30)
    (log,) = lay_out(traffic.events, Layout(partitions=1, heartbeat_ms=1_000))
    mixed = []
    for number, logged in enumerate(log):
        record = logged.record
        if type(record) is AuditEvent:
            record = msgspec.structs.replace(record, timestamp=record.timestamp.replace(microsecond=0))
            if number % 3 == 0:
                fields = {name: getattr(record, name) for name in record.__struct_fields__}
                record = Rejection(**fields)
        mixed.append(replace(logged, record=record))
    wanted = one_by_one(mixed, CONFIG)
    assert any(isinstance(logged.record, Rejection) for logged in mixed)
    assert not any("failed" in name for name in wanted[1])
    for sizes in ([7, 100], [10**6]):
        assert cut(mixed, sizes, CONFIG) == wanted


def test_what_is_no_record_is_refused_by_index_and_the_rest_is_taken() -> None:
    """A broken record among good ones, in the first and in a later piece."""
    traffic = Traffic(4, rate=50)
    traffic.calm(0, 60)
    (log,) = lay_out(traffic.events, Layout(partitions=1))
    raws = [encode(logged.record) for logged in log]
    broken = [0, 5, 1_500]
    for index in broken:
        raws.insert(index, b'{"kind":"inference"}')
    times = np.full(len(raws), log[-1].append_ms, np.int64)
    reader, plain = engine(), engine()
    refused = reader.observe_log(raws, times, np.arange(len(raws)))
    assert [index for index, _ in refused] == broken
    assert all("no audit record" in why for _, why in refused)
    plain.observe_log([encode(logged.record) for logged in log], times[3:], np.arange(len(log)))
    assert reader.counters == plain.counters


def test_a_run_over_a_lane_that_may_die_is_judged_record_by_record() -> None:
    """A silent lane is buried within the run, at the record that buries it."""

    def record(kind: type[Hello] | type[Heartbeat], lane: str, seq: int, at_s: int) -> Logged:
        moment = Traffic(0)
        moment.one(at_s, 1, 10, 10, 1)
        fields = {"schema_version": "1.0", "event_id": f"{lane}{seq}", "timestamp": moment.events[0].timestamp}
        made = kind(**fields, collector_id=lane, boot="b", seq=seq)  # type: ignore[arg-type]
        return Logged(made, int(made.timestamp.timestamp() * 1_000), 0)

    log = [record(Hello, "dead", 0, 0)] + [record(Hello if n == 0 else Heartbeat, "live", n, n) for n in range(40)]
    log = [replace(logged, offset=offset) for offset, logged in enumerate(log)]
    assert cut(log, [10**6], CONFIG) == one_by_one(log, CONFIG)
    reader = engine()
    reader.observe_log([encode(each.record) for each in log], np.array([each.append_ms for each in log]), np.arange(41))
    assert reader.watermark_us > log[30].append_ms * 1_000
