"""Telling whether two prompts are the same but for trifles, from their hashes and MinHash sketches alone.

MinHash: the share of equal slots of two sketches estimates the Jaccard similarity of the two sets of shingles, with a
standard error of sqrt(J (1 - J) / slots), .03 at J = .95 and 64 slots. Source: A. Z. Broder, "On the resemblance and
containment of documents", SEQUENCES 1997. The sketch is keyed, so it says nothing without the tenant's key.
"""

import binascii
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Final

import numpy as np
from msgspec import Struct

from detectors.text import Text

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
    """The last prompts of a client, the newest last. Memory: as many as are kept, 380 bytes each."""

    digests: list[str] = []
    sketches: bytearray = bytearray()
    """One after the other, all of one size."""
    slots: int = 0
    heads: bytearray = bytearray()
    """How each band of each sketch begins: a tenth of the memory to look through, and mostly the answer."""

    def holds(self, prompt: Prompt, same: float) -> bool:
        """`seen_before` of these."""
        if prompt.digest and prompt.digest in self.digests:
            return True
        sketch = prompt.sketch
        if not sketch or len(sketch) != SLOT_BYTES * self.slots:
            return False
        bands = _bands(self.slots, same)
        if len(self.heads) * len(sketch) != len(self.sketches) * len(bands) * HEAD_BYTES:
            self.heads = bytearray()
            for at in range(0, len(self.sketches), len(sketch)):
                self.heads += _heads(self.sketches[at : at + len(sketch)], bands)
        heads = self.heads
        for begin, end in bands:
            if sketch[begin : min(end, begin + HEAD_BYTES)] in heads:
                break
        else:
            return False
        equal = np.frombuffer(self.sketches, SLOT).reshape(-1, self.slots) == np.frombuffer(sketch, SLOT)
        return bool(np.count_nonzero(equal, axis=1).max(initial=0) >= same * self.slots)

    def add(self, prompt: Prompt, limit: int, same: float) -> None:
        """Forgets the oldest beyond `limit`, and sketches of another size."""
        self.digests.append(prompt.digest)
        del self.digests[:-limit]
        sketch = prompt.sketch
        if not sketch:
            return
        if len(sketch) != SLOT_BYTES * self.slots:
            self.slots, self.sketches, self.heads = len(sketch) // SLOT_BYTES, bytearray(), bytearray()
        heads = _heads(sketch, _bands(self.slots, same))
        self.sketches += sketch
        self.heads += heads
        del self.sketches[: -limit * len(sketch)], self.heads[: -limit * len(heads)]


def _heads(sketch: bytes | bytearray, bands: list[tuple[int, int]]) -> bytes:
    cuts = [(begin, min(end, begin + HEAD_BYTES)) for begin, end in bands]
    return b"".join([sketch[begin:end].ljust(HEAD_BYTES, b"\0") for begin, end in cuts])


def likeness(one: Prompt, other: Prompt) -> float:
    """Share of equal slots: the estimated similarity. 0 where there are no sketches of one size."""
    if not one.sketch or len(one.sketch) != len(other.sketch):
        return 0.0
    slots = np.frombuffer(one.sketch, SLOT) == np.frombuffer(other.sketch, SLOT)
    return float(np.count_nonzero(slots)) / len(slots)
