"""Telling whether two prompts are the same but for trifles, from their hashes and MinHash sketches alone.

MinHash: the share of equal slots of two sketches estimates the Jaccard similarity of the two sets of shingles, with a
standard error of sqrt(J (1 - J) / slots), .03 at J = .95 and 64 slots. Source: A. Z. Broder, "On the resemblance and
containment of documents", SEQUENCES 1997. The sketch is keyed, so it says nothing without the tenant's key.
"""

import base64
import binascii
from collections.abc import Iterable

import numpy as np
from msgspec import Struct

from collector.event import AuditEvent


class Prompt(Struct, frozen=True, array_like=True):
    """What is kept of a prompt: about 350 bytes."""

    digest: str
    """Of what is new in the request, else of the whole input. Empty where there was no text."""
    sketch: bytes
    """Little-endian uint32 slots; empty where there is none."""


def prompt_of(event: AuditEvent) -> Prompt:
    """The prompt of an event; a sketch that can't be read counts as none."""
    try:
        sketch = base64.b64decode(event.minhash, validate=True)
    except (binascii.Error, ValueError):
        sketch = b""
    return Prompt(event.turn_hash or event.prompt_hash, sketch if len(sketch) % 4 == 0 else b"")


def seen_before(prompt: Prompt, known: Iterable[Prompt], same: float) -> bool:
    """Whether `prompt` is one of `known`: equal digests, or sketches of one size with similarity of at least `same`."""
    slots = np.frombuffer(prompt.sketch, "<u4")
    for other in known:
        if prompt.digest and prompt.digest == other.digest:
            return True
        if len(slots) and len(other.sketch) == len(prompt.sketch):
            equal = int(np.count_nonzero(slots == np.frombuffer(other.sketch, "<u4")))
            if equal >= same * len(slots):
                return True
    return False
