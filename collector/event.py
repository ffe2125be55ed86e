"""The audit event: the one record that the collector writes and that everything else reads.

Every record on `iw.events` is one of the structs below, told apart by `kind`, encoded as JSON. Foundation of all rooms:
this file loads msgspec and nothing else of ours or of others, so that any process may read events cheaply.

Compatibility: readers ignore unknown fields of the same major `schema_version`; a newer major raises `NewerSchema`, an
unknown kind or a field out of its bounds raises `BadEvent`. Neither message ever quotes the record: undecodable bytes
may hold text.
"""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

SCHEMA_VERSION: Final = "1.0"
SCHEMA_MAJOR: Final = 1
EVENT_BYTES_MAX: Final = 256 * 1024
"""Largest encoded record; `iw.events` is created with the same `max.message.bytes`."""

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

Name = Annotated[str, Meta(max_length=256)]
"""A label of ours or of the operator's: a model, a route, a guard. Never the client's text."""
Pseudonym = Annotated[str, Meta(max_length=64)]
"""A keyed digest, `PREFIX_HEX`: u_ user, s_ session, k_ API key, a_ address. Empty where the client gave nothing."""
Digest = Annotated[str, Meta(max_length=80)]
"""`hmac:HEX` (HMAC-SHA-256 under the tenant's key) or `sha256:HEX`. Empty where there was nothing to hash."""
Hash = Annotated[str, Meta(max_length=64)]
"""A SHA-256 of the chain (`collector.chain`), 64 hexadecimal digits."""
Count = Annotated[int, Meta(ge=0, le=2**53)]
Milliseconds = Annotated[float, Meta(ge=0, le=1e10)]

Status = Literal["ok", "blocked_input", "blocked_output", "rejected", "aborted", "error", "lost"]
Stage = Literal["input", "retrieved", "tool", "output"]
Decision = Literal["allow", "block", "shadow", "error"]
"""`shadow`: the guard would have blocked but only watches. `error`: it failed; policy decided what happened then."""


class BadEvent(ValueError):
    """The bytes are no record of a kind and shape known here. The message names the field, never its value."""


class NewerSchema(BadEvent):
    """The record is of a newer major schema version than this reader."""


class GuardResult(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One guard's verdict on one text."""

    guard: Name
    version: Name
    stage: Stage
    decision: Decision
    score: Annotated[float, Meta(ge=0, le=1)] = 0.0
    label: Name = ""
    latency_ms: Milliseconds = 0.0
    error: Name = ""
    """The class of the error, never its message: a message may quote the text that was judged."""


class Adapter(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The LoRA adapter that answered."""

    name: Name
    digest: Digest = ""


class Media(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """An image, sound or film in a prompt: never its bytes, which no text guard can read."""

    kind: Literal["image", "audio", "video", "file", "embeds"]
    source: Literal["inline", "url", "cached", "engine"] = "inline"
    """Where the bytes came from: the body, an address, the server's cache, or only the engine saw them."""
    digest: Digest = ""
    """Over the bytes where they are inline, else over the address or the engine's own digest."""
    size_bytes: Count = 0
    """0 where the bytes were not in the body."""


class Record(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag_field="kind"):
    """What every record carries.

    A *lane* is (collector_id, boot, Kafka partition). `seq` is contiguous per lane, from 0 at its `hello`, and the
    record promises that nothing with an earlier `timestamp` follows in its lane.
    """

    schema_version: Annotated[str, Meta(max_length=16)]
    event_id: Annotated[str, Meta(max_length=36)]
    """UUIDv7, minted by the collector."""
    timestamp: Annotated[datetime, Meta(tz=True)]
    """When the request was closed (answered, refused, aborted), UTC. Its start is `timestamp - latency_ms`."""
    collector_id: Name
    boot: Name
    seq: Count
    chain: Hash = ""
    """The hash of the lane's record before: of the heartbeat before in a heartbeat, of the last other one elsewhere."""


class AuditEvent(Record, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag="inference"):
    """One engine request as the client meant it: n = 3 is one, a list of four prompts is four."""

    tenant: Name
    session_id: Pseudonym
    user_id: Pseudonym
    prompt_hash: Digest
    """Over the whole input as the engine reads it."""
    model_version: Name
    """Model name and weight revision, `NAME@REVISION`."""
    guardrail_results: Annotated[list[GuardResult], Meta(max_length=64)]
    response_tokens: Count
    latency_ms: Milliseconds
    blocked: bool
    status: Status

    http_request_id: Annotated[str, Meta(max_length=36)] = ""
    route: Name = ""
    operation: Name = ""
    """chat, completion, embedding, …"""
    http_status: Annotated[int, Meta(ge=0, le=599)] = 0
    finish_reason: Name = ""
    reason: Name = ""
    """Why it was refused, aborted or failed: a fixed word, never a message."""
    prompt_tokens: Count = 0
    max_tokens: Count = 0
    ttft_ms: Milliseconds | None = None
    queue_ms: Milliseconds | None = None
    ms_per_output_token: Milliseconds | None = None
    stream: bool = False
    n: Annotated[int, Meta(ge=0, le=65536)] = 1
    adapter: Adapter | None = None
    media: Annotated[list[Media], Meta(max_length=64)] = []
    """The first 64 of `media_count`."""
    media_count: Count = 0
    weights_digest: Digest = ""
    key_id: Name = ""
    api_key: Pseudonym = ""
    client_address: Pseudonym = ""
    turn_hash: Digest = ""
    """Over what is new in this request: the last user turn and tool or retrieved text after it."""
    system_hash: Digest = ""
    minhash: Annotated[str, Meta(max_length=1024)] = ""
    """Keyed MinHash of the same text as `turn_hash`: base64 of little-endian uint32, 64 of them. Empty: no text."""
    view: Literal["messages", "rendered", ""] = ""
    """Whether the gate saw messages, or only the rendered prompt was at hand."""
    key_epoch: Name = ""
    trace_id: Annotated[str, Meta(max_length=32)] = ""
    """The W3C trace id that the client sent: where its spans and ours meet."""
    tokens_from: Literal["usage", "chunks", "shared", "unknown", ""] = ""
    """Who counted the tokens; empty: the engine. Behind a proxy: the upstream's `usage`, else the `chunks` of its
    stream; `shared`: its usage of several prompts, shared out over their events; `unknown`: it told none."""
    released_chars: Count = 0
    """Of a blocked answer: characters that had left, judged and passed, before the block."""
    chunks_removed: Count = 0
    """Documents, tool results and marked spans that a guard took out of the request; the rest of it went on."""


class Rejection(AuditEvent, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag="rejection"):
    """A request refused before the engine saw it: `status` is `rejected`, `reason` and `http_status` say why."""


class Ended(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A boot that ended before this one began: what its last checkpoint signed, so that it can't vanish whole."""

    boot: Name
    root: Hash
    at_us: Count


class Hello(Record, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag="hello"):
    """Opens a lane."""

    model_version: Name = ""
    inferwatch_version: Name = ""
    config_digest: Digest = ""
    clock_offset_ms: float = 0.0
    """The collector's clock minus the broker's append time, measured before the lanes were opened."""
    ended: Annotated[list[Ended], Meta(max_length=64)] = []
    """Boots of the same journal folder that ended and that no hello has named yet."""


class Heartbeat(Record, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag="heartbeat"):
    """A lane with nothing to say keeps its promise moving; the counters are the collector's, not the lane's."""

    engine_requests: Count = 0
    events: Count = 0
    rejections: Count = 0
    in_flight: Count = 0
    dropped: Count = 0
    journal_bytes: Count = 0
    guard_errors: dict[Name, Count] = {}
    engine_finished: Count = 0
    """What the engine's own statistics count as finished; n choices are n."""
    unaudited: Count = 0
    """Of those the ones that never passed the wrapper: each is an inference without an event."""
    canaries_failed: dict[Name, Count] = {}
    """By guard: known attacks that it missed, and harmless texts that it blocked, of those it is given by the clock."""
    guards_unhealthy: Annotated[list[Name], Meta(max_length=64)] = []
    """Guards whose last round of them failed."""
    guard_scores: dict[Name, list[Count]] = {}
    """By `GUARD/STAGE`: how many texts had a score in each tenth of [0, 1] so far; what failed or was left out by
    sampling is not counted."""
    guard_drift: dict[Name, Annotated[float, Meta(ge=0, le=1e6)]] = {}
    """By `GUARD/STAGE`: how far its last scores lie from its reference, as a population stability index."""


class Goodbye(Record, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag="goodbye"):
    """Closes a lane: nothing follows."""

    reason: Literal["stopped", "recovered"] = "stopped"
    """`recovered`: the boot died; its journal was sent by a later one."""


class Checkpoint(Record, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag="checkpoint"):
    """Signs where all lanes of one boot stand; each lane gets a copy with its own part (`collector.chain`)."""

    number: Count
    """Of this boot, from 1."""
    at_us: Count
    final: bool = False
    """The boot ends: only goodbyes follow."""
    first: Count = 0
    """The part covers the lane's records from this `seq` …"""
    next: Count = 0
    """… to before this one."""
    records: Count = 0
    """How many of them are no heartbeats: the leaves of `tree`, in order."""
    beats: Count = 0
    head: Hash = ""
    """The hash of the last of them that is no heartbeat."""
    beat_head: Hash = ""
    tree: Hash = ""
    """Merkle root over their hashes."""
    hints: Annotated[str, Meta(max_length=131_072)] = ""
    """The first 4 bytes of each of these hashes, base64: which record was changed can be told even if all later ones
    were hashed anew."""
    lane: Count = 0
    """The part's place among `lanes`, which are in order of partition."""
    lanes: Count = 0
    path: Annotated[list[Hash], Meta(max_length=32)] = []
    """From the part to `root`."""
    root: Hash = ""
    previous: Hash = ""
    """The root of the boot's checkpoint before."""
    key_id: Name = ""
    """Of the signing key; empty where there is none."""
    signature: Name = ""
    """Ed25519, hexadecimal."""


class Tick(Record, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag="tick"):
    """Written by the reader of a partition idle for 5 s, so that time goes on where no collector lives."""


class Change(Record, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag="change"):
    """Something that changes what is normal: a model, adapter, guard, template, key or config."""

    tenant: Name = ""
    subject: Name
    before: Name = ""
    after: Name = ""
    public_key: Name = ""
    """Of a new signing key, hexadecimal; with it the signatures of the key before and of the new one."""
    signed_before: Name = ""
    signed_after: Name = ""


class Integrity(Record, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag="integrity"):
    """The collector tells on itself: a record too large to send, a refused batch, a journal that was damaged."""

    tenant: Name = ""
    problem: Name
    subject_id: Annotated[str, Meta(max_length=36)] = ""
    subject_hash: Hash = ""
    """The hash of the record whose place this one takes, where the chain goes on from that."""
    size_bytes: Count = 0


AnyRecord = AuditEvent | Rejection | Hello | Heartbeat | Goodbye | Checkpoint | Tick | Change | Integrity

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyRecord] = msgspec.json.Decoder(AnyRecord)


class _Version(Struct):
    schema_version: str = ""


_version_decoder = msgspec.json.Decoder(_Version)


def encode(record: AnyRecord) -> bytes:
    """The record as one JSON object, UTF-8, no newline."""
    return _encoder.encode(record)


def decode(raw: bytes) -> AnyRecord:
    """The record in `raw`.

    Raises `NewerSchema` for a newer major version, `BadEvent` for anything else that is no known record. About 1 µs.
    """
    try:
        record = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _refusal(raw, error) from None
    if record.schema_version != SCHEMA_VERSION and _major(record.schema_version) > SCHEMA_MAJOR:
        raise _newer(record.schema_version)
    return record


def decode_all(raws: Sequence[bytes]) -> tuple[list[AnyRecord], dict[int, BadEvent]]:
    """What `decode` gives for each of `raws`, in less time; by index what it raises, those being left out."""
    decode_one = _decoder.decode
    try:
        records = [decode_one(raw) for raw in raws]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    else:
        if [record.schema_version for record in records].count(SCHEMA_VERSION) == len(records):
            return records, {}
    tried = [_tried(raw) for raw in raws]
    bad = {index: each for index, each in enumerate(tried) if isinstance(each, BadEvent)}
    return [each for each in tried if not isinstance(each, BadEvent)], bad


def _tried(raw: bytes) -> AnyRecord | BadEvent:
    try:
        return decode(raw)
    except BadEvent as refusal:
        return refusal


def _refusal(raw: bytes, error: Exception) -> BadEvent:
    """The reason why `raw` is no record. A newer schema explains an odd shape, so it is looked for first."""
    try:
        version = _version_decoder.decode(raw).schema_version
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        version = ""
    if _major(version) > SCHEMA_MAJOR:
        return _newer(version)
    where = str(error).rpartition(" - at ")[2] if " - at " in str(error) else "the top level"
    return BadEvent(f"no audit record of schema {SCHEMA_MAJOR}.x: {type(error).__name__} at {where}")


def _newer(version: str) -> NewerSchema:
    major = _major(version)
    return NewerSchema(f"schema version {major} is newer than {SCHEMA_MAJOR}, the newest read here: update inferwatch")


def _major(version: str) -> int:
    head = version.partition(".")[0]
    return int(head) if head.isascii() and head.isdigit() and len(head) < 10 else 0


def timestamp_us(moment: datetime) -> int:
    """Microseconds since the epoch, exactly."""
    return (moment - EPOCH) // _MICROSECOND


def from_timestamp_us(value_us: int) -> datetime:
    """The inverse of `timestamp_us`."""
    return EPOCH + timedelta(microseconds=value_us)


def json_schema() -> dict[str, object]:
    """The JSON Schema of the wire format, as published: `python -m collector.event > docs/event.schema.json`."""
    return msgspec.json.schema(AnyRecord)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=2, sort_keys=True) + "\n")
