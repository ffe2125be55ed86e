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

from collector.event import AuditEvent

SLOT_BYTES: Final = 4


class Prompt(Struct, frozen=True, array_like=True):
    """What is kept of a prompt: about 350 bytes."""

    digest: str
    """Of what is new in the request, else of the whole input. Empty where there was no text."""
    sketch: bytes
    """Little-endian uint32 slots; empty where there is none."""


def prompt_of(event: AuditEvent) -> Prompt:
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
    slots = np.frombuffer(sketch, "<u4")
    equal = np.count_nonzero(np.frombuffer(joined, "<u4").reshape(len(others), -1) == slots, axis=1)
    return bool(equal.max(initial=0) >= same * len(slots))


@lru_cache(maxsize=64)
def _bands(slots: int, same: float) -> list[tuple[int, int]]:
    """Cuts of a sketch, in bytes. With so many slots that may differ, one of one more bands is the same to the byte:
    seldom by chance, so for most prompts nothing else is compared."""
    bands = slots - math.ceil(same * slots) + 1
    return list(pairwise(SLOT_BYTES * (slots * band // bands) for band in range(bands + 1)))


class Known(Struct):
    """The last prompts of a client, the newest last. Memory: as many as are kept, 350 bytes each."""

    digests: list[str] = []
    sketches: bytes = b""
    """One after the other, all of one size."""
    slots: int = 0

    def holds(self, prompt: Prompt, same: float) -> bool:
        """`seen_before` of these."""
        if prompt.digest and prompt.digest in self.digests:
            return True
        sketch = prompt.sketch
        if not sketch or len(sketch) != SLOT_BYTES * self.slots:
            return False
        joined = self.sketches
        if sketch in joined:
            return True
        if not any(sketch[begin:end] in joined for begin, end in _bands(self.slots, same)):
            return False
        equal = np.frombuffer(joined, "<u4").reshape(-1, self.slots) == np.frombuffer(sketch, "<u4")
        return bool(np.count_nonzero(equal, axis=1).max(initial=0) >= same * self.slots)

    def add(self, prompt: Prompt, limit: int) -> None:
        """Forgets the oldest beyond `limit`, and sketches of another size."""
        self.digests = [*self.digests, prompt.digest][-limit:]
        if not prompt.sketch:
            return
        if len(prompt.sketch) != SLOT_BYTES * self.slots:
            self.slots, self.sketches = len(prompt.sketch) // SLOT_BYTES, b""
        self.sketches = (self.sketches + prompt.sketch)[-limit * len(prompt.sketch) :]


def likeness(one: Prompt, other: Prompt) -> float:
    """Share of equal slots: the estimated similarity. 0 where there are no sketches of one size."""
    if not one.sketch or len(one.sketch) != len(other.sketch):
        return 0.0
    slots = np.frombuffer(one.sketch, "<u4") == np.frombuffer(other.sketch, "<u4")
    return float(np.count_nonzero(slots)) / len(slots)
