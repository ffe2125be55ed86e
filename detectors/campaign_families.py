"""The families of blocked prompts that `detectors/campaign.py` keeps: how they are found, grow and are joined.

Memory: about 0.6 KB a lone prompt; a family at most 4 KB and 100 bytes a user.
"""

import base64
import binascii
from typing import Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from detectors.rollup import Sample, Signal, earliest, merge_offsets

SKETCH_BYTES: Final = 256
SLOTS: Final = SKETCH_BYTES // 4
MEMBERS_MAX: Final = 16
Sketches = NDArray[np.uint32]


class Family(Struct):
    """Blocked prompts that are alike."""

    sketch: bytes
    members: list[bytes]
    """The last sixteen sketches."""
    users: dict[str, int]
    """User to when he was last blocked with one, in µs: those of the last day."""
    first_us: int
    last_us: int
    model: str
    prompts: int = 0
    samples: list[Sample] = []
    offsets: dict[int, tuple[int, int]] = {}
    raised_s: int = 0
    told: int = 0
    """Users when it was last told anew."""
    past: float = 0.0
    """Users before the last day, faded."""
    past_us: int = 0


def taken(family: Family, sketch: bytes, signal: Signal, users_max: int) -> None:
    """One more prompt of the family."""
    family.members = [*family.members, sketch][-MEMBERS_MAX:]
    family.sketch = commonest(family.members)
    family.users = newest(family.users | {signal.entity.id: signal.last_seen_us}, users_max)
    family.prompts += 1
    family.last_us, family.model = signal.last_seen_us, signal.model
    family.samples = earliest([*family.samples, *signal.samples])
    merge_offsets(family.offsets, {signal.partition: (signal.first_offset, signal.last_offset)})


class Families:
    """One tenant's, with their sketches as the rows of a matrix."""

    def __init__(self, families: list[Family], since_us: int) -> None:
        self.families, self.since_us = families, since_us
        self._matrix: Sketches = np.zeros((64, SLOTS), np.uint32)
        self._fit()
        for row, family in enumerate(families):
            self._matrix[row] = slots_of(family.sketch)

    def _fit(self) -> None:
        while len(self._matrix) < len(self.families):
            self._matrix = np.concatenate([self._matrix, np.zeros_like(self._matrix)])

    def nearest(self, sketch: bytes, similarity: float, apart: int = -1) -> int | None:
        """The most similar family, the first of equals; `apart` is left out."""
        if not self.families:
            return None
        equal = equal_slots(self._matrix[: len(self.families)], slots_of(sketch))
        if apart >= 0:
            equal[apart] = 0
        best = int(equal.argmax())
        return best if equal[best] >= similarity * SLOTS else None

    def alike(self, row: int, other: int) -> float:
        """Estimated similarity of two families."""
        return float((self._matrix[row] == self._matrix[other]).mean())

    def put(self, row: int, family: Family) -> None:
        """At a row, or after the last."""
        if row == len(self.families):
            self.families.append(family)
            self._fit()
        self.families[row] = family
        self._matrix[row] = slots_of(family.sketch)

    def remove(self, row: int) -> None:
        """The last one takes its place."""
        last = self.families.pop()
        if row < len(self.families):
            self.put(row, last)

    def oldest(self) -> int:
        """The family longest unseen."""
        return min(range(len(self.families)), key=lambda row: (self.families[row].last_us, row))


def sketch_of(text: str) -> bytes | None:
    """The sketch of an event, if it is one of 64 slots."""
    try:
        sketch = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return sketch if len(sketch) == SKETCH_BYTES else None


def slots_of(sketch: bytes) -> Sketches:
    """Its numbers."""
    return np.frombuffer(sketch, "<u4").astype(np.uint32, copy=False)


def equal_slots(rows: Sketches, slots: Sketches) -> NDArray[np.uint8]:
    """Of each row how many slots are these: a bit for each slot that is, and the bits of a row counted at once."""
    return np.bitwise_count(np.packbits(rows == slots).view(np.uint64))


def commonest(sketches: list[bytes]) -> bytes:
    """Slot by slot the value that most of the sketches have; of equally many the earliest sketch's."""
    if len(sketches) < 3:
        return sketches[0]
    rows = np.frombuffer(b"".join(sketches), "<u4").reshape(len(sketches), -1)
    alike = (rows[:, None, :] == rows[None, :, :]).sum(1)
    chosen: Sketches = rows[alike.argmax(0), np.arange(rows.shape[1])]
    return chosen.tobytes()


def newest(users: dict[str, int], limit: int) -> dict[str, int]:
    """The `limit` users seen last, in order of id."""
    if len(users) > limit:
        users = dict(sorted(users.items(), key=lambda item: (-item[1], item[0]))[:limit])
    return users


def together(one: Family, other: Family, users_max: int) -> Family:
    """Two families as one, under the older one's name."""
    members = [*other.members, *one.members][-MEMBERS_MAX:]
    users = dict(one.users)
    for user, last_us in other.users.items():
        users[user] = max(users.get(user, last_us), last_us)
    offsets = dict(one.offsets)
    merge_offsets(offsets, other.offsets)
    return Family(
        sketch=commonest(members),
        members=members,
        users=newest(users, users_max),
        past=one.past + other.past,
        past_us=max(one.past_us, other.past_us),
        first_us=min(one.first_us, other.first_us),
        last_us=max(one.last_us, other.last_us),
        model=one.model,
        prompts=one.prompts + other.prompts,
        samples=earliest([*one.samples, *other.samples]),
        offsets=offsets,
        raised_s=max(one.raised_s, other.raised_s),
        told=max(one.told, other.told),
    )
