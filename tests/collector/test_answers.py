"""An answer's tokens, text and end, in each of the ways that the engine gives them."""

from types import SimpleNamespace
from typing import Any

import pytest

from collector.answers import Answer, Kind


def output(*choices: tuple[int, str, list[int], str | None], finished: bool = False) -> Any:
    """The engine's output object, as far as answers read it."""
    made = [
        SimpleNamespace(
            index=index,
            text=text,
            token_ids=ids,
            finish_reason=reason,
            logprobs=[{}] if ids else None,
            cumulative_logprob=-1.0,
            stop_reason=None,
        )
        for index, text, ids, reason in choices
    ]
    return SimpleNamespace(outputs=made, finished=finished)


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [
        ("delta", [("he", [1]), ("llo", [2, 3])]),
        ("cumulative", [("he", [1]), ("hello", [1, 2, 3])]),
        ("final", [("hello", [1, 2, 3])]),
    ],
)
def test_tokens_and_text_are_the_whole_answers(kind: Kind, pieces: list[tuple[str, list[int]]]) -> None:
    """Whether the engine gives pieces, all so far, or all at the end."""
    answer = Answer(kind, keep_text=True)
    for place, (text, ids) in enumerate(pieces):
        answer.see(output((0, text, ids, "stop" if place == len(pieces) - 1 else None)))
    assert (answer.token_count, answer.texts(), answer.finish_reason) == (3, ["hello"], "stop")


def test_choices_are_counted_together_and_the_worst_end_is_told() -> None:
    """n = 3 is one answer."""
    answer = Answer("delta", keep_text=True)
    answer.see(output((0, "a", [1], "stop"), (1, "b", [2], None)))
    answer.see(output((1, "c", [3], "length"), (2, "d", [4, 5], "stop")))
    assert (answer.token_count, answer.texts(), answer.finish_reason) == (5, ["a", "bc", "d"], "length")


def test_text_is_kept_only_where_it_is_judged() -> None:
    """Without a guard for answers no word of them stays in memory."""
    answer = Answer("delta", keep_text=False)
    answer.see(output((0, "a", [1], None)))
    assert (answer.token_count, answer.texts()) == (1, [])


def test_token_ids_without_text_are_decoded() -> None:
    """Asking the engine not to detokenise does not evade the guards."""
    answer = Answer("delta", keep_text=True, decode=lambda ids: "-".join(map(str, ids)))
    answer.see(output((0, "", [1, 2], None)))
    answer.see(output((0, "", [3], "length")))
    assert answer.texts() == ["1-2-3"]


def test_a_withheld_answer_has_the_fixed_text_and_nothing_else() -> None:
    """Every choice ends here, those that had ended in held outputs too; ids and probabilities are gone."""
    answer = Answer("delta", keep_text=True)
    held = output((0, "bad", [1], "stop"), (1, "b", [2], None))
    last = output((1, "ad", [3], "length"), finished=True)
    for piece in (held, last):
        answer.see(piece)
    answer.held.append(held)
    told = answer.withhold(last, "withheld")
    assert answer.held == []
    assert (answer.finish_reason, answer.token_count) == ("content_filter", 3)
    assert [
        (c.index, c.text, c.token_ids, c.finish_reason, c.logprobs, c.cumulative_logprob) for c in told.outputs
    ] == [(0, "withheld", [], "content_filter", [], None), (1, "withheld", [], "content_filter", [], None)]
