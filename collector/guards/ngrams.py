"""Character and word n-grams of a text as bucket numbers, by numpy: what the classifier reads.

The hashing trick (Weinberger et al. 2009), vectorised: a 600-character window costs about 0.1 ms, a tenth of
scikit-learn's HashingVectorizer, and training and judging share this one function, so they can't drift apart.
The hash is part of the weights' meaning: changing anything here means `FORMAT` + 1 and training again.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from collector.guards.protocol import windows

FORMAT: Final = 1
SHRINK: Final = 40.0
"""N-grams' worth of doubt: a text of one word says little, so its few n-grams count for less."""
Buckets = NDArray[np.int32]

_SPACE: Final = re.compile(r"\s+")
_END: Final = re.compile(r"(?<=[.!?;])\s+|\n+")
_DIGITS: Final = re.compile(r"\d")
_BASE: Final = np.uint64(0x9E3779B97F4A7C15)
_WORD_SALT: Final = np.uint64(0xD6E8FEB86659FD93)
_SHIFT: Final = np.uint64(32)


@dataclass(frozen=True, slots=True)
class NgramSpec:
    """Which n-grams, in how many buckets, over which windows. Lengths in characters of the folded text."""

    buckets: int
    char_min: int
    char_max: int
    word_max: int
    window: int
    step: int
    sentence: int = 0
    """Windows are sentences and lines of at least so many characters, cut where longer than `window`; 0: not so."""


def fold(text: str) -> str:
    """Lower case, digits alike, white space single."""
    return _DIGITS.sub("0", _SPACE.sub(" ", text.lower()).strip())


def window_buckets(text: str, spec: NgramSpec) -> list[Buckets]:
    """For each window of the folded text the sorted distinct buckets of its n-grams. At least one window."""
    return buckets_of(*cut(text, spec), spec)


def cut(text: str, spec: NgramSpec) -> tuple[str, list[tuple[int, int]]]:
    """The folded text, a blank around each of its parts, and the (start, end) of its windows. At least one window."""
    if not spec.sentence:
        folded = f" {fold(text)} "
        return folded, list(windows(len(folded), spec.window, spec.step))
    parts = [fold(part) for part in _sentences(text, spec.sentence)] or [""]
    spans, start = [], 0
    for part in parts:
        spans += [(start + first, start + last) for first, last in windows(len(part) + 2, spec.window, spec.step)]
        start += len(part) + 1
    return f" {' '.join(parts)} ", spans


def _sentences(text: str, least: int) -> list[str]:
    """Sentences and lines, joined to the next ones until they have `least` characters. None where there is no word."""
    parts, held = [], ""
    for piece in filter(None, map(str.strip, _END.split(text))):
        held = f"{held} {piece}" if held else piece
        if len(held) >= least:
            parts.append(held)
            held = ""
    return [*parts, held] if held else parts


def buckets_of(folded: str, spans: Sequence[tuple[int, int]], spec: NgramSpec) -> list[Buckets]:
    """For each window of the folded text the sorted distinct buckets of its n-grams."""
    codes = np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    chars = _char_hashes(codes, spec)
    starts, words = _word_hashes(codes, spec)
    found = []
    for start, end in spans:
        first, last = np.searchsorted(starts, (start, end))
        parts = [hashes[start : max(start, end - size + 1)] for size, hashes in chars]
        parts += [hashes[first : max(first, last - size + 1)] for size, hashes in words]
        found.append(_distinct(np.concatenate(parts)))
    return found


def share(count: int) -> float:
    """What each of a window's `count` n-grams counts: the whole has length 1, or less where it is short."""
    return 1 / math.sqrt(count + SHRINK)


def _distinct(buckets: Buckets) -> Buckets:
    """Sorted, each once; twice as fast as numpy.unique on arrays this short."""
    buckets.sort()
    return buckets[np.flatnonzero(np.diff(buckets, prepend=np.int32(-1)))]


def _bucket(hashes: NDArray[np.uint64], buckets: int) -> Buckets:
    mixed = hashes ^ (hashes >> _SHIFT)
    mixed = mixed * _BASE
    return ((mixed >> _SHIFT) % np.uint64(buckets)).astype(np.int32)


def _char_hashes(codes: NDArray[np.uint64], spec: NgramSpec) -> list[tuple[int, Buckets]]:
    """(n, bucket of the n-gram that begins at each character)."""
    found = []
    rolled = np.zeros_like(codes)
    for size in range(1, spec.char_max + 1):
        tail = codes[size - 1 :]
        rolled = (rolled[: len(tail)] + tail + np.uint64(1)) * _BASE
        if size >= spec.char_min:
            found.append((size, _bucket(rolled + np.uint64(size), spec.buckets)))
    return found


def _word_hashes(codes: NDArray[np.uint64], spec: NgramSpec) -> tuple[NDArray[np.int64], list[tuple[int, Buckets]]]:
    """The position of each word, and (n, bucket of the word n-gram that begins at each word)."""
    inside = _is_word(codes)
    edges = np.flatnonzero(np.diff(inside.astype(np.int8)))
    starts, ends = edges[::2] + 1, edges[1::2] + 1
    if not len(starts) or not spec.word_max:
        return np.zeros(0, np.int64), []
    place = np.arange(len(codes), dtype=np.uint64)
    spread = (codes + np.uint64(1)) * _BASE
    spread = (spread ^ (spread >> _SHIFT)) * _WORD_SALT
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(spread * (place * np.uint64(2) + np.uint64(1)))))
    flat = np.concatenate((np.zeros(1, np.uint64), np.cumsum(spread)))
    moment = sums[ends] - sums[starts]
    mass = flat[ends] - flat[starts]
    one = (moment - mass * (starts.astype(np.uint64) * np.uint64(2))) * _WORD_SALT
    found = []
    rolled = np.zeros_like(one)
    for size in range(1, spec.word_max + 1):
        tail = one[size - 1 :]
        rolled = (rolled[: len(tail)] + tail) * _BASE ^ _WORD_SALT
        found.append((size, _bucket(rolled, spec.buckets)))
    return starts.astype(np.int64), found


def _is_word(codes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Letters, digits, the apostrophe, and beyond Latin-1 all but general and CJK punctuation. Blanks are none."""
    found: NDArray[np.bool_] = (
        ((codes >= 97) & (codes <= 122))
        | ((codes >= 48) & (codes <= 57))
        | (codes == 39)
        | ((codes > 0xBF) & ~((codes >= 0x2000) & (codes <= 0x206F)) & ~((codes >= 0x3000) & (codes <= 0x303F)))
    )
    return found
