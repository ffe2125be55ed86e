"""Runs the guards on the texts of one request and turns their judgements into verdicts.

Guarantees: every configured guard gives a verdict on every stage it covers, also after the first has blocked; a guard
that raises, hangs, answers nonsense or can't keep up gives the verdict `error`, and `on_error` decides; no call raises,
and none takes longer than the sum of the guards' deadlines. No text leaves: a verdict holds the guard's declared label
words and the class of an error, never its message.

Guards run on threads of the stack's own, since a thread is the only thing in one process that can be left behind when
a guard hangs. Bounds: `workers` requests at a time, `stuck_max` hung calls a guard; beyond those, errors at once.
"""

import hashlib
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import structlog

from collector.event import Decision, GuardResult, Stage
from collector.guards.cache import VerdictCache
from collector.guards.config import GuardsConfig
from collector.guards.health import Health
from collector.guards.policy import Rule
from collector.guards.protocol import ALONE, UNSAMPLED, Context, Guard, GuardPolicy, GuardRefused, Judgement, Probe
from collector.guards.remote import remote_guards

_log = structlog.get_logger(__name__)
CHUNK_STAGES: Final[frozenset[Stage]] = frozenset({"retrieved", "tool"})
CHOSEN_MAX: Final = 4096
"""Tenants and routes whose guards are remembered."""
TELL_S: Final = 1.0
"""A guard that fails in one way is told of in the log so often: it may be each text's."""
_LEFT_OUT: Final = Judgement(0.0, UNSAMPLED, block=False)
_WORST: Final[dict[Decision, int]] = {"allow": 0, "shadow": 1, "error": 2, "block": 3}


class BadJudgement(Exception):
    """A guard's answer is no judgement: a score that is no number in [0, 1], an undeclared label, a wrong shape."""


class Holding(NamedTuple):
    """How the guards of one tenant and route judge answers."""

    blocks: bool
    """Whether any of them can block one."""
    window_chars: int | None = None
    """What each of those that can has to see in one piece; None where one must see the whole answer."""
    stepwise: frozenset[str] = frozenset()
    """Those that judge in windows."""


class _Post(NamedTuple):
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


class _Task(NamedTuple):
    """One guard's work on one text."""

    post: _Post
    stage: Stage
    text: str
    context: Context

    @property
    def deadline_s(self) -> float:
        policy = self.post.policy
        return (policy.deadline_ms + policy.deadline_ms_per_kchar * len(self.text) / 1000) / 1000


class _Outcome(NamedTuple):
    judgement: Judgement | None
    error: str
    latency_ms: float


@dataclass(slots=True, repr=False)
class _Job:
    """The tasks of one request, done in turn by one worker."""

    tasks: Sequence[_Task]
    done: "queue.SimpleQueue[_Outcome]" = field(default_factory=queue.SimpleQueue)
    abandoned: bool = False
    """Set by the caller when a deadline has passed: the worker ends as soon as the hung guard returns."""


class GuardStack:
    """The guards of one process. Thread-safe; synchronous, so run it in a thread pool from an event loop.

    `guards` replaces the guards built from the config, by name (tests). Raises `GuardRefused` when a guard can't start
    or fails its self-test.
    """

    def __init__(
        self,
        config: GuardsConfig,
        *,
        guards: Mapping[str, Guard] | None = None,
        clock_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config = config
        self._clock_s = clock_s
        here = guards or {}
        self._remote = {} if here else remote_guards(config)
        ready: dict[str, Guard] = {**self._remote, **here}
        built = {name: ready.get(name) or config.policy(name).build() for name in config.names}
        self._posts = tuple(_post(guard, config.policy(name)) for name, guard in built.items())
        self._chosen: dict[tuple[str, str], tuple[_Post, ...]] = {}
        self._cache = VerdictCache(config.cache_entries, config.cache_ttl_s, clock_s=time.monotonic)
        self._key = os.urandom(32)
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[_Job | None]] = []
        self._slots = threading.Semaphore(config.workers)
        self._stuck: dict[str, int] = dict.fromkeys(built, 0)
        self._errors: dict[str, int] = {}
        self._told_s: dict[tuple[str, Stage, str], float] = {}
        self._closed = False
        self.health = Health((post.guard for post in self._posts), self._canary)
        for post in self._posts:
            self._self_test(post)

    @property
    def versions(self) -> dict[str, str]:
        """Guard name to version, in order."""
        return {post.guard.name: post.guard.version for post in self._posts}

    @property
    def stages(self) -> frozenset[Stage]:
        """Those that any guard judges."""
        return frozenset(stage for post in self._posts for stage in post.stages)

    def watch(self, tell: Callable[..., object]) -> None:
        """Tell (`subject`, `before`, `after`) when a guard of the sidecar has another version than it had."""
        for guard in self._remote.values():
            guard.watch(tell)

    def errors(self) -> dict[str, int]:
        """Guard name to the number of texts it failed to judge since the start (for heartbeats)."""
        with self._lock:
            return dict(self._errors)

    def holding(self, context: Context = ALONE) -> Holding:
        """How answers are to be held back. A guard that only watches holds nothing up."""
        ruling = [
            post
            for post in self._posts_for(context)
            if "output" in post.stages
            and post.rule.mode_at("output") == "enforce"
            and not (context.prompt and post.left_out("", context, self._draw))
        ]
        chars = [int(getattr(post.guard, "window_chars", 0)) for post in ruling]
        if not all(chars):
            return Holding(blocks=True)
        return Holding(bool(ruling), max(chars, default=0), frozenset(post.guard.name for post in ruling))

    def judge(
        self,
        texts: Sequence[tuple[Stage, str]],
        context: Context = ALONE,
        *,
        guards: Callable[[str], bool] = lambda _: True,
    ) -> list[GuardResult]:
        """One verdict for each guard and stage present in `texts`, in the guards' order; the worst of several texts.

        `guards`: which of them judge, by name.

        At most 16 guards × 4 stages = 64 verdicts, whatever the number of texts. `latency_ms` is the sum over the
        texts. Never raises.
        """
        tasks = [
            _Task(post, stage, text, context)
            for post in self._posts_for(context)
            if guards(post.guard.name)
            for stage, text in texts
            if stage in post.stages
        ]
        verdicts = [_verdict(task, outcome) for task, outcome in zip(tasks, self._known(tasks), strict=True)]
        for task, verdict in zip(tasks, verdicts, strict=True):
            if verdict.decision == "error":
                self._count_error(verdict)
            elif verdict.label != UNSAMPLED:
                self.health.scored(task.post.guard, verdict.stage, verdict.score)
        return worst(verdicts)

    def drops(self, context: Context) -> bool:
        """Whether any guard takes out chunks that it blocks, for this tenant and route."""
        return any(
            post.rule.drops(stage) and post.rule.mode_at(stage) == "enforce"
            for post in self._posts_for(context)
            for stage in post.stages & CHUNK_STAGES
        )

    def takes_out(self, results: Iterable[GuardResult], context: Context) -> bool:
        """Whether these verdicts on one chunk mean that it is taken out: each guard that blocks it would have it so."""
        rules = {post.guard.name: post.rule for post in self._posts_for(context)}
        ruling = [each for each in results if self.blocks([each], context)]
        return bool(ruling) and all(rules[each.guard].drops(each.stage) for each in ruling)

    def blocks(self, results: Iterable[GuardResult], context: Context = ALONE) -> bool:
        """Whether these verdicts mean that the request is blocked. An error blocks where `on_error` says so."""
        rules = {post.guard.name: post.rule for post in self._posts_for(context)}
        for result in results:
            if result.decision == "block":
                return True
            rule = rules.get(result.guard)
            if result.decision == "error" and (rule is None or rule.blocks_on_error(result.stage)):
                return True
        return False

    def close(self) -> None:
        """Lets the idle threads end. Requests under way are finished; later ones get a thread for themselves."""
        self.health.close()
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for inbox in idle:
            inbox.put(None)
        for guard in self._remote.values():
            guard.close()

    def _posts_for(self, context: Context) -> tuple[_Post, ...]:
        """The guards of one tenant and route, in its order, with what holds there."""
        where = (context.tenant, context.route)
        chosen = self._chosen.get(where)
        if chosen is None:
            posts = {post.guard.name: post for post in self._posts}
            names = self._config.order_for(*where)
            chosen = tuple(posts[name]._replace(rule=posts[name].policy.rule(*where)) for name in names)
            if len(self._chosen) >= CHOSEN_MAX:
                self._chosen.clear()
            self._chosen[where] = chosen
        return chosen

    def _draw(self, text: str) -> str:
        """Where no tenant's key is at hand."""
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=self._key).hexdigest()

    def _known(self, tasks: Sequence[_Task]) -> list[_Outcome]:
        """The outcomes of the tasks: those that sampling leaves out, those that are kept, and those that are made."""
        found: list[_Outcome | None] = []
        keys: list[bytes] = []
        for task in tasks:
            left_out = task.post.left_out(task.text, task.context, self._draw)
            too_long = len(task.text) > self._config.text_chars_max
            key = b"" if left_out or too_long else self._cache.key(task.post.guard, task.stage, task.text, task.context)
            kept = _LEFT_OUT if left_out else self._cache.get(key)
            keys.append(key)
            found.append(None if kept is None else _Outcome(kept, "", 0.0))
        made = iter(self._outcomes([task for task, outcome in zip(tasks, found, strict=True) if outcome is None]))
        outcomes = [next(made) if outcome is None else outcome for outcome in found]
        for key, before, outcome in zip(keys, found, outcomes, strict=True):
            if before is None and outcome.judgement is not None:
                self._cache.put(key, outcome.judgement)
        return outcomes

    def _outcomes(self, tasks: Sequence[_Task]) -> list[_Outcome]:
        outcomes: list[_Outcome] = []
        while len(outcomes) < len(tasks):
            refused = self._refuse(tasks[len(outcomes)])
            if refused is not None:
                outcomes.append(refused)
                continue
            stop = next(
                (i for i in range(len(outcomes) + 1, len(tasks)) if self._refuse(tasks[i]) is not None), len(tasks)
            )
            outcomes += self._run(tasks[len(outcomes) : stop])
        return outcomes

    def _refuse(self, task: _Task) -> _Outcome | None:
        """The error of a task that must not run at all."""
        if len(task.text) > self._config.text_chars_max:
            return _Outcome(None, "TextTooLong", 0.0)
        if self._stuck[task.post.guard.name] >= self._config.stuck_max:
            return _Outcome(None, "Stuck", 0.0)
        return None

    def _run(self, tasks: Sequence[_Task]) -> list[_Outcome]:
        """The outcomes of the tasks in turn, up to and including the first that missed its deadline."""
        if not self._slots.acquire(timeout=tasks[0].deadline_s):
            return [_Outcome(None, "Overloaded", tasks[0].deadline_s * 1000)]
        job = _Job(tasks)
        inbox = self._worker()
        inbox.put(job)
        outcomes: list[_Outcome] = []
        for task in tasks:
            outcomes.append(self._await(job, task))
            if job.abandoned:
                break
        else:
            self._release(inbox)
        self._slots.release()
        return outcomes

    def _await(self, job: _Job, task: _Task) -> _Outcome:
        """The outcome of the job's next task; where the deadline passes first, the worker is given up with it."""
        try:
            return job.done.get(timeout=task.deadline_s)
        except queue.Empty:
            pass
        with self._lock:  # under the lock a worker puts its outcome either before this look or never
            try:
                return job.done.get_nowait()
            except queue.Empty:
                job.abandoned = True
                self._stuck[task.post.guard.name] += 1
        return _Outcome(None, "DeadlineExceeded", task.deadline_s * 1000)

    def _release(self, inbox: "queue.SimpleQueue[_Job | None]") -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(inbox)
                return
        inbox.put(None)

    def _worker(self) -> "queue.SimpleQueue[_Job | None]":
        with self._lock:
            if self._idle:
                return self._idle.pop()
        inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(inbox,), name="guards", daemon=True).start()
        return inbox

    def _work(self, inbox: "queue.SimpleQueue[_Job | None]") -> None:
        """A worker's life: one job after the other, until it is told to end or was given up."""
        while (job := inbox.get()) is not None:
            for task in job.tasks:
                outcome = _attempt(task, self._clock_s)
                with self._lock:
                    if job.abandoned:
                        self._stuck[task.post.guard.name] -= 1
                        return
                    job.done.put(outcome)
            del job, task, outcome  # an idle worker keeps no text alive

    def _count_error(self, result: GuardResult) -> None:
        what = (result.guard, result.stage, result.error)
        with self._lock:
            self._errors[result.guard] = count = self._errors.get(result.guard, 0) + 1
            now_s = time.monotonic()
            if now_s - self._told_s.get(what, -math.inf) < TELL_S:
                return
            self._told_s[what] = now_s
        _log.warning("guard failed", guard=what[0], stage=what[1], error=what[2], texts_so_far=count)

    def _canary(self, guard: Guard, probe: Probe) -> bool | None:
        """What a guard says to a probe now; None where it failed."""
        post = next(post for post in self._posts if post.guard is guard)
        judgement = self._outcomes([_Task(post, probe.stage, probe.text, probe.context)])[0].judgement
        return None if judgement is None else judgement.block

    def _self_test(self, post: _Post) -> None:
        """Raises `GuardRefused` unless the guard answers its probes as it should, a block and a pass at the least."""
        name, probes = post.guard.name, post.guard.probes
        if not probes and name in self._remote:
            return  # the sidecar is not there yet; it tests its guards before it answers
        if {probe.block for probe in probes} != {True, False}:
            raise GuardRefused(f"the {name} guard did not start: it has no self-test with a block and a pass")
        for number, probe in enumerate(probes):
            outcome = self._outcomes([_Task(post, probe.stage, probe.text, probe.context)])[0]
            if outcome.judgement is None:
                raise GuardRefused(f"the {name} guard did not start: self-test {number} failed with {outcome.error}")
            if outcome.judgement.block is not probe.block:
                found = "found nothing in a known attack" if probe.block else "blocked a known harmless text"
                raise GuardRefused(f"the {name} guard did not start: self-test {number} {found}")


def _post(guard: Guard, policy: GuardPolicy) -> _Post:
    stages = guard.stages if policy.stages is None else policy.stages
    if not stages <= guard.stages:
        odd = ", ".join(sorted(stages - guard.stages))
        raise GuardRefused(f"the {guard.name} guard did not start: it can't judge {odd} (guards.{guard.name}.stages)")
    return _Post(guard, policy, stages, policy.rule())


def _attempt(task: _Task, clock_s: Callable[[], float]) -> _Outcome:
    """One call of a guard, whatever it does."""
    start_s = clock_s()
    try:
        judgement: Judgement | None = checked(
            task.post.guard, task.post.guard.judge(task.text, task.stage, task.context)
        )
        error = ""
    except BaseException as problem:  # noqa: BLE001 - SystemExit too: whatever a guard raises is its verdict's business
        judgement, error = None, type(problem).__name__[:64]
    return _Outcome(judgement, error, max(0.0, (clock_s() - start_s) * 1000))


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


def _verdict(task: _Task, outcome: _Outcome) -> GuardResult:
    guard, rule = task.post.guard, task.post.rule
    decision: Decision = "error"
    if outcome.judgement is _LEFT_OUT:
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
