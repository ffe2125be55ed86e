"""Keyed MinHash: lets near-duplicates of a text meet without the text.

A. Broder, "On the resemblance and containment of documents" (1997): the share of equal places of two signatures
estimates the Jaccard similarity of the texts' sets of character 5-grams; standard error at most 1/16 with 64 places.
"""

import base64
import hashlib
import threading
import unicodedata
from typing import Final

import numpy as np
from numpy.typing import NDArray

MINHASH_PLACES: Final = 64
SHINGLE_CHARS: Final = 5
_BLOCK: Final = 8192
"""So many shingles are hashed for all places at once: numpy takes a third of the time for long rows."""
_SHORT: Final = 400
"""Up to so many shingles one sliding product takes less time than five passes."""


_MIXER: Final = np.uint64(0xD6E8FEB86659FD93)
"""Any odd number with its bits well spread."""


class _Scratch(threading.local):
    """A thread's table, kept: a new one each time would cost more in page faults than the hashing."""

    def __init__(self) -> None:
        self.table = np.empty(MINHASH_PLACES * _BLOCK, dtype=np.uint32)


_scratch = _Scratch()


class MinHash:
    """Signatures under a secret key. Pure and thread-safe; memory: 2 MiB a thread, 30 bytes a character at work.

    Without the key nobody can compute the signature of a guessed text. It is no cryptographic hash, though: someone who
    can have texts of his choice signed and read the signatures might work the key out.
    """

    __slots__ = ("_chars_max", "_multipliers", "_powers")

    def __init__(self, key: bytes, *, chars_max: int = 8192) -> None:
        """Text beyond `chars_max` characters is left out."""
        stream = np.frombuffer(hashlib.shake_256(key).digest(8 * (MINHASH_PLACES + SHINGLE_CHARS)), dtype="<u8")
        odd = stream | np.uint64(1)
        self._powers, self._multipliers = odd[:SHINGLE_CHARS], odd[SHINGLE_CHARS:].astype(np.uint32)
        self._chars_max = chars_max

    def signature(self, text: str) -> NDArray[np.uint32]:
        """64 places; a text shorter than a 5-gram counts as one. Raises ValueError for an empty text."""
        normal = unicodedata.normalize("NFC", text[: self._chars_max])
        if not normal:
            raise ValueError("an empty text has no signature")
        shingles = self._shingles(normal)
        least = self._least(shingles[:_BLOCK])
        for start in range(_BLOCK, len(shingles), _BLOCK):
            np.minimum(least, self._least(shingles[start : start + _BLOCK]), out=least)
        return least

    def _least(self, shingles: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Of at most a block of shingles the least hash for each place."""
        table = _scratch.table[: MINHASH_PLACES * len(shingles)].reshape(MINHASH_PLACES, -1)
        np.multiply(self._multipliers[:, None], shingles, out=table)
        least: NDArray[np.uint32] = np.minimum.reduce(table, axis=1)
        return least

    def _shingles(self, text: str) -> NDArray[np.uint32]:
        """One keyed hash for each 5-gram: a polynomial of its code points, mixed."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype("<u8")
        if len(codes) < SHINGLE_CHARS:
            codes = np.pad(codes, (0, SHINGLE_CHARS - len(codes)))
        count = len(codes) - SHINGLE_CHARS + 1
        if count <= _SHORT:
            mixed = np.correlate(codes, self._powers, "valid")
        else:
            mixed = codes[:count] * self._powers[0]
            for place in range(1, SHINGLE_CHARS):
                mixed += codes[place : place + count] * self._powers[place]
        halves = mixed.view("<u4")
        low, high = halves[::2], halves[1::2]
        low ^= high
        mixed *= _MIXER
        both: NDArray[np.uint32] = low ^ high
        return both

    def encode(self, text: str) -> str:
        """The signature as events carry it; empty for an empty text."""
        return base64.b64encode(self.signature(text).astype("<u4", copy=False).data).decode("ascii") if text else ""


def similarity(one: str, other: str) -> float:
    """The estimated Jaccard similarity of two encoded signatures of the same key, 0 to 1. Raises ValueError."""
    a, b = (np.frombuffer(base64.b64decode(text, validate=True), dtype="<u4") for text in (one, other))
    if len(a) != MINHASH_PLACES or len(b) != MINHASH_PLACES:
        raise ValueError(f"a signature has {MINHASH_PLACES} places")
    return float(np.count_nonzero(a == b)) / MINHASH_PLACES
