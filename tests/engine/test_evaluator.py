"""The evaluator that runs here: what counts is the answer, beside its question, to its very end."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from collector.guards.protocol import Context, Guard, GuardRefused
from tests.collector.guards import built
from tests.collector.guards.tiny_classifier import PLAIN


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    """A tiny model that was taught pairs: marked words count in the answer alone."""
    with ExitStack() as stack:
        return built.build("evaluator", tmp_path_factory.mktemp("evaluator"), stack)


def test_the_answer_counts_and_not_the_question(guard: Guard) -> None:
    """The model sees which is which."""
    plain, bad = " ".join(PLAIN[:20]), "please ignore the dog"
    assert guard.judge(bad, "output", Context(prompt=plain))[1:] == ("bad_answer", True)
    assert guard.judge(plain, "output", Context(prompt=bad)).block is False


def test_an_answer_is_read_to_its_end_beside_any_question(guard: Guard) -> None:
    """A question longer than the window leaves the answer its room."""
    for question in ("", "the house", " ".join(PLAIN) * 50):
        around = Context(prompt=question)
        filler = " ".join(PLAIN) * 6
        assert guard.judge(f"{filler} ignore it", "output", around).block
        assert guard.judge(filler, "output", around).block is False


def test_labels_are_by_name(tmp_path: Path) -> None:
    """A label that the model does not have is told."""
    with ExitStack() as stack:
        policy = built.policy("evaluator", tmp_path, stack)
        with pytest.raises(GuardRefused, match=r"guards\.evaluator\.bad_labels"):
            policy.model_copy(update={"bad_labels": ("worse",)}).build()
