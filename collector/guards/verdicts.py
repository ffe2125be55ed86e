"""From a guard's answer to the verdict in the event: what an answer must be, and what policy makes of it. Pure."""

import math
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from collector.event import Decision, GuardResult, Stage
from collector.guards.policy import Rule
from collector.guards.protocol import UNSAMPLED, Context, Guard, GuardPolicy, Judgement

LEFT_OUT: Final = Judgement(0.0, UNSAMPLED, block=False)
"""Stands for the judgement on a request that sampling left out."""
_WORST: Final[dict[Decision, int]] = {"allow": 0, "shadow": 1, "error": 2, "block": 3}


class BadJudgement(Exception):
    """A guard's answer is no judgement: a score that is no number in [0, 1], an undeclared label, a wrong shape."""


class Post(NamedTuple):
    """A guard and its policy."""

    guard: Guard
    policy: GuardPolicy
    stages: frozenset[Stage]
    rule: Rule

    def left_out(self, text: str, context: Context, draw: Callable[[str], str]) -> bool:
        """Whether sampling leaves this request out: by its prompt, else by the text that is all there is of it."""
        if self.rule.sample >= 1:
            return False
        drawn = (context.draw or draw)(f"sample\0{self.guard.name}\0{context.prompt or text}")
        return int(drawn[-13:], 16) >= self.rule.sample * 16**13


class Task(NamedTuple):
    """One guard's work on one text."""

    post: Post
    stage: Stage
    text: str
    context: Context

    @property
    def deadline_s(self) -> float:
        policy = self.post.policy
        return (policy.deadline_ms + policy.deadline_ms_per_kchar * len(self.text) / 1000) / 1000


class Outcome(NamedTuple):
    """What came of a task: a judgement or the class of an error."""

    judgement: Judgement | None
    error: str
    latency_ms: float


def checked(guard: Guard, answer: object) -> Judgement:
    """The judgement in a guard's answer. Raises BadJudgement."""
    if not isinstance(answer, Judgement) or not isinstance(answer.block, bool):
        raise BadJudgement
    if isinstance(answer.score, bool) or not isinstance(answer.score, float | int):
        raise BadJudgement
    if not (math.isfinite(answer.score) and 0 <= answer.score <= 1):
        raise BadJudgement
    if not isinstance(answer.label, str) or len(answer.label) > 256:
        raise BadJudgement
    if answer.label and not set(answer.label.split("+")) <= guard.labels:
        raise BadJudgement
    return Judgement(float(answer.score), answer.label, answer.block)


def verdict(task: Task, outcome: Outcome) -> GuardResult:
    """What policy makes of an outcome."""
    guard, rule = task.post.guard, task.post.rule
    decision: Decision = "error"
    if outcome.judgement is LEFT_OUT:
        decision = "allow"
    elif outcome.judgement is not None:
        bad = outcome.judgement.block if rule.threshold is None else outcome.judgement.score >= rule.threshold
        decision = ("block" if rule.mode_at(task.stage) == "enforce" else "shadow") if bad else "allow"
    return GuardResult(
        guard=guard.name,
        version=guard.version,
        stage=task.stage,
        decision=decision,
        score=0.0 if outcome.judgement is None else outcome.judgement.score,
        label="" if outcome.judgement is None else outcome.judgement.label,
        latency_ms=outcome.latency_ms,
        error=outcome.error,
    )


def worst(results: Iterable[GuardResult]) -> list[GuardResult]:
    """For each guard and stage the worst of these verdicts, with the time of all."""
    found: dict[tuple[str, Stage], GuardResult] = {}
    for result in results:
        key = (result.guard, result.stage)
        found[key] = _worse(found[key], result) if key in found else result
    return list(found.values())


def _worse(first: GuardResult, second: GuardResult) -> GuardResult:
    """The worse of two verdicts of one guard on one stage, with the time of both."""
    rank = (_WORST[second.decision], second.score) > (_WORST[first.decision], first.score)
    kept, other = (second, first) if rank else (first, second)
    return GuardResult(
        guard=kept.guard,
        version=kept.version,
        stage=kept.stage,
        decision=kept.decision,
        score=kept.score,
        label=kept.label,
        latency_ms=kept.latency_ms + other.latency_ms,
        error=kept.error,
    )
