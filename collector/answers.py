"""An answer as it comes from the engine: counts its tokens, gathers its text, holds it back, withholds it.

Works on the engine's output objects by their attributes and imports nothing of it: `outputs` with `index`, `text`,
`token_ids`, `finish_reason`, `logprobs`, and `finished` over all of them. Memory: the text and token ids of one answer
where a guard judges it, and the held outputs.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Final, Literal

from collector.holdback import Piece

Kind = Literal["final", "delta", "cumulative"]
FILTERED: Final = "content_filter"
_FINISH_ORDER: Final = ("error", "abort", "length", "stop")
"""Of several choices' reasons the first of these is the event's."""


class Answer:
    """One engine request's answer; n choices are one answer."""

    __slots__ = ("_decode", "_finish", "_lengths", "_texts", "_token_ids", "held", "kind", "slack")

    def __init__(
        self, kind: Kind, *, keep_text: bool, decode: Callable[[Sequence[int]], str] | None = None, slack: int = 0
    ) -> None:
        """`decode`: gives the text of token ids where the engine gives none. `slack`: characters that the tokens of an
        output can be ahead of its text."""
        self.kind, self._decode, self.slack = kind, decode, slack
        self._lengths: dict[int, int] = {}
        self._finish: dict[int, str] = {}
        self._texts: dict[int, list[str]] | None = {} if keep_text else None
        self._token_ids: dict[int, list[int]] = {}
        self.held: list[Any] = []

    def see(self, output: Any) -> None:
        """Take note of one output."""
        for choice in output.outputs:
            length = len(choice.token_ids)
            whole = self.kind != "delta"
            self._lengths[choice.index] = length if whole else self._lengths.get(choice.index, 0) + length
            if choice.finish_reason is not None:
                self._finish[choice.index] = str(choice.finish_reason)
            if self._texts is None:
                continue
            kept = self._texts.setdefault(choice.index, [])
            ids = self._token_ids.setdefault(choice.index, [])
            if whole:
                kept.clear()
                ids.clear()
            kept.append(choice.text)
            if self._decode is not None:
                ids.extend(choice.token_ids)

    @property
    def token_count(self) -> int:
        """Tokens of all choices that have been seen."""
        return sum(self._lengths.values())

    @property
    def finish_reason(self) -> str:
        """The worst of the choices' reasons; empty while none has finished."""
        reasons = self._finish.values()
        return next((reason for reason in _FINISH_ORDER if reason in reasons), min(reasons, default=""))

    def texts(self) -> list[str]:
        """The text of each choice, whole."""
        texts = []
        for index, pieces in (self._texts or {}).items():
            text = "".join(pieces)
            if not text and self._decode is not None and self._token_ids[index]:
                text = self._decode(self._token_ids[index])
            texts.append(text)
        return texts

    @property
    def in_pieces(self) -> bool:
        """Whether its text can be judged as it comes."""
        return self._texts is not None and self._decode is None

    def pieces(self, output: Any) -> list[Piece]:
        """The texts in one output, where they are judged."""
        if self._texts is None:
            return []
        return [Piece(choice.index, choice.text, choice.index) for choice in output.outputs]

    def ended(self, output: Any) -> list[int]:
        """The choices that end with this output."""
        return [choice.index for choice in output.outputs if choice.finish_reason is not None]

    def withhold(self, output: Any, fixed_text: str, held: Sequence[Any] = ()) -> Any:
        """`output`, now the last one, with the text of every choice replaced: all go when one is blocked.

        What was held is dropped; choices that had finished in it, and those that are still under way, finish here.
        """
        held = [*held, *self.held, output]
        choices = {choice.index: choice for earlier in held for choice in earlier.outputs}
        for index in set(self._lengths) - set(self._finish) - set(choices):
            choices[index] = copy(output.outputs[0])
            choices[index].index = index
        self.held.clear()
        for choice in choices.values():
            choice.text = fixed_text
            choice.token_ids = []
            choice.logprobs = None if choice.logprobs is None else []
            choice.cumulative_logprob = None
            choice.finish_reason = FILTERED
            choice.stop_reason = None
        output.outputs = [choices[index] for index in sorted(choices)]
        output.finished = True
        self._finish = dict.fromkeys(choices, FILTERED)
        return output
