"""How much of an answer may go out while guards still judge the rest: a window that follows the stream.

Pure. The answer's last `chars` characters stay behind: what is let go lies in a window that was judged with at least
so many characters after it, and the next window begins where that one let go. So everything of up to `chars` characters
is judged in one piece before any of it leaves, wherever the pieces of the stream part it. A run of visible
ASCII without a blank, such as a key, is neither judged nor let go in part, up to `RUN_CHARS_MAX`.

An answer can hold several texts: choices, reasoning, the arguments of tool calls. A text that has stopped growing is
judged and let go to its end, and what came after it in its choice counts as what came after. Should it grow again, its
end is judged once more with what follows: of what was parted so, the first part is out, and never the whole. Memory:
what is not let go, and the last `chars` characters of each text.
"""

from collections.abc import Hashable, Iterable
from typing import Final, NamedTuple

RUN_CHARS_MAX: Final = 8_192
"""A longer run is cut, lest an answer without blanks never leaves."""
STEP_CHARS_MIN: Final = 32
_VISIBLE: Final = "".join(map(chr, range(0x21, 0x7F)))


class Piece(NamedTuple):
    """Text that came with one output or frame."""

    key: Hashable
    """Which of the answer's texts it belongs to."""
    text: str
    group: int = 0
    """Which choice."""

    def __repr__(self) -> str:
        return f"Piece({len(self.text)} characters)"


class Mark(NamedTuple):
    """A place in one text of an answer."""

    key: Hashable
    chars: int


class _Text:
    """One text: `kept` begins at `start`; up to `judged` it was judged, up to `safe` it may go out."""

    __slots__ = ("group", "grown_at", "judged", "kept", "safe", "start")

    def __init__(self, group: int) -> None:
        self.group, self.kept = group, ""
        self.start = self.judged = self.safe = self.grown_at = 0

    @property
    def end(self) -> int:
        return self.start + len(self.kept)

    def edge(self, at: int) -> int:
        """The last place up to `at`, within what is kept, where no run is parted."""
        at = max(at, self.start)
        low = max(0, at - self.start - RUN_CHARS_MAX)
        segment = self.kept[low : at - self.start]
        left = len(segment.rstrip(_VISIBLE))
        return self.start + low + left if left or not low else at


class HoldBack:
    """One answer on its way out. `slack`: characters that a piece may tell beyond its text, as token ids do."""

    def __init__(self, chars: int, *, slack: int = 0) -> None:
        self._chars, self._slack = chars, slack
        self._step = max(STEP_CHARS_MIN, chars // 2)
        self._texts: dict[Hashable, _Text] = {}
        self._grown: dict[int, int] = {}
        """By group: characters so far."""
        self._new = 0

    def grow(self, key: Hashable, piece: str, group: int = 0) -> Mark:
        """A piece of a text; `group`: its choice. The mark is where the text now ends."""
        text = self._texts.get(key)
        if text is None:
            text = self._texts[key] = _Text(group)
        text.kept += piece
        self._new += len(piece)
        text.grown_at = self._grown[group] = self._grown.get(group, 0) + len(piece)
        return Mark(key, text.end)

    def grown_to(self, key: Hashable, whole: str, group: int = 0) -> Mark:
        """A text as it is now, from its beginning."""
        text = self._texts.get(key)
        return self.grow(key, whole[text.end if text is not None else 0 :], group)

    def end(self, group: int) -> None:
        """A choice has come to its end: its texts grow no more."""
        self._grown[group] = self._grown.get(group, 0) + self._chars + 1

    @property
    def due(self) -> bool:
        """Whether enough has come to judge again."""
        return self._new >= self._step

    def windows(self) -> list[str]:
        """The texts to judge now, and what `pass_` will take for judged."""
        self._new = 0
        found = []
        for text in self._texts.values():
            idle = self._grown[text.group] - text.grown_at
            to = text.end if idle else text.edge(text.end)
            if to > text.judged:
                found.append(text.kept[: to - text.start])
                text.judged = to
        return found

    def rest(self) -> list[str]:
        """At the end of the answer: what was not judged to its end."""
        return [text.kept for text in self._texts.values() if text.judged < text.end]

    def pass_(self) -> None:
        """The windows last given were judged, and none is blocked."""
        for text in self._texts.values():
            idle = self._grown[text.group] - text.grown_at
            start = text.edge(text.judged - self._chars)
            after = text.judged if idle >= self._chars else text.edge(text.judged - self._chars + idle)
            text.safe = max(text.safe, after)
            text.kept, text.start = text.kept[start - text.start :], start

    def free(self, marks: Iterable[Mark]) -> bool:
        """Whether what reaches to these places may go out."""
        return all(mark.chars + self._slack <= self._texts[mark.key].safe for mark in marks)
