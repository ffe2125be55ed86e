"""Telling whether two prompts are the same but for trifles, from their hashes and MinHash sketches alone.

MinHash: the share of equal slots of two sketches estimates the Jaccard similarity of the two sets of shingles, with a
standard error of sqrt(J (1 - J) / slots), .03 at J = .95 and 64 slots. Source: A. Z. Broder, "On the resemblance and
containment of documents", SEQUENCES 1997. The sketch is keyed, so it says nothing without the tenant's key.
"""

import binascii
import math
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Final

import msgspec
import numpy as np
from msgspec import Struct

from detectors.text import Text, text_of

SLOT_BYTES: Final = 4
SLOT: Final = np.dtype("<u4")
HEAD_BYTES: Final = 8


class Prompt(Struct, frozen=True, array_like=True, gc=False):
    """What is kept of a prompt: about 350 bytes."""

    digest: str
    """Of what is new in the request, else of the whole input. Empty where there was no text."""
    sketch: bytes
    """Little-endian uint32 slots; empty where there is none."""


def prompt_of(event: Text) -> Prompt:
    """The prompt of an event; a sketch that can't be read counts as none."""
    sketch = b""
    if event.minhash:
        try:
            sketch = binascii.a2b_base64(event.minhash, strict_mode=True)
        except (binascii.Error, ValueError):
            sketch = b""
    return Prompt(event.turn_hash or event.prompt_hash, sketch if len(sketch) % 4 == 0 else b"")


def session_and_prompt(raw: bytes) -> tuple[str, Prompt]:
    """Of an event's bytes: what decoding it and `prompt_of` give, in half of the time."""
    try:
        asked = _decoder.decode(raw)
    except msgspec.ValidationError:  # of a sketch that is no base64, or oddly padded
        event = text_of(raw)
        return event.session_id, prompt_of(event)
    sketch = asked.minhash
    return asked.session_id, Prompt(asked.turn_hash or asked.prompt_hash, sketch if len(sketch) % 4 == 0 else b"")


class _Asked(Struct, gc=False):
    session_id: str
    prompt_hash: str
    turn_hash: str = ""
    minhash: bytes = b""


_decoder: Final = msgspec.json.Decoder(_Asked)


def seen_before(prompt: Prompt, known: Sequence[Prompt], same: float) -> bool:
    """Whether `prompt` is one of `known`: equal digests, or sketches of one size with similarity of at least `same`."""
    if prompt.digest and prompt.digest in [other.digest for other in known]:
        return True
    sketch = prompt.sketch
    if not sketch or not known:
        return False
    others = [other.sketch for other in known if len(other.sketch) == len(sketch)]
    joined = b"".join(others)
    if not any(sketch[begin:end] in joined for begin, end in _bands(len(sketch) // SLOT_BYTES, same)):
        return False
    slots = np.frombuffer(sketch, SLOT)
    equal = np.count_nonzero(np.frombuffer(joined, SLOT).reshape(len(others), -1) == slots, axis=1)
    return bool(equal.max(initial=0) >= same * len(slots))


@lru_cache(maxsize=64)
def _bands(slots: int, same: float) -> list[tuple[int, int]]:
    """Cuts of a sketch, in bytes. With so many slots that may differ, one of one more bands is the same to the byte:
    seldom by chance, so for most prompts nothing else is compared."""
    bands = slots - math.ceil(same * slots) + 1
    return list(pairwise(SLOT_BYTES * (slots * band // bands) for band in range(bands + 1)))


class Known(Struct, gc=False):
    """The last prompts of a client, the newest last. Memory: as many as are kept, 410 bytes each."""

    digests: list[str] = []
    sketches: bytearray = bytearray()
    """Empty. In snapshots from before `last`: what is there now, one after the other."""
    slots: int = 0
    heads: bytearray = bytearray()
    """How each band of each sketch begins: a tenth of the memory to look through, and mostly the answer."""
    last: list[bytes] = []
    """Sketches, all of one size."""

    def admit(self, prompt: Prompt, limit: int, same: float) -> bool:
        """Whether it is like none of these (`seen_before`). Then it is one of them: the oldest beyond `limit` are
        forgotten, and sketches of another size."""
        digest, sketch, digests = prompt.digest, prompt.sketch, self.digests
        if digest and digest in digests:
            return False
        if sketch:
            heads = _heads(sketch, same)
            if len(sketch) != SLOT_BYTES * self.slots:
                self.slots, self.last, self.heads = len(sketch) // SLOT_BYTES, [], bytearray()
            elif self._similar(sketch, heads, same):
                return False
            begins = b"".join(heads)
            self.last.append(sketch)
            self.heads += begins
            if len(self.last) > limit:
                del self.last[:-limit], self.heads[: -limit * len(begins)]
        digests.append(digest)
        if len(digests) > limit:
            del digests[:-limit]
        return True

    def _similar(self, sketch: bytes, heads: tuple[bytes, ...], same: float) -> bool:
        """Whether one of the sketches has enough slots of this one, whose bands begin with `heads`."""
        mine = self.heads
        for head in heads:
            if head in mine:
                break
        else:
            return False
        equal = np.frombuffer(b"".join(self.last), SLOT).reshape(-1, self.slots) == np.frombuffer(sketch, SLOT)
        return bool(np.count_nonzero(equal, axis=1).max(initial=0) >= same * self.slots)

    def fit(self, same: float) -> None:
        """Makes what a snapshot of an earlier version or another `same` has into what is kept now."""
        size = SLOT_BYTES * self.slots
        self.last += [bytes(self.sketches[at : at + size]) for at in range(0, len(self.sketches), size or 1)]
        self.sketches = bytearray()
        self.heads = bytearray(b"".join(head for sketch in self.last for head in _heads(sketch, same)))


def _heads(sketch: bytes, same: float) -> tuple[bytes, ...]:
    """How each band begins."""
    return _cut(len(sketch) // SLOT_BYTES, same)(sketch)


@lru_cache(maxsize=64)
def _cut(slots: int, same: float) -> Callable[[bytes], tuple[bytes, ...]]:
    """Cuts out the first bytes of each band of a sketch."""
    sizes = [(min(end - begin, HEAD_BYTES), end - begin) for begin, end in _bands(slots, same)]
    return struct.Struct("".join(f"{head}s{size - head}x" for head, size in sizes)).unpack


def likeness(one: Prompt, other: Prompt) -> float:
    """Share of equal slots: the estimated similarity. 0 where there are no sketches of one size."""
    size = len(one.sketch)
    if not size or size != len(other.sketch):
        return 0.0
    low, high = _lanes(size)
    apart = int.from_bytes(one.sketch, "little") ^ int.from_bytes(other.sketch, "little")
    # The top bit of a slot's 32 is set where any bit of it is: by itself, or by what is below it carrying.
    unequal = (((apart & low) + low) | apart) & high
    slots = size // SLOT_BYTES
    return (slots - unequal.bit_count()) / slots


@lru_cache(maxsize=64)
def _lanes(size: int) -> tuple[int, int]:
    """All but the top bit of every slot, and these top bits: as one number a sketch is compared at once."""
    ones = int.from_bytes(b"\1\0\0\0" * (size // SLOT_BYTES), "little")
    return ones * (2**31 - 1), ones << 31
