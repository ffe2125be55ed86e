"""Batches and contiguous delivery, without a broker."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from faust.types import TP
from hypothesis import given
from hypothesis import strategies as st

from streams.batch import Sequencer
from streams.transport import BatchScheduler


@dataclass
class _Record:
    offset: int
    timestamp: int = 0
    timestamp_type: int = 1


def _records(first: int, last: int) -> list[_Record]:
    return [_Record(offset) for offset in range(first, last + 1)]


def _offsets(records: Sequence[_Record] | None) -> list[int] | None:
    return None if records is None else [record.offset for record in records]


def test_repeats_are_trimmed_and_holes_refused() -> None:
    """What was applied is left out, what comes too early is refused until the missing part has come."""
    sequence = Sequencer(10)
    said = [
        _offsets(sequence.accept(_records(*chunk)))
        for chunk in [(8, 9), (8, 11), (14, 16), (12, 13), (12, 16), (10, 12)]
    ]
    assert said == [[], [10, 11], None, [12, 13], [14, 15, 16], []]
    assert (sequence.next, sequence.repeats, sequence.holes) == (17, 2 + 2 + 2 + 3, 1)


@given(st.integers(0, 2**32))
def test_a_lossy_path_is_mended(seed: int) -> None:
    """Whatever chunks are dropped, doubled or cut by the fetch path, each record is applied once, in order."""
    chance = random.Random(seed)  # noqa: S311  # repeatable, no secret
    sequence, log, applied, at = Sequencer(0), 200, [], 0
    for _ in range(5000):
        if sequence.next >= log:
            break
        if at >= log:
            at = sequence.next  # the worker reads again what should have come
        last = min(at + chance.randrange(1, 30), log) - 1
        chunk = _records(at, last)
        fate = chance.random()
        at = last + 1
        if fate < 0.2:
            continue  # dropped
        for _ in range(2 if fate < 0.4 else 1):
            fresh = sequence.accept(chunk)
            if fresh is None:
                at = sequence.next
                break
            applied += [record.offset for record in fresh]
        if chance.random() < 0.1:
            at = chance.randrange(0, log)  # a rebalance seeks anywhere
    assert applied == list(range(log)), f"seed {seed}"


def test_only_the_batch_topic_is_folded() -> None:
    """Records of the source come as batches of a bounded size; changelog records come one by one."""
    source, other = TP("events", 0), TP("changelog", 1)
    handed = list(BatchScheduler("events", 4).iterate({source: _records(5, 14), other: _records(0, 1)}))
    assert [_offsets(batch.records) for tp, batch in handed if tp == source] == [
        [5, 6, 7, 8],
        [9, 10, 11, 12],
        [13, 14],
    ]
    assert [batch.offset for tp, batch in handed if tp == source] == [8, 12, 14]
    assert [record.offset for tp, record in handed if tp == other] == [0, 1]
