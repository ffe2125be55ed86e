"""The outage of the design: four collectors, the broker away for ten minutes, journals that drain at unlike speeds."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import pytest

from collector.event import encode
from collector.kafka import KafkaConfig
from detectors.config import DetectConfig
from streams.stage1 import stage1
from streams.stage2 import stage2
from tests.sim.answer import Answer, undisturbed
from tests.sim.layout import Layout, lay_out
from tests.sim.logs import Record
from tests.sim.mutations import MUTATIONS, planted
from tests.sim.traffic import Traffic

CONFIG = DetectConfig()
MINUTES = 30
AWAY_S = (600, 1_200)
NAIVE = {mutation.name: mutation for mutation in MUTATIONS}["time-out by event time"]


@lru_cache(maxsize=2)
def _logs(partitions: int, away: bool) -> Sequence[Sequence[Record]]:
    traffic = Traffic(1, rate=6.0)
    traffic.calm(0, 60 * MINUTES)
    traffic.block_burst(900, 20)
    layout = Layout(partitions, 4, 1_000, AWAY_S if away else None, (8, 4, 2, 16), idle_s=60)
    return [
        [Record(partition, each.offset, each.append_ms, encode(each.record)) for each in log]
        for partition, log in enumerate(lay_out(traffic.events, layout))
    ]


def _late(logs: Sequence[Sequence[Record]]) -> tuple[int, int]:
    """(events taken, events late)."""
    stage = stage1(KafkaConfig(), CONFIG, len(logs), 1)
    counters: Counter[str] = Counter()
    for partition, log in enumerate(logs):
        shard = stage.make_shard(partition)
        shard.observe(log)
        counters.update(shard.counters())
    return counters["taken"], counters["late"]


def _answer(logs: Sequence[Sequence[Record]]) -> Answer:
    first, second = (stage1(KafkaConfig(), CONFIG, len(logs), 1), stage2(KafkaConfig(), CONFIG, len(logs), 1, 1))
    return undisturbed(first, second, 1, logs)


@pytest.mark.parametrize("partitions", [1, 4])
def test_no_event_is_late_after_ten_minutes_without_a_broker(partitions: int) -> None:
    """None of the events is late, on one partition or on four."""
    taken, late = _late(_logs(partitions, away=True))
    print(f"{partitions} partitions: {taken} taken, {late} late")
    assert late == 0
    assert taken > 10_000


def test_the_findings_are_those_of_a_broker_that_stayed() -> None:
    """Ten minutes away, four partitions: the same findings but for offsets as on one partition without an outage."""
    away, stayed = _answer(_logs(4, away=True)).bare(), _answer(_logs(1, away=False)).bare()
    assert away == stayed
    assert away


def test_a_time_out_in_event_time_would_make_thousands_late() -> None:
    """The naive rule on the same log: a slow journal's lane is taken for dead, and what it then tells is late."""
    with planted(NAIVE):
        taken, late = _late(_logs(4, away=True))
    print(f"naive rule: {taken} taken, {late} late")
    assert late > 1_000
