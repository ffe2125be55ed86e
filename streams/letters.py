"""Dead letters read back, and sent again where they can be used by now: `inferwatch deadletter list|show|replay`.

A replay appends the record to the partition it came from, at the end. Nothing is rewritten, so the time rules judge it
as what it is: a record that comes after its time. `Outcome.effect` says what each kind of record then leads to.

Guarantee: a letter is not replayed twice unless asked for. Each replay first writes a note beside the letter and reads
the notes back; the first one on the log has the letter. Where a replay dies between its note and its end, the next one
says so instead of sending again. Memory: `LETTERS_MAX` letters and the notes on the topic.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, Literal, NamedTuple

import msgspec
from msgspec import Struct

from collector.event import EVENT_BYTES_MAX, BadEvent
from collector.event import decode as decode_event
from collector.kafka import (
    RECORD_OVERHEAD_BYTES,
    BatchWriter,
    BrokerAway,
    ConsumerRecord,
    KafkaConfig,
    TopicPartition,
    make_consumer,
    make_producer,
    partition_for,
    read_topic,
)
from collector.sealing import Seal
from collector.topics import TopicName
from collector.uuid7 import uuid7
from detectors.rollup import BadRollup
from detectors.rollup import decode as decode_rollup
from streams.deadletter import Letter, Unusable, appended_at, letter_seal, read_letter, unseal
from streams.output import RECORD_BYTES_MAX
from streams.storing import finding_of

LETTERS_MAX: Final = 1000
"""Letters listed or replayed by one command."""
LOOK_AHEAD_MAX: Final = 200_000
"""Records after a letter's place that are searched for its lane."""
DUPLICATE: Final = "a duplicate to the time rules, as its lane went on: stored with that mark, no detector sees it"
LATE: Final = "judged if its second is still open; else late: stored with that mark, no detector sees it"
RESENT: Final = "delivered again to every sink and stored; a receiver knows it by uid and revision"
ROLLED_UP: Final = "stage 2 takes it while its second is open, else counts it as late"


class Note(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a replay leaves on iw.deadletter, under the letter's key."""

    replay: Literal["begun", "done"]
    id: str
    place: str
    to_offset: int = -1


class Found(NamedTuple):
    """A letter, with what became of it."""

    letter: Letter
    written: str
    """When the letter was taken by the broker, ISO 8601."""
    notes: tuple[Note, ...]

    @property
    def state(self) -> str:
        """`dead`, `replayed`, or `replay begun`: then nobody knows whether it was sent."""
        if not self.notes:
            return "dead"
        return "replayed" if any(note.replay == "done" for note in self.notes) else "replay begun"


class Outcome(NamedTuple):
    """What a replay did with one letter."""

    place: str
    done: bool
    to_offset: int | None
    effect: str
    """What the record leads to, or why it was not sent."""


class _Lane(Struct, frozen=True):
    collector_id: str = ""
    boot: str = ""
    seq: int = -1


class _Usable(NamedTuple):
    found: Found
    key: bytes
    raw: bytes
    effect: str


_encoder = msgspec.json.Encoder()
_note_decoder = msgspec.json.Decoder(Note)
_lane_decoder = msgspec.json.Decoder(_Lane)


def _no_filter(_letter: Letter) -> bool:
    return True


async def find(
    kafka: KafkaConfig, wanted: Callable[[Letter], bool] = _no_filter, limit: int = LETTERS_MAX
) -> list[Found]:
    """The newest `limit` letters that are `wanted`, newest first. Reads the whole topic. Raises KafkaError."""
    newest: dict[tuple[str, str], tuple[int, int, Letter]] = {}
    notes: dict[str, list[Note]] = {}
    async for record in read_topic(kafka, "deadletter"):
        note = _note_of(record.value or b"")
        if note is not None:
            notes.setdefault(note.place, []).append(note)
            continue
        try:
            told = read_letter(record.value or b"")
        except Unusable:
            continue  # somebody else's record is not this reader's trouble
        if wanted(told):
            newest[told.place, told.by] = (record.timestamp, record.offset, told)
        if len(newest) > 2 * limit:
            newest = dict(sorted(newest.items(), key=_age, reverse=True)[:limit])
    kept = sorted(newest.items(), key=_age, reverse=True)[:limit]
    return [Found(told, appended_at(written_ms), tuple(notes.get(told.place, ()))) for _, (written_ms, _, told) in kept]


def _age(item: tuple[tuple[str, str], tuple[int, int, Letter]]) -> tuple[int, int]:
    return item[1][:2]


def _note_of(raw: bytes) -> Note | None:
    try:
        return _note_decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


async def content(kafka: KafkaConfig, told: Letter, seal: Seal | None) -> tuple[bytes, bytes]:
    """(key, value) of the record that a letter tells of: from its place while the topic keeps it, else unsealed.

    Raises Unusable where neither gives the whole record, or KafkaError.
    """
    if _name(kafka, told) is None:
        raise Unusable("only events, rollups and findings are read back and sent again")
    record = await _kept(kafka, told)
    if record is not None:
        return record.key or b"", record.value or b""
    if told.truncated:
        raise Unusable("its topic keeps it no longer, and of a record over 64 KiB only the beginning was sealed")
    if not told.sealed:
        raise Unusable("its topic keeps it no longer, and it was not sealed: set kafka.deadletter_key_file")
    if seal is None:
        raise Unusable("its topic keeps it no longer, and kafka.deadletter_key_file is not set to open it")
    return b"", unseal(told, seal)


async def _kept(kafka: KafkaConfig, told: Letter) -> ConsumerRecord | None:
    async for record in _after(kafka, told, told.offset, 1):
        # Another time or size: the topic was made anew, and this is another record.
        same = (record.offset, appended_at(record.timestamp), len(record.value or b""))
        return record if same == (told.offset, told.appended, told.size_bytes) else None
    return None


async def _after(kafka: KafkaConfig, told: Letter, offset: int, limit: int) -> AsyncIterator[ConsumerRecord]:
    """At most `limit` records of the letter's partition from `offset` on, as many as there are now."""
    consumer = make_consumer(kafka, group_id=None)
    await consumer.start()
    try:
        tp = TopicPartition(told.topic, told.partition)
        consumer.assign([tp])
        first, end = (await consumer.beginning_offsets([tp]))[tp], (await consumer.end_offsets([tp]))[tp]
        consumer.seek(tp, max(offset, first))
        while limit > 0 and await consumer.position(tp) < end:
            fetched = await consumer.getmany(tp, timeout_ms=kafka.request_timeout_ms, max_records=limit)
            if not fetched:
                raise BrokerAway(f"Kafka gave nothing of {told.topic}-{told.partition} in time")
            for record in fetched[tp]:
                limit -= 1
                yield record
    finally:
        await consumer.stop()


def usable(kafka: KafkaConfig, told: Letter, raw: bytes) -> None:
    """Returns where the record can be used by now. Raises Unusable, which never quotes it."""
    try:
        match _name(kafka, told):
            case "events":
                _check_size(raw)
                decode_event(raw)
            case "rollups":
                decode_rollup(raw)
            case "findings":
                finding_of(raw)
    except (BadEvent, BadRollup) as error:
        raise Unusable(f"it still can't be used: {error}") from None


def _name(kafka: KafkaConfig, told: Letter) -> TopicName | None:
    names: tuple[TopicName, ...] = ("events", "rollups", "findings")
    name = next((name for name in names if kafka.topic(name) == told.topic), None)
    if name is not None and not 0 <= told.partition < kafka.count(name):
        raise Unusable(f"{told.topic} has no partition {told.partition} by this configuration")
    return name


def _check_size(raw: bytes) -> None:
    if len(raw) + RECORD_OVERHEAD_BYTES > EVENT_BYTES_MAX:
        raise Unusable(
            f"it still can't be used: {len(raw)} bytes are over the {EVENT_BYTES_MAX} that a message may have"
        )


async def replay(
    kafka: KafkaConfig, found: Sequence[Found], *, dry_run: bool = False, again: bool = False
) -> list[Outcome]:
    """Sends the records of these letters again, each to its own partition, where they can be used now.

    `again` also sends what was sent before. Raises KafkaError, BatchRefused or BrokerAway; what was begun until then is
    told as begun by the next replay.
    """
    seal = letter_seal(kafka)
    outcomes, chosen = [], []
    for one in found[:LETTERS_MAX]:
        if one.notes and not again:
            outcomes.append(Outcome(one.letter.place, False, None, _SAID[one.state]))
            continue
        try:
            key, raw = await content(kafka, one.letter, seal)
            usable(kafka, one.letter, raw)
            chosen.append(_Usable(one, key, raw, await _effect(kafka, one.letter, raw)))
        except Unusable as error:
            outcomes.append(Outcome(one.letter.place, False, None, str(error)))
    if dry_run:
        return outcomes + [Outcome(one.found.letter.place, False, None, f"would be: {one.effect}") for one in chosen]
    return outcomes + await _send(kafka, chosen, again=again)


_SAID: Final = {
    "replayed": "it was replayed before: --again sends it once more",
    "replay begun": "a replay of it was begun and did not report its end, so it may have been sent: look, then --again",
}


async def _send(kafka: KafkaConfig, chosen: Sequence[_Usable], *, again: bool) -> list[Outcome]:
    ours = uuid7()
    producer = make_producer(kafka, client_id="replay")
    await producer.start()
    try:
        notes = BatchWriter(producer, kafka.topic("deadletter"))
        await _note(kafka, notes, [(one, Note(replay="begun", id=ours, place=_place(one))) for one in chosen])
        firsts = {} if again else await _first_notes(kafka)
        outcomes, done = [], []
        for one in chosen:
            if firsts.get(_place(one), ours) != ours:
                outcomes.append(Outcome(_place(one), False, None, "another replay has it"))
                continue
            writer = BatchWriter(producer, one.found.letter.topic, record_bytes_max=RECORD_BYTES_MAX)
            await writer.append(one.key, one.raw, one.found.letter.partition)
            (ack,) = await writer.flush(kafka.request_timeout_ms / 1000)
            done.append((one, Note(replay="done", id=ours, place=_place(one), to_offset=ack.base_offset)))
            outcomes.append(Outcome(_place(one), True, ack.base_offset, one.effect))
        await _note(kafka, notes, done)
    finally:
        await producer.stop()
    return outcomes


def _place(one: _Usable) -> str:
    return one.found.letter.place


async def _note(kafka: KafkaConfig, writer: BatchWriter, notes: Sequence[tuple[_Usable, Note]]) -> None:
    for one, note in notes:
        place = _place(one).encode()
        await writer.append(place, _encoder.encode(note), partition_for(place, kafka.count("deadletter")))
    await writer.flush(kafka.request_timeout_ms / 1000)


async def _first_notes(kafka: KafkaConfig) -> dict[str, str]:
    """Place → the replay that noted it first: the notes of a place are all in one partition, so there is a first."""
    firsts: dict[str, str] = {}
    async for record in read_topic(kafka, "deadletter"):
        note = _note_of(record.value or b"")
        if note is not None:
            firsts.setdefault(note.place, note.id)
    return firsts


async def _effect(kafka: KafkaConfig, told: Letter, raw: bytes) -> str:
    """What the record leads to, appended now."""
    if told.topic != kafka.topic("events"):
        return RESENT if told.topic == kafka.topic("findings") else ROLLED_UP
    mine = _lane_decoder.decode(raw)
    async for record in _after(kafka, told, told.offset + 1, LOOK_AHEAD_MAX):
        try:
            later = _lane_decoder.decode(record.value or b"")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if (later.collector_id, later.boot) == (mine.collector_id, mine.boot) and later.seq >= mine.seq:
            return DUPLICATE
    return LATE
