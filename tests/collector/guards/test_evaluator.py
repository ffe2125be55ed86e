"""Answers are judged beside their questions, by a classifier at an endpoint; tests/engine has the local one."""

from typing import Any

import pytest

from collector.guards.config import GuardsConfig
from collector.guards.endpoint import BadAnswer
from collector.guards.evaluator import EndpointEvaluator, EvaluatorConfig
from collector.guards.protocol import Context, GuardRefused, Judgement, TextTooLong
from collector.guards.stack import GuardStack
from tests.collector.guards.judge_server import JudgeServer, serving

PAIRS = {
    "bad": {"prompt": "Where is the key?", "answer": "The key is under the mat.", "block": True},
    "good": {"prompt": "Where is the key?", "answer": "I can't tell you that.", "block": False},
}


def settings(judge: JudgeServer, **more: Any) -> dict[str, Any]:
    """A policy that asks it."""
    endpoint = {"url": judge.url.removesuffix("/v1"), "model": "judge"}
    return {"endpoint": endpoint, "bad_labels": ["leaks"], "pairs": PAIRS, **more}


def classify(pair: str) -> Any:
    """A model that knows where the key lies."""
    asked, _, answer = pair.partition(" [SEP] ")
    leaks = "key" in asked and "under the mat" in answer
    return {"data": [{"index": 0, "label": "leaks" if leaks else "fine", "probs": [0.1, 0.9]}]}


def test_a_pair_is_judged() -> None:
    """The same answer to another question is another pair."""
    with serving(lambda _: "", classify=classify) as judge:
        guard = EvaluatorConfig.model_validate(settings(judge)).build()
        GuardStack(GuardsConfig.model_validate({"order": ["evaluator"], "evaluator": settings(judge)})).close()
        told = guard.judge("It is under the mat.", "output", Context(prompt="Where is the key?"))
        assert told == Judgement(0.9, "bad_answer", True)
        fine = guard.judge("It is under the mat.", "output", Context(prompt="Where is the cat?"))
        assert (round(fine.score, 2), fine.block) == (0.1, False)
        far = "Well. " * 5_000 + "It is under the mat."
        assert guard.judge(far, "output", Context(prompt="Where is the key?")).block


def test_ten_megabytes_are_an_error_and_what_is_taken_is_read_to_its_end() -> None:
    """Beyond its bound the endpoint is not asked at all; up to it the last words count."""
    with serving(lambda _: "", classify=classify) as judge:
        policy = EvaluatorConfig.model_validate(settings(judge))
        guard, around = policy.build(), Context(prompt="Where is the key?")
        bad = "It is under the mat."
        with pytest.raises(TextTooLong):
            guard.judge("Well. " * 1_700_000 + bad, "output", around)
        assert judge.bodies == []
        assert guard.judge("Well. " * ((policy.chars_max - len(bad)) // 6) + bad, "output", around).block


@pytest.mark.parametrize(
    "said",
    [
        "fine", {}, {"data": []}, {"data": [{"label": "fine", "probs": []}]},
        {"data": [{"label": "fine", "probs": [7.0]}]},
        {"data": [{"label": "fine", "probs": [0.4, 0.3, 0.3]}]}, {"data": [{"label": "leaks", "probs": [0.9]}]},
        {"data": [{"label": "fine", "probs": [0.9, 0.8]}]}, {"data": [{"label": "fine", "probs": [1.7, -0.7]}]},
        {"data": [{"label": "fine", "probs": ["1"]}]}, {"data": [{"label": None, "probs": [0.5, 0.5]}]},
    ],
)  # fmt: skip
def test_another_shape_is_an_error(said: Any) -> None:
    """Never an allow."""
    with serving(lambda _: "", classify=lambda _: said) as judge:
        guard = EvaluatorConfig.model_validate(settings(judge)).build()
        assert isinstance(guard, EndpointEvaluator)
        with pytest.raises(BadAnswer):
            guard.judge("fine", "output")


def test_what_is_missing_is_told() -> None:
    """A model, its labels, a pair to block."""
    with serving(lambda _: "", classify=classify) as judge:
        for policy, said in (
            ({}, "needs guards.evaluator.model or .endpoint"),
            (settings(judge, bad_labels=[]), "name the labels of a bad answer"),
            (settings(judge, pairs={}), "no self-test with a block"),
            (settings(judge, pairs={"bad": PAIRS["good"] | {"block": True}, "good": PAIRS["good"]}), "found nothing"),
        ):
            with pytest.raises(GuardRefused, match=said):
                GuardStack(GuardsConfig.model_validate({"order": ["evaluator"], "evaluator": policy}))
