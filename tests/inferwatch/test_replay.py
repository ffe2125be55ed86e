"""The replayed day: repeatable, in order, and shaped like what a collector publishes."""

from collections import defaultdict

from collector.event import AuditEvent, Goodbye, Hello, decode, encode, timestamp_us
from inferwatch.replay import DAY_S, SECOND_US, records

END_US = 1_795_200_000 * SECOND_US


def test_the_same_seed_gives_the_same_bytes() -> None:
    """Byte for byte, whenever it is run."""
    first = [(p, key, encode(record)) for p, key, record in records(7, END_US, 4)]
    again = [(p, key, encode(record)) for p, key, record in records(7, END_US, 4)]
    other = [(p, key, encode(record)) for p, key, record in records(8, END_US, 4)]
    assert first == again
    assert first != other


def test_lanes_are_contiguous_and_their_time_never_goes_back() -> None:
    """Each lane opens with hello, closes with goodbye, counts without a hole, and keeps its promise."""
    lanes = defaultdict(list)
    for partition, _, record in records(1, END_US, 4):
        lanes[partition].append(record)
    assert sorted(lanes) == [0, 1, 2, 3]
    for lane in lanes.values():
        assert isinstance(lane[0], Hello)
        assert isinstance(lane[-1], Goodbye)
        assert [record.seq for record in lane] == list(range(len(lane)))
        times = [record.timestamp for record in lane]
        assert times == sorted(times)


def test_events_are_sound_and_within_the_day() -> None:
    """Every record decodes to itself, event ids are unique, a user stays in one partition."""
    events, homes = [], defaultdict(set)
    for partition, _, record in records(3, END_US, 4):
        assert decode(encode(record)) == record
        if isinstance(record, AuditEvent):
            events.append(record)
            homes[record.user_id].add(partition)
    assert len({event.event_id for event in events}) == len(events) > 15_000
    assert all(len(partitions) == 1 for partitions in homes.values())
    first, last = min(e.timestamp for e in events), max(e.timestamp for e in events)
    assert END_US - DAY_S * SECOND_US <= timestamp_us(first) <= timestamp_us(last) <= END_US
