"""Keyed MinHash: lets near-duplicates of a text meet without the text.

A. Broder, "On the resemblance and containment of documents" (1997): the share of equal places of two signatures
estimates the Jaccard similarity of the texts' sets of character 5-grams; standard error at most 1/16 with 64 places.
"""

import base64
import hashlib
import unicodedata
from typing import Final

import numpy as np
from numpy.typing import NDArray

MINHASH_PLACES: Final = 64
SHINGLE_CHARS: Final = 5
_BLOCK: Final = 2048
"""Up to so many shingles all places are computed at once: 64 × 2,048 uint32 stay in the processor's cache."""


class MinHash:
    """Signatures under a secret key. Pure and thread-safe; memory while it works: 0.6 MB, or 30 bytes a character.

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
        if len(shingles) <= _BLOCK:
            table: NDArray[np.uint32] = self._multipliers[:, None] * shingles[None, :]
            lowest: NDArray[np.uint32] = np.min(table, axis=1)
            return lowest
        # The same, place by place: the whole table would not fit the processor's cache.
        hashed = np.empty_like(shingles)
        least = np.empty(MINHASH_PLACES, dtype=np.uint32)
        for place, multiplier in enumerate(self._multipliers):
            least[place] = np.multiply(shingles, multiplier, out=hashed).min()
        return least

    def _shingles(self, text: str) -> NDArray[np.uint32]:
        """One keyed hash for each 5-gram: a polynomial of its code points, mixed."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
        if len(codes) < SHINGLE_CHARS:
            codes = np.pad(codes, (0, SHINGLE_CHARS - len(codes)))
        count = len(codes) - SHINGLE_CHARS + 1
        mixed = codes[:count] * self._powers[0]
        for place in range(1, SHINGLE_CHARS):
            mixed += codes[place : place + count] * self._powers[place]
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(0xD6E8FEB86659FD93)  # any odd number with its bits well spread
        mixed ^= mixed >> np.uint64(32)
        low: NDArray[np.uint32] = mixed.astype(np.uint32)
        return low

    def encode(self, text: str) -> str:
        """The signature as events carry it; empty for an empty text."""
        return base64.b64encode(self.signature(text).astype("<u4").tobytes()).decode("ascii") if text else ""


def similarity(one: str, other: str) -> float:
    """The estimated Jaccard similarity of two encoded signatures of the same key, 0 to 1. Raises ValueError."""
    a, b = (np.frombuffer(base64.b64decode(text, validate=True), dtype="<u4") for text in (one, other))
    if len(a) != MINHASH_PLACES or len(b) != MINHASH_PLACES:
        raise ValueError(f"a signature has {MINHASH_PLACES} places")
    return float(np.count_nonzero(a == b)) / MINHASH_PLACES
