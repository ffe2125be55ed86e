"""Telling whether two prompts are the same but for trifles, from their hashes and MinHash sketches alone.

MinHash: the share of equal slots of two sketches estimates the Jaccard similarity of the two sets of shingles, with a
standard error of sqrt(J (1 - J) / slots), .03 at J = .95 and 64 slots. Source: A. Z. Broder, "On the resemblance and
containment of documents", SEQUENCES 1997. The sketch is keyed, so it says nothing without the tenant's key.
"""

import binascii
import math
from collections.abc import Sequence
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
    size = len(sketch) // SLOT_BYTES
    # With so many slots that may differ, one of one more parts is the same to the byte: seldom, so most end here.
    parts = size - math.ceil(same * size) + 1
    cuts = [SLOT_BYTES * (size * part // parts) for part in range(parts + 1)]
    others = [other.sketch for other in known if len(other.sketch) == len(sketch)]
    alike: list[bytes] = []
    for begin, end in pairwise(cuts):
        mine = sketch[begin:end]
        alike += [other for other in others if other[begin:end] == mine]
    if not alike:
        return False
    slots = np.frombuffer(sketch, "<u4")
    equal = np.count_nonzero(np.frombuffer(b"".join(alike), "<u4").reshape(len(alike), -1) == slots, axis=1)
    return bool(equal.max() >= same * len(slots))
