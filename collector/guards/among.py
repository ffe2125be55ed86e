"""How much of a passage the rest of its document speaks of, too: an order put into a document stands out by its words.

A share in [0, 1] for each window, of its words that stand elsewhere in the document; it is taken off the window's
margin. Code repeats its names and pages their subject, an errand that somebody has put in between does not. Windows
that have more than half of a window's words are copies of it and count for nothing, or an order would be hidden by
writing it twice.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from collector.guards.beside import COMMON, STEM_CHARS, WORD

OTHERS_MAX: Final = 8
"""Of a word that stands all over the document, so many windows are looked at."""


def shared(folded: str, spans: Sequence[tuple[int, int]]) -> list[float]:
    """For each (start, end) of the text the share of its words that stand in others as well. Linear in the text."""
    places, stems = [], []
    for found in WORD.finditer(folded):
        stem = found[0][:STEM_CHARS]
        if stem not in COMMON:
            places.append(found.start())
            stems.append(stem)
    windows = [frozenset(stems[bisect_left(places, start) : bisect_left(places, end)]) for start, end in spans]
    holding: dict[str, list[int]] = {}
    for number, words in enumerate(dict.fromkeys(windows)):
        for stem in words:
            held = holding.setdefault(stem, [])
            if len(held) < OTHERS_MAX:
                held.append(number)
    return [_share(words, holding) for words in windows]


def _share(words: frozenset[str], holding: Mapping[str, Sequence[int]]) -> float:
    alike = Counter(other for stem in words for other in holding[stem])
    known = sum(any(2 * alike[other] <= len(words) for other in holding[stem]) for stem in words)
    return known / max(2, len(words))
