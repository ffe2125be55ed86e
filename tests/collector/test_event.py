"""The audit event: its wire format does not change under anyone's feet, and bad bytes are only ever BadEvent."""

import itertools
import json
import multiprocessing as mp
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector import event as events
from collector.event import (
    Adapter,
    AnyRecord,
    AuditEvent,
    BadEvent,
    Change,
    Checkpoint,
    Ended,
    Goodbye,
    GuardResult,
    Heartbeat,
    Hello,
    Integrity,
    NewerSchema,
    Rejection,
    Tick,
    decode,
    encode,
    from_timestamp_us,
    timestamp_us,
)
from collector.uuid7 import uuid7

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests/golden/events"
CANARY = "canary-7f3a91"
STAMP: dict[str, Any] = {
    "schema_version": "1.0",
    "event_id": "019a0000-0000-7000-8000-000000000001",
    "timestamp": from_timestamp_us(1_760_000_000_123_456),
    "collector_id": "host-1",
    "boot": "019a0000-0000-7000-8000-0000000000b0",
    "seq": 7,
    "chain": "f" * 64,
}
REQUEST: dict[str, Any] = {
    "tenant": "default",
    "session_id": "s_" + "5" * 32,
    "user_id": "u_" + "1" * 32,
    "prompt_hash": "hmac:" + "a" * 64,
    "model_version": "tiny-llama@0123abc",
    "http_request_id": "019a0000-0000-7000-8000-0000000000f0",
    "route": "/v1/chat/completions",
    "operation": "chat",
    "key_id": "key_01",
    "api_key": "k_" + "2" * 32,
    "client_address": "a_" + "3" * 32,
    "key_epoch": "e_0a1b2c3d",
}
RECORDS: dict[str, AnyRecord] = {
    "inference": AuditEvent(
        **STAMP,
        **REQUEST,
        guardrail_results=[
            GuardResult(
                guard="ngrams", version="1", stage="input", decision="allow", score=0.25, label="", latency_ms=0.5
            ),
            GuardResult(guard="secrets", version="2", stage="output", decision="error", error="TimeoutError"),
        ],
        response_tokens=42,
        latency_ms=180.5,
        blocked=False,
        status="ok",
        http_status=200,
        finish_reason="stop",
        prompt_tokens=12,
        max_tokens=64,
        ttft_ms=20.25,
        queue_ms=0.5,
        ms_per_output_token=3.75,
        stream=True,
        n=3,
        adapter=Adapter(name="support", digest="sha256:" + "d" * 64),
        weights_digest="sha256:" + "e" * 64,
        turn_hash="hmac:" + "b" * 64,
        system_hash="hmac:" + "c" * 64,
        minhash="AAAA" * 85 + "AA==",
        view="messages",
        trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
        tokens_from="usage",
        released_chars=300,
        chunks_removed=2,
    ),
    "rejection": Rejection(
        **STAMP,
        **REQUEST,
        guardrail_results=[],
        response_tokens=0,
        latency_ms=0.125,
        blocked=True,
        status="rejected",
        http_status=401,
        reason="unknown key",
    ),
    "hello": Hello(
        **STAMP,
        model_version="tiny-llama@0123abc",
        inferwatch_version="0.1.0",
        config_digest="0123456789ab",
        clock_offset_ms=-1.5,
        ended=[Ended(boot="019a0000-0000-7000-8000-0000000000a0", root="9" * 64, at_us=1_760_000_000_000_000)],
    ),
    "heartbeat": Heartbeat(
        **STAMP,
        engine_requests=10,
        events=9,
        rejections=2,
        in_flight=1,
        dropped=3,
        journal_bytes=4096,
        guard_errors={"ngrams": 1},
        engine_finished=11,
        unaudited=1,
        canaries_failed={"ngrams": 2},
        guards_unhealthy=["ngrams"],
        guard_scores={"ngrams/input": [7, 0, 0, 0, 0, 1, 0, 0, 0, 2]},
        guard_drift={"ngrams/input": 0.25},
    ),
    "goodbye": Goodbye(**STAMP, reason="recovered"),
    "checkpoint": Checkpoint(
        **STAMP,
        number=3,
        at_us=1_760_000_000_123_000,
        first=2,
        next=6,
        records=3,
        beats=1,
        head="a" * 64,
        beat_head="b" * 64,
        tree="c" * 64,
        hints="AAAAAAEBAQECAgIC",
        lane=1,
        lanes=4,
        path=["d" * 64, "e" * 64],
        root="0" * 64,
        previous="1" * 64,
        key_id="sk_0123456789abcdef",
        signature="2" * 128,
    ),
    "tick": Tick(**STAMP),
    "change": Change(**STAMP, tenant="default", subject="model", before="a@1", after="a@2"),
    "integrity": Integrity(
        **STAMP, tenant="default", problem="event too large", subject_id=STAMP["event_id"], size_bytes=300_000
    ),
}


def _kinds() -> set[str]:
    schema = json.loads((ROOT / "docs/event.schema.json").read_text())
    return set(schema["discriminator"]["mapping"])


def test_every_kind_has_a_golden_record() -> None:
    """The table above, the golden files of this version, and the published schema name the same kinds."""
    files = {path.name for path in GOLDEN.glob("*-1.0.json")}
    assert files == {f"{kind}-1.0.json" for kind in RECORDS}
    assert _kinds() == set(RECORDS)


@pytest.mark.parametrize("kind", RECORDS)
def test_what_is_written_is_the_golden_file(kind: str) -> None:
    """Each kind encodes to the bytes of its golden file and back; a change here is a change of the wire format."""
    raw = (GOLDEN / f"{kind}-1.0.json").read_bytes().rstrip(b"\n")
    assert encode(RECORDS[kind]) == raw
    assert decode(raw) == RECORDS[kind]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.name)
def test_every_golden_file_ever_written_is_readable(path: Path) -> None:
    """Golden files of older versions stay in the folder, and stay readable."""
    record = decode(path.read_bytes())
    assert record.event_id == STAMP["event_id"]


@pytest.mark.parametrize("kind", RECORDS)
def test_unknown_fields_are_ignored(kind: str) -> None:
    """A newer minor version may add fields; older readers pass over them."""
    raw = json.loads(encode(RECORDS[kind])) | {"schema_version": "1.7", "field_of_1_7": {"deep": [1, 2]}}
    expected = msgspec.structs.replace(RECORDS[kind], schema_version="1.7")
    assert decode(json.dumps(raw).encode()) == expected


@pytest.mark.parametrize(
    "changed", [{}, {"kind": "hologram"}, {"seq": "seven"}], ids=["same shape", "new kind", "field"]
)
def test_a_newer_major_is_refused_by_name(changed: dict[str, object]) -> None:
    """NewerSchema says to update, whatever else the newer major changed."""
    raw = json.dumps(json.loads(encode(RECORDS["tick"])) | {"schema_version": "2.0"} | changed).encode()
    with pytest.raises(NewerSchema, match="schema version 2 is newer than 1"):
        decode(raw)


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": CANARY},
        {"seq": CANARY},
        {"seq": -1},
        {"status": CANARY},
        {"user_id": CANARY * 10},
        {"timestamp": CANARY},
        {"timestamp": "2025-10-09T08:53:20"},
        {"latency_ms": -1},
        {"guardrail_results": [{"guard": "g", "version": "1", "stage": CANARY, "decision": "allow"}]},
        {CANARY: 1, "n": CANARY},
    ],
)
def test_a_bad_field_is_named_and_never_quoted(changed: dict[str, object]) -> None:
    """The message says where, and holds nothing of the record."""
    raw = json.dumps(json.loads(encode(RECORDS["inference"])) | changed).encode()
    with pytest.raises(BadEvent) as caught:
        decode(raw)
    assert CANARY not in str(caught.value)
    assert caught.value.__cause__ is None
    assert "at `$" in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_arbitrary_bytes_raise_bad_event_only(raw: bytes) -> None:
    """Nothing but BadEvent escapes."""
    with pytest.raises(BadEvent):
        decode(raw)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(RECORDS)), st.data())
def test_mangled_records_raise_bad_event_only(kind: str, data: st.DataObject) -> None:
    """A record cut, or with bytes put in, decodes to a record or raises BadEvent."""
    raw = bytearray(encode(RECORDS[kind]))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    try:
        decode(bytes(raw))
    except BadEvent:
        return


def test_deep_nesting_raises_bad_event() -> None:
    """A nest deeper than the stack is refused as any other bad record."""
    with pytest.raises(BadEvent):
        decode(b'{"kind":' + b"[" * 200_000)


@given(st.integers(-62_000_000_000_000_000, 250_000_000_000_000_000))
def test_timestamps_are_exact_microseconds(value_us: int) -> None:
    """Conversion and the wire keep every microsecond."""
    moment = from_timestamp_us(value_us)
    assert timestamp_us(moment) == value_us
    tick = msgspec.structs.replace(RECORDS["tick"], timestamp=moment)
    assert decode(encode(tick)) == tick


def test_event_ids_are_uuid7_and_sort_by_time() -> None:
    """Version 7, variant 2, the milliseconds in front."""
    clocks = (itertools.repeat(ms * 1_000_000) for ms in (1, 2, 1_760_000_000_000))
    ids = [uuid7(clock.__next__, lambda: b"\xff" * 10) for clock in clocks]
    assert ids == sorted(ids)
    assert ids[2] == "0199c82c-c000-7fff-bfff-ffffffffffff"
    assert len({uuid7() for _ in range(1000)}) == 1000


def test_a_forked_process_draws_other_ids() -> None:
    """Randomness is drawn ahead for many ids; what the parent has drawn is not the child's too."""
    uuid7()
    with mp.get_context("fork").Pool(1) as child:
        theirs = child.apply(_ids)
    assert not set(theirs) & set(_ids())


def _ids() -> list[str]:
    return [uuid7(lambda: 0) for _ in range(200)]


def test_the_published_schema_is_this_schema() -> None:
    """docs/event.schema.json is current. If not: python -m collector.event > docs/event.schema.json"""
    assert json.loads((ROOT / "docs/event.schema.json").read_text()) == json.loads(json.dumps(events.json_schema()))


@pytest.mark.parametrize("kind", RECORDS)
def test_golden_records_pass_the_published_schema(kind: str) -> None:
    """Readers in other languages can go by the schema."""
    schema = json.loads((ROOT / "docs/event.schema.json").read_text())
    jsonschema.validate(json.loads(encode(RECORDS[kind])), schema)


def test_the_event_loads_msgspec_only() -> None:
    """Any process may read events cheaply: beside msgspec, and what that loads, only the standard library is loaded."""

    def loaded(module: str) -> set[str]:
        program = f"import sys; import {module}; print(*{{m.partition('.')[0] for m in sys.modules}})"
        said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        return set(said.stdout.split()) - sys.stdlib_module_names

    assert loaded("collector.event") - loaded("msgspec.json") == {"collector"}
