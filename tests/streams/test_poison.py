"""Every kind of record that a stage can't use is refused with its reason; none stops the stage, and none is quoted.

The road from there over iw.deadletter is shown in test_stages.py on a real broker.
"""

import random
from collections.abc import Sequence
from contextlib import suppress

import msgspec
import pytest

from collector.event import EVENT_BYTES_MAX, Hello, encode
from collector.kafka import ConsumerRecord, KafkaConfig
from detectors import rollup as rollups
from detectors.config import DetectConfig
from detectors.rollup import Marker, Partial
from streams.deadletter import letter, read_letter
from streams.stage1 import stage1
from streams.stage2 import stage2
from tests.collector.test_event_fuzz import CANARY, _inputs, _seed
from tests.streams.traffic import Collector

AT_US = 1_767_000_000_000_000
SHAPE = "no audit record of schema 1.x: "


def _record(value: bytes | None, offset: int = 0) -> ConsumerRecord[bytes, bytes]:
    headers: Sequence[tuple[str, bytes]] = ()
    return ConsumerRecord("iw.events", 0, offset, AT_US // 1000, 1, b"", value, None, 0, 0, headers)


def _event(**changed: object) -> bytes:
    """A good event, but for `changed`."""
    made = encode(Collector(1, at_us=AT_US).event("user")[1])
    return msgspec.json.encode(msgspec.json.decode(made) | changed)


def _hello() -> bytes:
    return encode(next(Collector(1, at_us=AT_US).control(Hello))[1])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "the record has no value"),
        (b"", SHAPE + "DecodeError at the top level"),
        (b"zq7canary", SHAPE + "DecodeError at the top level"),
        (_hello()[:-7], SHAPE + "DecodeError at the top level"),
        (b" " * EVENT_BYTES_MAX + _hello(), "over the 262144 allowed"),
        (_event(schema_version="2.0"), "schema version 2 is newer than 1, the newest read here: update inferwatch"),
        (_event(schema_version="2.0", latency_ms="zq7canary"), "schema version 2 is newer than 1"),
        (_event(kind="zq7canary"), SHAPE + "ValidationError at `$.kind`"),
        (_event(latency_ms="zq7canary"), SHAPE + "ValidationError at `$.latency_ms`"),
        (_event(latency_ms=-1.0), SHAPE + "ValidationError at `$.latency_ms`"),
        (_event(response_tokens=2**53 + 1), SHAPE + "ValidationError at `$.response_tokens`"),
        (_event(seq=-1), SHAPE + "ValidationError at `$.seq`"),
        (_event(status="zq7canary"), SHAPE + "ValidationError at `$.status`"),
        (_event(timestamp="2026-01-01T00:00:00"), SHAPE + "ValidationError at `$.timestamp`"),
        (_event(timestamp="zq7canary"), SHAPE + "ValidationError at `$.timestamp`"),
        (_event(user_id="u" * 65), SHAPE + "ValidationError at `$.user_id`"),
        (_event(guardrail_results=[{}] * 65), SHAPE + "ValidationError at `$.guardrail_results"),
    ],
)
def test_a_poison_event_has_its_reason(value: bytes | None, reason: str) -> None:
    """Undecodable, cut, oversized, newer, of another shape, out of range: one reason each, which names the field."""
    shard = stage1(KafkaConfig(), DetectConfig(), 1, 1).make_shard(0)
    good = [_record(_hello(), 0), _record(value, 1), _record(_event(seq=1), 2)]
    ((refused, why),) = shard.observe(good)
    assert (refused.offset, reason in why, CANARY in why) == (1, True, False), why
    assert (shard.counters()["taken"], shard.counters()["control"]) == (1, 1)
    told = read_letter(letter(refused, why, "stage1"))
    assert (told.place, told.reason, told.size_bytes) == ("iw.events-0-1", why, len(value or b""))


def test_no_mutation_stops_stage_one() -> None:
    """Mutated records between good ones: refused or judged, and the state can be stored after each of them."""
    seed = _seed()
    print("INFERWATCH_SEED =", seed)
    shard = stage1(KafkaConfig(), DetectConfig(), 1, 1).make_shard(0)
    refused = 0
    for offset, raw in enumerate(_inputs(1500, seed)):
        for record, reason in shard.observe([_record(raw, offset)]):
            assert CANARY not in reason
            assert read_letter(letter(record, reason, "stage1")).offset == offset
            refused += 1
    shard.take()
    again = stage1(KafkaConfig(), DetectConfig(), 1, 1).make_shard(0)
    again.restore(shard.snapshot())
    assert again.counters() == shard.counters()
    assert refused > 300


def _rollups() -> list[bytes]:
    partial = Partial(
        0, AT_US // 1_000_000, CANARY, "block_rate", CANARY, {"requests": 3}, {"latency": {4: 3}},
        {"users": {CANARY: 3}}, [], [(AT_US, CANARY)], 1, 9,
    )  # fmt: skip
    return [rollups.encode(partial), rollups.encode(Marker(CANARY, 0, 1, AT_US // 1_000_000))]


def test_mutated_rollups_raise_bad_rollup_and_quote_nothing() -> None:
    """Whatever bytes come on iw.rollups: a rollup, or BadRollup in words of our own, and stage 2 goes on."""
    seed = _seed()
    print("INFERWATCH_SEED =", seed)
    chance = random.Random(seed)  # noqa: S311  # repeatable, no secret
    shard = stage2(KafkaConfig(), DetectConfig(), 1, 1, 1).make_shard(0)
    good, refused = _rollups(), 0
    bombs = [b"\x91" * 200_000, b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"", b"\xc1", b"\x93\xc0\xc0\xc0"]
    for round_number in range(3000):
        raw = bytearray(chance.choice(good))
        for _ in range(chance.randrange(1, 4)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        value = bombs[round_number] if round_number < len(bombs) else bytes(raw[: chance.randrange(1, len(raw) + 40)])
        with suppress(rollups.BadRollup):
            rollups.decode(value)
            continue
        ((_, reason),) = shard.observe([_record(value, round_number)])
        assert reason.startswith("no rollup of this version: ")
        assert CANARY not in reason
        refused += 1
    assert refused > 1000
    assert shard.observe([_record(raw) for raw in good]) == []
    assert shard.counters()["seconds"] == 1
