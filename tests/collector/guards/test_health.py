"""Canaries find a guard that no longer does what it did, drift finds scores that are not what they were."""

import math
import random
import time

import pytest

from collector.event import Stage
from collector.guards.health import BINS, REFERENCE_SCORES, Scores, stability_index
from collector.guards.protocol import ALONE, Context, Judgement
from tests.collector.guards.test_stack import ActingGuard, stack_of, wait_until


class Failing(ActingGuard):
    """A guard that can go blind, deaf or down while it runs."""

    how = ""

    def judge(self, text: str, stage: Stage, context: Context = ALONE) -> Judgement:
        if self.how == "down":
            raise RuntimeError(text)
        found = super().judge(text, stage, context)
        return found if not self.how else found._replace(block=self.how == "blocks all")


@pytest.mark.parametrize(("how", "failed"), [("finds nothing", 2), ("blocks all", 2), ("down", 4)])
def test_a_guard_that_goes_wrong_is_told_and_found_healthy_again(how: str, failed: int) -> None:
    """Attacks and harmless texts in turn, past the cache; the other guard is not blamed."""
    guard, good = Failing(), ActingGuard("secrets")
    stack = stack_of(guard, good, secrets={"stages": ["input"]})
    for _ in range(4):
        stack.health.canaries()
    assert (stack.health.told()["canaries_failed"], stack.health.unhealthy) == ({}, 0)
    guard.how = how
    for _ in range(4):
        stack.health.canaries()
    assert stack.health.told()["canaries_failed"] == {"injection": failed}
    assert stack.health.told()["guards_unhealthy"] == ["injection"]
    guard.how = ""
    for _ in range(2):
        stack.health.canaries()
    assert (stack.health.failed, stack.health.told()["guards_unhealthy"]) == (failed, [])


def test_canaries_come_by_the_clock_and_leave_no_trace_in_scores() -> None:
    """On the serving path, on a thread of their own, until the stack is closed."""
    guard = Failing()
    stack = stack_of(guard)
    guard.how = "down"
    stack.health.watch(0.01)
    wait_until(lambda: stack.health.failed >= 3)
    stack.close()
    time.sleep(0.05)
    seen = stack.health.failed
    time.sleep(0.05)
    assert stack.health.failed == seen
    assert (stack.health.told()["guard_scores"], stack.errors()) == ({}, {})


def test_a_hanging_guard_fails_its_canary_within_its_deadline() -> None:
    """A canary is bounded as a request is, and costs no more threads."""
    guard = Failing()
    stack = stack_of(guard, injection={"deadline_ms": 20, "deadline_ms_per_kchar": 0})
    guard.act = None
    real = guard.judge
    guard.judge = lambda *given: (time.sleep(0.2), real(*given))[1]  # type: ignore[method-assign]  # it hangs from here
    start_s = time.monotonic()
    for _ in range(4):
        stack.health.canaries()
    assert stack.health.failed == 4
    assert time.monotonic() - start_s < 2


def test_scores_are_counted_by_tenths() -> None:
    """Of what was judged: not what failed, nor what sampling left out."""
    stack = stack_of(ActingGuard())
    for text in ("bad", "fine", "fine too"):
        stack.judge([("input", text), ("tool", text)])
    bins = [0, 0, 2, 0, 0, 0, 0, 0, 0, 1]
    assert stack.health.told()["guard_scores"] == {"injection/input": bins, "injection/tool": bins}


def test_drift_is_seen_and_sameness_is_not() -> None:
    """By the index over the first scores and the last, of one version; a new version starts anew."""
    draw = random.Random(4)  # noqa: S311 - repeatable, no secret

    def fed(scores: Scores, mean: float) -> Scores:
        for _ in range(REFERENCE_SCORES):
            scores.add(min(1.0, max(0.0, draw.gauss(mean, 0.1))))
        return scores

    scores = fed(fed(Scores("1"), 0.3), 0.3)
    assert scores.drift < 0.1
    assert fed(scores, 0.5).drift > 0.25
    assert sum(scores.all) == 3 * REFERENCE_SCORES
    assert fed(Scores("2"), 0.9).drift == 0.0


def test_the_index_is_that_of_its_definition() -> None:
    """Against a computation by hand, symmetric, 0 for the same shares."""
    first, last = [90, 10], [70, 30]
    p, q = [90.5 / 101, 10.5 / 101], [70.5 / 101, 30.5 / 101]
    by_hand = sum((b - a) * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert math.isclose(stability_index(first, last), by_hand)
    assert math.isclose(stability_index(last, first), by_hand)
    assert stability_index(first, first) == stability_index([0] * BINS, [0] * BINS) == 0.0
