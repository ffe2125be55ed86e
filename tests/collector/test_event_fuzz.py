"""Whatever bytes come: the decoders raise their own errors only, quote nothing, and the record becomes a dead letter.

Seeded mutations of real records, and what hypothesis makes up. The short version runs with every test; `soak` is long.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.event import (
    EVENT_BYTES_MAX,
    SCHEMA_VERSION,
    AnyRecord,
    AuditEvent,
    BadEvent,
    Change,
    Checkpoint,
    GuardResult,
    Heartbeat,
    Hello,
    decode,
    decode_all,
    encode,
    from_timestamp_us,
)

CANARY: Final = "zq7canary"
"""In every text of every record: no message may hold it."""
SHORT, LONG = 3_000, 2_000_000


def _records() -> list[bytes]:
    common = {
        "schema_version": SCHEMA_VERSION,
        "event_id": CANARY,
        "timestamp": from_timestamp_us(1_767_000_000_123_456),
        "collector_id": CANARY,
        "boot": CANARY,
        "seq": 7,
    }
    guard = GuardResult(guard=CANARY, version="1", stage="input", decision="block", score=0.5, label=CANARY)
    event = AuditEvent(
        **common,  # type: ignore[arg-type]
        tenant=CANARY,
        session_id=CANARY,
        user_id=CANARY,
        prompt_hash=CANARY,
        model_version=CANARY,
        guardrail_results=[guard, guard],
        response_tokens=20,
        latency_ms=1.5,
        blocked=True,
        status="blocked_input",
        ttft_ms=0.25,
        minhash=CANARY * 9,
    )
    others = (
        Hello(**common),  # type: ignore[arg-type]
        Heartbeat(**common, guard_errors={CANARY: 3}),  # type: ignore[arg-type]
        Change(**common, subject=CANARY),  # type: ignore[arg-type]
        Checkpoint(**common, number=1, at_us=1, path=[CANARY]),  # type: ignore[arg-type]
    )
    return [encode(record) for record in (event, *others)]


BOMBS: Final[Sequence[bytes]] = (
    b"",
    b"null",
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b'{"kind":"hello","x":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    b"9" * 100_000,
    b"-1e999999",
    b'{"kind":"zq7canary"}',
    b'{"schema_version":"9999999999.zq7canary"}',
    b'{"schema_version":"2.zq7canary","kind":{}}',
    b'{"schema_version":2}',
    b'{"kind":"inference","kind":"hello"}',
    b'"\\ud800zq7canary"',
    b"\xed\xa0\x80zq7canary",
    b"\xff" * 1000,
    b"\x00" * 1000,
    b"\xef\xbb\xbf{}",
    b" " * (EVENT_BYTES_MAX + 1),
)
NUMBERS: Final = (
    b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1", b"9" * 400, b"1.0000000000000000001", b"18446744073709551616",
    b"0" * 300, b"null", b'"zq7canary"', b"[]", b"{}", b"true", b"1e-400",
)  # fmt: skip


def _other_value(raw: bytes, at: int, chance: random.Random) -> bytes:
    fields = raw.split(b":")
    field = at % len(fields)
    rest = fields[field].partition(b",")
    fields[field] = chance.choice(NUMBERS) + rest[1] + rest[2]
    return b":".join(fields)


Mutation = Callable[[bytes, int, random.Random], bytes]
MUTATIONS: Final[Sequence[Mutation]] = (
    lambda raw, at, chance: raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :],
    lambda raw, at, _: raw[:at],
    lambda raw, at, chance: raw[:at] + chance.randbytes(chance.randrange(1, 9)) + raw[at:],
    lambda raw, at, chance: raw[:at] + raw[chance.randrange(at, len(raw)) :],
    _other_value,
    # A key that comes twice; a surrogate without its other half; nests where a text is wanted.
    lambda raw, _, chance: raw[:-1] + b',"seq":' + chance.choice(NUMBERS) + b"}",
    lambda raw, _, chance: raw.replace(CANARY.encode(), chance.choice([b"\\udc00", b"\xed\xb0\x80", b"\\u0000"]), 1),
    lambda raw, at, _: raw.replace(b'"' + CANARY.encode() + b'"', b"[" * at + b"]" * at, 1),
)


def _mutated(raw: bytes, chance: random.Random) -> bytes:
    return chance.choice(MUTATIONS)(raw, chance.randrange(len(raw)), chance) or b"{"


def _inputs(rounds: int, seed: int) -> Iterator[bytes]:
    chance = random.Random(seed)  # noqa: S311  # repeatable, no secret
    records = _records()
    yield from BOMBS
    for _ in range(rounds):
        raw = chance.choice(records)
        for _ in range(chance.randrange(1, 4)):
            raw = _mutated(raw, chance)
        yield raw


def _decoded(raw: bytes) -> str:
    """The refusal's message; empty where the record was read, and then it can be written again."""
    try:
        record = decode(raw)
    except BadEvent as error:
        return f"{error!s} {error!r} {error.__cause__!r}"
    again = encode(record)
    assert encode(decode(again)) == again
    return ""


def test_many_at_once_are_read_as_one_by_one() -> None:
    """Whatever stands beside a mutated record in a batch: it is read, or refused in the same words."""
    seed = _seed()
    print("INFERWATCH_SEED =", seed)
    raws = list(_inputs(SHORT, seed))
    chance = random.Random(seed)  # noqa: S311  # repeatable, no secret
    first = 0
    while first < len(raws):
        batch = raws[first : first + chance.choice((1, 2, 7, 50))]
        first += len(batch)
        records, refused = decode_all(batch)
        singly = [_tried(raw) for raw in batch]
        assert records == [each for each in singly if not isinstance(each, str)]
        assert {index: str(error) for index, error in refused.items()} == {
            index: each for index, each in enumerate(singly) if isinstance(each, str)
        }


def _tried(raw: bytes) -> AnyRecord | str:
    try:
        return decode(raw)
    except BadEvent as error:
        return str(error)


def _check(raw: bytes, read: Callable[[bytes], str] = _decoded) -> bool:
    said = read(raw)
    assert CANARY not in said
    assert len(said) < 600
    return not said


def _seed() -> int:
    return int(os.environ.get("INFERWATCH_SEED") or int.from_bytes(os.urandom(4)))


def _fuzz(rounds: int) -> None:
    seed = _seed()
    print("INFERWATCH_SEED =", seed)
    taken = sum(_check(raw) for raw in _inputs(rounds, seed))
    assert rounds * 0.02 < taken < rounds * 0.8, f"{taken} of {rounds} were read: the mutations test little"


def test_mutated_records_raise_bad_event_and_quote_nothing() -> None:
    """Bit flips, cuts, bombs, huge numbers, NaN, doubled keys, surrogates: read, or BadEvent in words of our own."""
    _fuzz(SHORT)


@pytest.mark.soak
def test_two_million_mutated_records() -> None:
    """The same for longer."""
    _fuzz(LONG)


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_any_bytes(raw: bytes) -> None:
    """Bytes that hypothesis makes up."""
    _check(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(_records()), st.sampled_from(sorted(AuditEvent.__struct_fields__)), JSON)
@settings(max_examples=300)
def test_any_value_in_any_field(raw: bytes, field: str, value: object) -> None:
    """A real record with one field of another type or size."""
    record = msgspec.json.decode(raw)
    record[field] = value
    _check(msgspec.json.encode(record))
