"""Verifies a log of records against its chain and its checkpoints, offline: what was changed, removed, added or moved.

Feed every record of a partition in the log's order; nothing else is needed but the public keys that are trusted. The
fast way through compares bytes: where a record's lane, number and link are what they must be, it is hashed and that is
all. What happens otherwise is for `collector.lane_check`.

Memory: a lane's records since its last checkpoint, and 128 KiB a lane for repeats.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Final, Literal, TypeAlias

import msgspec

from collector.chain import record_hash, signed_bytes
from collector.event import (
    BadEvent,
    Change,
    Checkpoint,
    Goodbye,
    Hello,
    Integrity,
    decode,
    timestamp_us,
)
from collector.lane_check import LaneCheck
from collector.problem import UNREADABLE, Problem, Proof, stamp_of
from collector.trust import NEVER, TrustedKeys

SILENCE_MAX_US: Final = 180_000_000
"""A live lane is told a checkpoint at least once a minute: one so far behind its boot was cut, and records so far
behind their lane's last one are signed by nobody."""
UNSIGNED_MAX: Final = 32_768
"""Twice the most records that a lane may be set to have without a checkpoint."""
CLOCKS_US: Final = 10_000_000
"""Two collectors' clocks differ by less, each being within 5 s of the broker's."""
Verdict: TypeAlias = Literal["sound", "unproven", "broken"]
_PLAIN: Final = frozenset((b"inf", b"rej"))


class Report(msgspec.Struct, kw_only=True):
    """What a log is worth. `problems` in order of partition and place; the first of each lane is the one to trust."""

    verdict: Verdict
    records: int
    repeats: int
    """Records sent again, byte for byte: no harm."""
    lanes: int
    boots: int
    checkpoints: dict[str, int]
    """How many, by what their signature is worth: signed, unsigned, unknown, revoked, forged."""
    keys: dict[str, str]
    """What each key is that a checkpoint names: trusted (pinned, or named by one that is), or unknown."""
    unsigned_records: int
    """At the ends of lanes, after their last checkpoint."""
    problems: list[Problem]
    notes: list[str]
    proof: Proof | None = None


class Verification:
    """One run over a log. `feed` as often as it takes, then `report` once."""

    def __init__(self, keys: TrustedKeys, *, beats: bool = True, whole: bool = True, wanted: str = "") -> None:
        """`beats`: the log has the heartbeats. `whole`: it has all partitions and no chosen begin or end, so that what
        is missing altogether is told too. `wanted`: the id of an event to prove."""
        self.keys, self._beats, self._whole = keys, beats, whole
        self._wanted = f'"event_id":"{wanted}"'.encode() if wanted else b""
        self._lanes: dict[tuple[int, bytes], LaneCheck] = {}
        self._latest: dict[int, LaneCheck] = {}
        """The lane that a partition's last record was of."""
        self._boots: dict[tuple[str, str], dict[int, Checkpoint]] = {}
        self._changes: list[Change] = []
        self._hellos: dict[tuple[str, str], Hello] = {}
        self._strange: list[Problem] = []
        self._begun_us: dict[int, int] = {}
        """When a partition's log begins, by its first record."""
        self.records = 0

    def feed(self, partition: int, raws: Sequence[bytes], places: Iterable[int]) -> None:
        """The next records of a partition."""
        self.records += len(raws)
        sha256, wanted, lane = hashlib.sha256, self._wanted, self._latest.get(partition)
        for raw, place in zip(raws, places, strict=True):
            if raw[9:12] in _PLAIN:
                start = raw.find(b'"collector_id":"')
                if lane is None or not raw.startswith(lane.key, start):
                    lane = self._lanes.get((partition, _key(raw)), lane)
                if lane is not None and raw.startswith(
                    b'%b,"seq":%d,"chain":"%b"' % (lane.key, lane.next, lane.head), start
                ):
                    digest = sha256(b"\0" + raw).digest()  # record_hash, without the call
                    lane.head = digest.hex().encode()
                    lane.next += 1
                    lane.leaves.append(digest)
                    lane.seen.append((place, raw))
                    if wanted and wanted in raw:
                        lane.wanted = (place, raw)
                    continue
            lane = self._slow(partition, raw, place) or lane
        if lane is not None:
            self._latest[partition] = lane

    def _slow(self, partition: int, raw: bytes, place: int) -> LaneCheck | None:
        """Whatever the fast way does not know. Returns the lane, where the record is of one."""
        stamp = stamp_of(raw)
        try:
            record = None if raw[9:12] in _PLAIN else decode(raw)
        except BadEvent:
            stamp, record = UNREADABLE, None
        if stamp is UNREADABLE:
            why = "it is no record"
            problem = Problem(what="inserted", partition=partition, lane="", seq=0, place=place, event_id="", why=why)
            self._strange.append(problem)
            return None
        if stamp.kind == "tick":
            return None
        key = _key(raw)
        lane = self._lanes.get((partition, key))
        if lane is None:
            lane = self._lanes[partition, key] = LaneCheck(partition, stamp, beats=self._beats)
            self._begun_us.setdefault(partition, lane.begun_us)
        beat = stamp.kind == "heartbeat"
        link = lane.beat_head if beat else lane.head
        fits = link == stamp.chain.encode() and stamp.seq == lane.next and not lane.ended
        if not fits and not lane.odd(raw, stamp, place):
            return lane
        digest = record_hash(raw)
        if isinstance(record, Integrity) and record.subject_hash:
            digest = lane.replaced(record, place) or digest
        lane.next = stamp.seq + 1
        if beat:
            lane.beat_head = digest.hex().encode()
            lane.beats.append((stamp.seq, digest))
            return lane
        lane.key, lane.head = key, digest.hex().encode()
        lane.leaves.append(digest)
        lane.seen.append((place, raw))
        if self._wanted and self._wanted in raw:
            lane.wanted = (place, raw)
        if record is not None:
            self._special(lane, record, raw, place)
        return lane

    def _special(self, lane: LaneCheck, record: object, raw: bytes, place: int) -> None:
        """What hello, checkpoint, goodbye and change mean for more than their own place in the chain."""
        boot = (lane.collector_id, lane.boot)
        if isinstance(record, Hello):
            self._hellos.setdefault(boot, record)
        elif isinstance(record, Change) and record.subject == "signing_key":
            self._changes.append(record)
        elif isinstance(record, Goodbye):
            lane.goodbye()
        elif isinstance(record, Checkpoint) and lane.checkpoint(record, raw, place):
            known = self._boots.setdefault(boot, {})
            bare = msgspec.structs.replace(record, hints="", path=[])
            other = known.setdefault(record.number, bare)
            if (signed_bytes(other), other.signature) != (signed_bytes(bare), bare.signature):
                lane.forged(record, place, "another lane has another checkpoint of this number")

    def report(self) -> Report:
        """What all of it is worth."""
        self.keys.learn(self._changes)
        pinned = set(self.keys.known)
        counts = {"signed": 0, "unsigned": 0, "unknown": 0, "revoked": 0, "forged": 0}
        notes: list[str] = []
        lanes = list(self._lanes.values())
        for lane in lanes:
            lane.close()
        boots: dict[tuple[str, str], list[LaneCheck]] = {}
        for lane in lanes:
            boots.setdefault((lane.collector_id, lane.boot), []).append(lane)
        for boot, mine in boots.items():
            checkpoints = self._boots.get(boot, {})
            for checkpoint in checkpoints.values():
                worth = self.keys.judge(checkpoint)
                counts[worth] += 1
                if worth in {"forged", "revoked"}:
                    told = {"forged": "its signature is not its key's", "revoked": "its key was revoked by then"}
                    mine[0].forged(checkpoint, -1, f"checkpoint {checkpoint.number}: {told[worth]}")
            self._check_ends(mine, checkpoints)
            if checkpoints:
                self._check_numbers(mine, checkpoints)
            if self._whole:
                self._check_begins(mine)
        if self._whole:
            self._check_ended(notes)
        problems = sorted([*self._strange, *(p for lane in lanes for p in lane.problems)], key=_order)
        if counts["unknown"]:
            notes.append("checkpoints are signed by keys that are not trusted here: pin them, or doubt the log")
        loose = [lane for lane in lanes if _loose(lane, self._boots.get((lane.collector_id, lane.boot), {}))]
        notes += [f"lane {lane.name}: its last {len(lane.seen)} records have no checkpoint" for lane in loose]
        unproven = counts["unsigned"] or counts["unknown"] or not counts["signed"] or loose
        return Report(
            verdict="broken" if problems else "unproven" if unproven else "sound",
            records=self.records,
            repeats=sum(lane.repeats for lane in lanes),
            lanes=len(lanes),
            boots=len(boots),
            checkpoints={worth: count for worth, count in counts.items() if count},
            keys={one.key_id: "trusted" if one.key_id in pinned else "unknown" for one in self._all_checkpoints()},
            unsigned_records=sum(len(lane.leaves) for lane in lanes if not lane.ended),
            problems=problems,
            notes=notes + [note for lane in lanes if (note := lane.note())],
            proof=next((lane.proof for lane in lanes if lane.proof), None),
        )

    def _all_checkpoints(self) -> Iterable[Checkpoint]:
        return (one for known in self._boots.values() for one in known.values() if one.key_id)

    def _check_ends(self, lanes: Sequence[LaneCheck], checkpoints: dict[int, Checkpoint]) -> None:
        """Whether a boot's lanes go on to its end."""
        newest = checkpoints[max(checkpoints)] if checkpoints else None
        for lane in lanes:
            last = lane.last
            if lane.ended and (last is None or not last.final):
                if lane.next > lane.first + 1:  # else the log begins with the goodbye
                    lane.cut("its goodbye comes without the last checkpoint of its boot")
            elif newest is None or lane.ended:
                continue
            elif newest.final:
                lane.cut("other lanes of its boot have the last checkpoint, it has no end")
            elif newest.at_us - (last.at_us if last else 0) > SILENCE_MAX_US and self._whole:
                lane.cut("other lanes of its boot have later checkpoints")

    def _check_numbers(self, lanes: Sequence[LaneCheck], checkpoints: dict[int, Checkpoint]) -> None:
        """Whether the checkpoints of a boot follow each other, and it has the lanes that they count."""
        newest = checkpoints[max(checkpoints)]
        missing = set(range(newest.lanes)) - {lane.partition for lane in lanes} if self._whole else set()
        # Partitions are kept for different times: one that begins later may have lost a lane, or a part of it.
        gone = {partition for partition in missing if self._begun_us.get(partition, -1) >= newest.at_us}
        cut_us = max([lane.begun_us for lane in lanes if not lane.whole] + [NEVER] * bool(gone), default=0)
        before = None
        for number, checkpoint in sorted(checkpoints.items()):
            if before is not None and before.number == number - 1 and before.root != checkpoint.previous:
                lanes[0].forged(checkpoint, -1, f"checkpoint {number} does not name the one before it")
            elif self._whole and before is not None and before.number < number - 1 and before.at_us > cut_us:
                lanes[0].cut(f"no lane has checkpoint {number - 1}")
            before = checkpoint
        if newest.lanes < len(lanes) or (self._whole and newest.lanes > len(lanes) + len(gone)):
            lanes[0].cut(f"its boot has {newest.lanes} lanes, and {len(lanes)} are here")

    def _check_begins(self, lanes: Sequence[LaneCheck]) -> None:
        """A lane may begin in the middle only where its partition's log does not reach back to its boot."""
        boot = (lanes[0].collector_id, lanes[0].boot)
        start_us = _born_us(boot[1], self._hellos.get(boot))
        for lane in lanes:
            if not lane.whole and self._begun_us[lane.partition] < start_us - CLOCKS_US:
                lane.cut("its beginning is missing, though the log of its partition goes back further")

    def _check_ended(self, notes: list[str]) -> None:
        """Boots that a later one names must be here, with the end that it names."""
        first_us = min(self._begun_us.values(), default=NEVER)
        for boot, hello in self._hellos.items():
            for ended in hello.ended:
                checkpoints = self._boots.get((boot[0], ended.boot), {})
                roots = {checkpoint.root for checkpoint in checkpoints.values()}
                if ended.root in roots or not ended.root:
                    continue
                if not checkpoints and ended.at_us <= first_us:
                    notes.append(f"boot {ended.boot} ended before this log begins")
                    continue
                why = "its last checkpoint is missing" if checkpoints else "the whole boot is missing"
                self._strange.append(
                    Problem(
                        what="truncated",
                        partition=-1,
                        lane=f"{boot[0]}/{ended.boot}",
                        seq=0,
                        place=-1,
                        event_id="",
                        why=f"{why}, says the hello of boot {boot[1]}",
                    )
                )


def _loose(lane: LaneCheck, checkpoints: dict[int, Checkpoint]) -> bool:
    """Whether more of a lane than its last seconds is in no checkpoint: whoever can write to the log could add it."""
    if lane.ended:
        return False
    return not checkpoints or lane.unsigned_us > SILENCE_MAX_US or len(lane.seen) > UNSIGNED_MAX


def _born_us(boot: str, hello: Hello | None) -> int:
    """When a boot began: its name is a UUIDv7, and its hello has a time; 0 where neither tells."""
    told = re.fullmatch("([0-9a-f]{8})-([0-9a-f]{4})-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", boot)
    if told is not None:
        return int(told[1] + told[2], 16) * 1000
    return timestamp_us(hello.timestamp) if hello is not None else 0


def _key(raw: bytes) -> bytes:
    """What a lane's records have in common, as on the wire."""
    start = raw.find(b'"collector_id":"')
    return raw[start : raw.find(b',"seq":', start)]


def _order(problem: Problem) -> tuple[int, int]:
    return problem.partition, problem.place if problem.place >= 0 else NEVER
