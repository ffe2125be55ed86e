"""Long answers are High only where guards suspected one of them; runs cut at their limit are counted."""

import msgspec
import pytest

from collector.event import Adapter, Decision, GuardResult, Status
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


def test_who_hangs_up_before_the_end_is_told_as_who_does_not() -> None:
    """The same answers, each broken off by the client when he had it."""
    statuses: tuple[Status, Status] = ("ok", "aborted")
    found: dict[Status, list[Finding]] = {}
    for status in statuses:
        traffic = Traffic(26)
        traffic.calm(0, 90)
        for number in range(12):
            traffic.one(90 + number, 400, 40, 512, 400, status=status)
        traffic.calm(90, 20)
        found[status] = [each for each in findings_of(traffic) if each.detector == "token_length"]
    assert found["ok"]
    assert found["aborted"] == found["ok"]


def test_a_suspected_short_answer_is_nobodys_business_here() -> None:
    """All of a calm traffic suspected: no answer is rare, so nothing is told."""
    traffic = Traffic(22)
    traffic.calm(0, 120)
    result = GuardResult(guard="leak", version="1", stage="output", decision="allow", score=0.99)
    traffic.events = [msgspec.structs.replace(event, guardrail_results=[result]) for event in traffic.events]
    assert findings_of(traffic) == []


def test_answers_cut_at_their_limit_in_a_row_are_told_though_none_is_rare() -> None:
    """One in eighty answers is as long as its limit lets it be: twenty of one user in a row are a run, twenty users
    with one each are not."""
    for users, told_users in ((1, 1), (20, 0)):
        traffic = Traffic(23)
        traffic.calm(0, 120)
        for number in range(20):
            traffic.one(121 + number / 2, 400 + number % users, 40, 48, 48)
            traffic.events[-1] = msgspec.structs.replace(traffic.events[-1], finish_reason="length")
        traffic.calm(121, 20)
        found = [each for each in findings_of(traffic) if each.detector == "token_length"]
        assert len({each.entity.id for each in found}) == told_users
        if found:
            assert found[-1].statistic.name == "run of long completions"
            assert found[-1].counts["rare"] == 0
            assert found[-1].counts["cut_at_limit_in_a_row"] >= 10


@pytest.mark.parametrize("adapter", [None, Adapter(name="reports", digest="sha256:" + "5" * 64)])
def test_each_adapter_has_its_own_usual_length(adapter: Adapter | None) -> None:
    """Long answers of an adapter that always writes long ones are told of nobody; of the bare model they are."""
    traffic = Traffic(24)
    traffic.calm(0, 90)
    for number in range(300):
        traffic.one(number * 0.3, 30 + number % 30, 40, 512, traffic.rng.randint(350, 450))
        long = Adapter(name="reports", digest="sha256:" + "5" * 64)
        traffic.events[-1] = msgspec.structs.replace(traffic.events[-1], adapter=long)
    begin = len(traffic.events)
    traffic.long_answers(90, prompts=8, users=1)
    traffic.events[begin:] = [msgspec.structs.replace(event, adapter=adapter) for event in traffic.events[begin:]]
    traffic.calm(90, 20)
    found = [each for each in findings_of(traffic) if each.detector == "token_length"]
    assert bool(found) == (adapter is None)


def test_an_adapters_name_of_signs_that_do_not_print_hides_nothing() -> None:
    """As long as an event lets it be; stage 2 reads the rollups as they lie on the topic."""
    traffic = Traffic(27)
    traffic.calm(0, 90)
    traffic.long_answers(90, prompts=8, users=1)
    traffic.calm(90, 20)
    strange = Adapter(name="\U0010ffff" * 250 + "\n", digest="sha256:" + "5" * 64)
    traffic.events = [msgspec.structs.replace(event, adapter=strange) for event in traffic.events]
    assert "token_length" in {each.detector for each in findings_of(traffic)}


def test_many_users_of_one_prompt_size_at_once_are_each_others_second_signal() -> None:
    """Eight users with four long answers each: High without any guard, and the summary says why."""
    traffic = Traffic(25)
    traffic.calm(0, 90)
    traffic.long_answers(90, span_s=40, prompts=32, users=8)
    traffic.calm(90, 50)
    last = [each for each in findings_of(traffic) if each.detector == "token_length"][-1]
    assert last.severity == "high"
    assert last.counts["guard_suspected"] == 0
    assert "other users of the same prompt size had such answers" in last.summary
