"""Runs the guards on the texts of one request and turns their judgements into verdicts.

Guarantees: every configured guard gives a verdict on every stage it covers, also after the first has blocked; a guard
that raises, hangs, answers nonsense or can't keep up gives the verdict `error`, and `on_error` decides; no call raises,
and none takes longer than the sum of the guards' deadlines. No text leaves: a verdict holds the guard's declared label
words and the class of an error, never its message.

Guards run on threads of the stack's own (`collector.guards.workers`); what was judged a moment ago is not judged again
(`collector.guards.cache`).
"""

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import structlog

from collector.event import GuardResult, Stage
from collector.guards.cache import VerdictCache
from collector.guards.config import GuardsConfig
from collector.guards.health import Health
from collector.guards.protocol import ALONE, UNSAMPLED, Context, Guard, GuardPolicy, GuardRefused, Probe
from collector.guards.remote import remote_guards
from collector.guards.verdicts import LEFT_OUT, Outcome, Post, Task, verdict, worst
from collector.guards.workers import Workers

_log = structlog.get_logger(__name__)
CHUNK_STAGES: Final[frozenset[Stage]] = frozenset({"retrieved", "tool"})
CHOSEN_MAX: Final = 4096
"""Tenants and routes whose guards are remembered."""
TELL_S: Final = 1.0
"""A guard that fails in one way is told of in the log so often: it may be each text's."""


class Holding(NamedTuple):
    """How the guards of one tenant and route judge answers."""

    blocks: bool
    """Whether any of them can block one."""
    window_chars: int | None = None
    """What each of those that can has to see in one piece; None where one must see the whole answer."""
    stepwise: frozenset[str] = frozenset()
    """Those that judge in windows."""


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
        here = guards or {}
        self._remote = {} if here else remote_guards(config)
        ready: dict[str, Guard] = {**self._remote, **here}
        built = {name: ready.get(name) or config.policy(name).build() for name in config.names}
        self._posts = tuple(_post(guard, config.policy(name)) for name, guard in built.items())
        self._chosen: dict[tuple[str, str], tuple[Post, ...]] = {}
        self._cache = VerdictCache(config.cache_entries, config.cache_ttl_s, clock_s=time.monotonic)
        self._key = os.urandom(32)
        self._lock = threading.Lock()
        self._workers = Workers(config.workers, config.stuck_max, config.text_chars_max, clock_s)
        self._errors: dict[str, int] = {}
        self._told_s: dict[tuple[str, Stage, str], float] = {}
        self.health = Health((post.guard for post in self._posts), self._canary)
        for post in self._posts:
            self._self_test(post)

    @property
    def versions(self) -> dict[str, str]:
        """Guard name to version, in order."""
        return {post.guard.name: post.guard.version for post in self._posts}

    @property
    def quick(self) -> bool:
        """Whether all that judge prompts do so here, in about a millisecond a thousand characters."""
        return all(
            post.policy.quick and post.policy.where == "process" for post in self._posts if post.stages - {"output"}
        )

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
            Task(post, stage, text, context)
            for post in self._posts_for(context)
            if guards(post.guard.name)
            for stage, text in texts
            if stage in post.stages
        ]
        verdicts = [verdict(task, outcome) for task, outcome in zip(tasks, self._known(tasks), strict=True)]
        for task, each in zip(tasks, verdicts, strict=True):
            if each.decision == "error":
                self._count_error(each)
            elif each.label != UNSAMPLED:
                self.health.scored(task.post.guard, each.stage, each.score)
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
        failed = []
        for result in results:
            if result.decision == "block":
                return True
            if result.decision == "error":
                failed.append(result)
        rules = {post.guard.name: post.rule for post in self._posts_for(context)} if failed else {}
        return any(result.guard not in rules or rules[result.guard].blocks_on_error(result.stage) for result in failed)

    def close(self) -> None:
        """Lets the idle threads end. Requests under way are finished; later ones get a thread for themselves."""
        self.health.close()
        self._workers.close()
        for guard in self._remote.values():
            guard.close()

    def _posts_for(self, context: Context) -> tuple[Post, ...]:
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

    def _known(self, tasks: Sequence[Task]) -> list[Outcome]:
        """The outcomes of the tasks: those that sampling leaves out, those that are kept, and those that are made."""
        found: list[Outcome | None] = []
        keys: list[bytes] = []
        for task in tasks:
            left_out = task.post.left_out(task.text, task.context, self._draw)
            too_long = len(task.text) > self._config.text_chars_max
            key = b"" if left_out or too_long else self._cache.key(task.post.guard, task.stage, task.text, task.context)
            kept = LEFT_OUT if left_out else self._cache.get(key)
            keys.append(key)
            found.append(None if kept is None else Outcome(kept, "", 0.0))
        made = iter(
            self._workers.outcomes([task for task, outcome in zip(tasks, found, strict=True) if outcome is None])
        )
        outcomes = [next(made) if outcome is None else outcome for outcome in found]
        for key, before, outcome in zip(keys, found, outcomes, strict=True):
            if before is None and outcome.judgement is not None:
                self._cache.put(key, outcome.judgement)
        return outcomes

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
        judgement = self._workers.outcomes([Task(post, probe.stage, probe.text, probe.context)])[0].judgement
        return None if judgement is None else judgement.block

    def _self_test(self, post: Post) -> None:
        """Raises `GuardRefused` unless the guard answers its probes as it should, a block and a pass at the least."""
        name, probes = post.guard.name, post.guard.probes
        if not probes and name in self._remote:
            return  # the sidecar is not there yet; it tests its guards before it answers
        if {probe.block for probe in probes} != {True, False}:
            raise GuardRefused(f"the {name} guard did not start: it has no self-test with a block and a pass")
        for number, probe in enumerate(probes):
            outcome = self._workers.outcomes([Task(post, probe.stage, probe.text, probe.context)])[0]
            if outcome.judgement is None:
                raise GuardRefused(f"the {name} guard did not start: self-test {number} failed with {outcome.error}")
            if outcome.judgement.block is not probe.block:
                found = "found nothing in a known attack" if probe.block else "blocked a known harmless text"
                raise GuardRefused(f"the {name} guard did not start: self-test {number} {found}")


def _post(guard: Guard, policy: GuardPolicy) -> Post:
    stages = guard.stages if policy.stages is None else policy.stages
    if not stages <= guard.stages:
        odd = ", ".join(sorted(stages - guard.stages))
        raise GuardRefused(f"the {guard.name} guard did not start: it can't judge {odd} (guards.{guard.name}.stages)")
    return Post(guard, policy, stages, policy.rule())
