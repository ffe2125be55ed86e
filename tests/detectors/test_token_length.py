"""Long answers are High only where guards suspected one of them; runs cut at their limit are counted."""

import msgspec
import pytest

from collector.event import Decision, GuardResult
from detectors.finding import Finding
from tests.detectors.test_findings import findings_of
from tests.sim.traffic import Traffic


def told(scores: list[float], decision: Decision = "allow", finish: str = "stop") -> list[Finding]:
    """A minute and a half of calm, then long answers by one user with these guard scores."""
    traffic = Traffic(21)
    traffic.calm(0, 90)
    traffic.long_answers(90, prompts=len(scores), users=1)
    long = [number for number, event in enumerate(traffic.events) if event.max_tokens == 512]
    for number, score in zip(long, scores, strict=True):
        result = GuardResult(guard="leak", version="1", stage="output", decision=decision, score=score)
        traffic.events[number] = msgspec.structs.replace(
            traffic.events[number], guardrail_results=[result], finish_reason=finish
        )
    traffic.calm(90, 20)
    return [each for each in findings_of(traffic) if each.detector == "token_length"]


def test_one_suspected_answer_makes_it_high() -> None:
    """And the summary and counts say how many."""
    last = told([0.1, 0.9, 0.2, 0.1, 0.1, 0.8])[-1]
    assert last.severity == "high"
    assert last.counts["guard_suspected"] == 2
    assert last.summary.endswith("; guards suspected 2 of them")


@pytest.mark.parametrize(("score", "decision"), [(0.1, "allow"), (0.5, "allow"), (0.9, "error")])
def test_length_alone_is_never_high(score: float, decision: Decision) -> None:
    """Nor with a score that only reaches the configured one, nor with that of a guard that failed."""
    found = told([score] * 8, decision)
    assert found
    assert {each.severity for each in found} == {"low"}
    assert all(each.counts["guard_suspected"] == 0 for each in found)


def test_a_run_that_is_cut_at_its_limit_is_counted() -> None:
    """finish_reason=length, again and again."""
    assert told([0.1] * 8, finish="length")[-1].counts["cut_at_limit_in_a_row"] == 8
    assert told([0.1] * 8)[-1].counts["cut_at_limit_in_a_row"] == 0


def test_a_suspected_short_answer_is_nobodys_business_here() -> None:
    """All of a calm traffic suspected: no answer is rare, so nothing is told."""
    traffic = Traffic(22)
    traffic.calm(0, 120)
    result = GuardResult(guard="leak", version="1", stage="output", decision="allow", score=0.99)
    traffic.events = [msgspec.structs.replace(event, guardrail_results=[result]) for event in traffic.events]
    assert findings_of(traffic) == []
