"""One lane as a verifier sees it: its records against the chain, and each part against the checkpoint that signs it.

The chain alone finds what was changed by somebody who could not hash all that follows anew. Where a part differs from
its checkpoint, the checkpoint's hints name the first record that is not the one that was signed.
"""

from collections import deque
from collections.abc import Sequence
from typing import Final, TypeAlias

import msgspec

from collector.chain import (
    HINT_BYTES,
    merkle_path,
    merkle_root,
    origin,
    part_hash,
    record_hash,
    root_from_path,
    split_hints,
)
from collector.event import Checkpoint, Integrity, timestamp_us
from collector.problem import UNREADABLE, Problem, Proof, Stamp, What, stamp_of

NO_KEY: Final = b"-"
"""Nothing that a record's lane begins with."""
REPEATS_MAX: Final = 4096
"""So many records back one is known as sent again: that comes soon after, and each look further would take longer."""
BEATS_MAX: Final = 1024
"""The same of heartbeats."""
HOLES_MAX: Final = 262_144
"""Missing numbers that are remembered until the next checkpoint."""
PROBLEMS_MAX: Final = 100
"""Of one lane; what follows a first bad record says little."""


Seen: TypeAlias = tuple[int, bytes]
"""Place and bytes of a record without a checkpoint yet, no heartbeat."""


class LaneCheck:
    """One lane. `head`, `beat_head` and `next` are what the next record must say; empty before the first record."""

    def __init__(self, partition: int, stamp: Stamp, *, beats: bool = True) -> None:
        """`beats`: whether the log has the heartbeats; without them `seq` may have gaps where the chain has none."""
        self.key, self._with_beats = NO_KEY, beats
        """What all records of the lane have in common; `NO_KEY` at its ends, where anybody could spell the head."""
        self.partition, self.collector_id, self.boot = partition, stamp.collector_id, stamp.boot
        self.head = self.beat_head = b""
        self.next = self.first = stamp.seq
        self.begun_us = timestamp_us(stamp.timestamp)
        self.whole = stamp.kind == "hello"
        """From its first record on."""
        self.leaves: list[bytes] = []
        self.seen: list[Seen] = []
        self.beats: list[tuple[int, bytes]] = []
        """Heartbeats without a checkpoint yet: `seq` and hash."""
        self.wanted: tuple[int, bytes] | None = None
        """Place and bytes of a record to prove."""
        self.proof: Proof | None = None
        self.covered = -1
        """All before this `seq` was compared with a checkpoint; -1 before the first one."""
        self.problems: list[Problem] = []
        self.repeats = 0
        self.last: Checkpoint | None = None
        self.ended = False
        self._suspected: list[Problem] = []
        """By the chain alone; a checkpoint decides."""
        self._missing: dict[int, int] = {}
        self._also: dict[int, bytes] = {}
        self._past: deque[bytes] = deque(maxlen=REPEATS_MAX)
        self._beats_past: deque[bytes] = deque(maxlen=BEATS_MAX)

    @property
    def name(self) -> str:
        """As people read it."""
        return f"{self.collector_id}/{self.boot}/{self.partition}"

    def odd(self, raw: bytes, stamp: Stamp, place: int) -> bool:
        """A record that is not what must come next. True where it is to be taken as the lane's next one."""
        beat, digest = stamp.kind == "heartbeat", record_hash(raw)
        if not (self.beat_head if beat else self.head) and not self.ended:
            return self._begin(stamp, place)
        if stamp.seq < self.next and self._repeated(digest, beat=beat):
            self.repeats += 1
            return False
        link = (self.beat_head if beat else self.head).decode()
        if self.ended:
            self._suspect("inserted", stamp, place, "it follows the lane's goodbye")
        elif stamp.seq > self.next and (self._with_beats or stamp.chain != link):
            room = HOLES_MAX - len(self._missing)
            self._missing |= dict.fromkeys(range(self.next, min(stamp.seq, self.next + room)), place)
            self._suspect("removed", stamp, place, f"{stamp.seq - self.next} missing before it", seq=self.next)
        elif stamp.seq < self.next:
            self._behind(stamp, place, digest)
            if not beat:
                self.leaves.append(digest)
                self.seen.append((place, raw))
            return False
        elif stamp.chain not in {link, self._also.get(self.next - 1, b"").hex()}:
            self._broken(stamp, place, beat=beat)
        return True

    def _begin(self, stamp: Stamp, place: int) -> bool:
        start = origin(self.collector_id, self.boot, self.partition)
        if not self.head and self.whole and (stamp.chain != start or stamp.seq != 0):
            self._suspect("forged", stamp, place, "this hello does not begin such a lane")
        elif not self.head and not self.whole and self.first == 0:
            self._suspect("forged", stamp, place, "a lane begins with a hello")
        beat = stamp.kind == "heartbeat"
        # Where the log begins within the lane, the first record of each chain can't be compared with anything.
        if not self.head and (self.whole or not beat):
            self.head = stamp.chain.encode()
        if not self.beat_head and (self.whole or beat):
            self.beat_head = start.encode() if self.whole else stamp.chain.encode()
        if stamp.seq > self.next and self._with_beats:
            self._suspect("removed", stamp, place, f"{stamp.seq - self.next} missing before it", seq=self.next)
        return True

    def _repeated(self, digest: bytes, *, beat: bool) -> bool:
        if beat:
            return digest in self._beats_past or any(digest == known for _, known in self.beats[-BEATS_MAX:])
        return digest in self.leaves[-REPEATS_MAX:] or digest in self._past

    def _behind(self, stamp: Stamp, place: int, digest: bytes) -> None:
        if self._missing.pop(stamp.seq, None) is not None:
            self._suspect("reordered", stamp, place, "it comes later than its number says")
        else:
            self._also[stamp.seq] = digest
            self._suspect("inserted", stamp, place, "another record has this number")

    def _broken(self, stamp: Stamp, place: int, *, beat: bool) -> None:
        """The record before is not the one that this one names: or this one's own link was changed."""
        before = self._suspected[-1] if self._suspected else None
        if beat:
            self._suspect("changed", stamp, place, "it does not name the heartbeat before it")
        elif before is not None and before.what == "changed" and before.seq == stamp.seq - 1 and self.seen:
            # Two links in a row: it is the record in the middle that does not fit on either side.
            self._suspected[-1] = msgspec.structs.replace(before, **self._named(self.seen[-1]))
        elif self.seen:
            named = self._named(self.seen[-1])
            self._suspected.append(self._problem("changed", "the next record names another hash", **named))
        else:
            self._suspect("changed", stamp, place, "it does not name the record before it")

    def _named(self, seen: Seen) -> dict[str, object]:
        stamp = stamp_of(seen[1])
        return {"seq": stamp.seq, "place": seen[0], "event_id": stamp.event_id}

    def _suspect(self, what: What, stamp: Stamp, place: int, why: str, seq: int | None = None) -> None:
        if len(self._suspected) < PROBLEMS_MAX:
            named = {"seq": stamp.seq if seq is None else seq, "place": place, "event_id": stamp.event_id}
            self._suspected.append(self._problem(what, why, **named))

    def _problem(self, what: What, why: str, *, seq: object, place: object, event_id: object) -> Problem:
        return msgspec.convert(
            {
                "what": what,
                "why": why,
                "partition": self.partition,
                "lane": self.name,
                "seq": seq,
                "place": place,
                "event_id": event_id,
            },
            Problem,
        )

    def replaced(self, record: Integrity, place: int) -> bytes | None:
        """A record whose place another took: told, and the chain goes on from the hash that it had, where it is one."""
        why = "Kafka refused it for good, says the collector; an integrity record stands in its place"
        named = {"seq": record.seq, "place": place, "event_id": record.subject_id}
        self.problems.append(self._problem("replaced", why, **named))
        try:
            return bytes.fromhex(record.subject_hash)
        except ValueError:
            return None

    def goodbye(self) -> None:
        """The lane's last record, seen just now: behind the boot's last checkpoint there is nothing else."""
        self.ended, self.head, self.key = True, b"", NO_KEY
        if self.last is None or not self.last.final:
            return
        between = [(self._named(seen), "record") for seen in self.seen[1:-1]]
        between += [({"seq": seq, "place": -1, "event_id": ""}, "heartbeat") for seq, _ in self.beats]
        for named, kind in between[:PROBLEMS_MAX]:
            why = f"this {kind} comes after the last checkpoint of its boot, where only goodbyes follow"
            self.problems.append(self._problem("inserted", why, **named))

    def checkpoint(self, part: Checkpoint, raw: bytes, place: int) -> bool:
        """A checkpoint of the lane: True where it is whole, and it then decides on all before its `next`."""
        named = {"seq": part.seq, "place": place, "event_id": part.event_id}
        try:
            top = root_from_path(part_hash(self.partition, part), part.lane, part.lanes, map(bytes.fromhex, part.path))
        except ValueError:
            top = None
        if top is None or top.hex() != part.root:
            self.problems.append(self._problem("forged", "this checkpoint does not belong to what it signs", **named))
            return False
        if self.last is not None and part.number <= self.last.number:
            self.problems.append(self._problem("forged", "this checkpoint comes after a later one", **named))
            return False
        count = self._count_before(part.next)
        lead = 0 if part.first == max(self.covered, 0) else self._count_before(part.first)
        # The chain alone covers these: they were let go of with a process that died before its next checkpoint.
        before = self.leaves[lead - 1] if lead else b""
        self._past.extend(self.leaves[:lead])
        del self.leaves[:lead], self.seen[:lead]
        count = max(count - lead, 0)
        self._compare(part, count, place, before)
        self._compare_beats(part, place)
        if self.wanted is not None and self.proof is None:
            self.proof = self._prove(part, count, raw)
        self._past.extend(self.leaves[:count])
        del self.leaves[:count], self.seen[:count]
        self.covered, self.last = part.next, part
        self._missing, self._also = {}, {}
        return True

    def _count_before(self, seq: int) -> int:
        """How many of the records seen are before this number; they are few behind it."""
        count = len(self.seen)
        while count and stamp_of(self.seen[count - 1][1]).seq >= seq:
            count -= 1
        return count

    def _compare(self, part: Checkpoint, count: int, place: int, before: bytes) -> None:
        suspected, self._suspected = self._suspected, []
        leaves = self.leaves[:count]
        started = self.covered >= 0 or self.whole
        head = (leaves[-1] if leaves else before).hex() or part.head
        if count == part.records and head == part.head and (not suspected or merkle_root(leaves).hex() == part.tree):
            # Where no link is broken the head alone fixes all before it. What else was seen concerns heartbeats.
            self.problems += suspected
            return
        try:
            hints = split_hints(part.hints)
        except ValueError:
            hints = []
        observed = [leaf[:HINT_BYTES] for leaf in leaves]
        skipped = 0
        if not started and count <= len(hints) == part.records:
            # The log begins within this part: its end must be the same.
            skipped = len(hints) - count
        problem = self._first_difference(hints[skipped:], observed, place)
        if problem is None and not started:
            self.problems += suspected  # four bytes of a hash can be ground, a whole one can't
            return
        first = problem or self._unnamed(part, place)
        self.problems += [first, *(other for other in suspected if other.place > first.place)]

    def _first_difference(self, hints: Sequence[bytes], observed: Sequence[bytes], place: int) -> Problem | None:
        pairs = zip(hints, observed, strict=False)
        index = next((i for i, (hint, seen) in enumerate(pairs) if hint != seen), min(len(hints), len(observed)))
        if index == len(hints) == len(observed):
            return None
        if index >= len(observed):
            why = f"{len(hints) - index} signed records are missing before the checkpoint"
            return self._problem("removed", why, seq=self._seq_after(index), place=place, event_id="")
        here, named = observed[index], self._named(self.seen[index])
        wanted = hints[index] if index < len(hints) else b""
        signed_later = here in hints[index + 1 :]
        seen_later = wanted in observed[index + 1 :]
        if seen_later and signed_later:
            return self._problem("reordered", "it was signed at a later place", **named)
        if seen_later or not wanted:
            return self._problem("inserted", "it was never signed", **named)
        if signed_later:
            why = f"{hints.index(here, index) - index} signed records are missing here"
            return self._problem("removed", why, seq=self._seq_after(index), place=named["place"], event_id="")
        return self._problem("changed", "it is not the record that was signed at its place", **named)

    def _seq_after(self, index: int) -> int:
        """The number of the first that is missing behind the seen one at `index - 1`."""
        after = stamp_of(self.seen[index - 1][1]).seq + 1 if index else max(self.covered, self.first)
        return min((seq for seq in self._missing if seq >= after), default=after)

    def _unnamed(self, part: Checkpoint, place: int) -> Problem:
        why = f"something from {part.first} to {part.next - 1} is not what was signed"
        return self._problem("changed", why, seq=part.first, place=place, event_id="")

    def close(self) -> None:
        """The log ends: what the chain alone suspects stands, and what looked like a record must be one."""
        self.problems += self._suspected
        self._suspected = []
        odd = next((seen for seen in self.seen if stamp_of(seen[1]) is UNREADABLE), None)
        if odd is not None:
            self.problems.append(self._problem("inserted", "it is no record", seq=0, place=odd[0], event_id=""))

    def forged(self, record: Checkpoint, place: int, why: str) -> None:
        """A checkpoint that can't be believed, as seen by whoever knows the others."""
        self.problems.append(self._problem("forged", why, seq=record.seq, place=place, event_id=record.event_id))

    def note(self) -> str:
        """What there is to say of a lane that is no problem."""
        if not self.whole:
            return f"lane {self.name} begins at {self.first} here: what was before is not looked at"
        return ""

    @property
    def unsigned_us(self) -> int:
        """How much time its records without a checkpoint span, from the last one on."""
        if self.ended or not self.seen:
            return 0
        since_us = self.last.at_us if self.last is not None else self.begun_us
        return timestamp_us(stamp_of(self.seen[-1][1]).timestamp) - since_us

    def cut(self, why: str) -> None:
        """The lane's end is missing."""
        self.problems.append(self._problem("truncated", why, seq=self.next, place=-1, event_id=""))

    def _compare_beats(self, part: Checkpoint, place: int) -> None:
        count = sum(seq < part.next for seq, _ in self.beats)
        hashes = [digest for _, digest in self.beats[:count]]
        signed = sum(seq >= part.first for seq, _ in self.beats[:count])
        del self.beats[:count]
        self._beats_past.extend(hashes)
        started = self.covered >= 0 or self.whole
        head = hashes[-1].hex() if hashes else part.beat_head
        if self._with_beats and (head != part.beat_head or (started and signed != part.beats)):
            why = f"the {part.beats} heartbeats from {part.first} to {part.next - 1} are not those that were signed"
            self.problems.append(self._problem("changed", why, seq=part.first, place=place, event_id=""))

    def _prove(self, part: Checkpoint, count: int, checkpoint: bytes) -> Proof | None:
        """Of the wanted record, before its checkpoint lets go of it."""
        place, raw = self.wanted or (-1, b"")
        index = next((i for i, seen in enumerate(self.seen[:count]) if seen[0] == place), None)
        if index is None or count != part.records:
            return None
        leaves = self.leaves[:count]
        if merkle_root(leaves).hex() != part.tree:
            return None
        path = [node.hex() for node in merkle_path(leaves, index)]
        return Proof(
            partition=self.partition, record=raw.decode(), index=index, path=path, checkpoint=checkpoint.decode()
        )
