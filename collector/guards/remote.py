"""A guard that runs in the sidecar, as the stack sees it: it keeps to its deadline, whatever the sidecar does.

What goes wrong here or there is raised, and so an error that the stack's `on_error` decides.
"""

import time
from collections.abc import Sequence

from collector.event import Stage
from collector.guards.config import GuardsConfig
from collector.guards.protocol import ALONE, CONTEXT, Context, GuardPolicy, GuardRefused, Judgement, Probe, Text
from collector.guards.sidecar_client import Changed, Sidecar
from collector.guards.wire import BUDGET_MS_MAX, Answer, Ask, to_bytes, to_text


class FailedThere(Exception):
    """The guard failed in the sidecar; raised as a class with the name of the error there."""


class RemoteGuard:
    """One guard of the sidecar. What it says of itself is what the sidecar last said."""

    def __init__(self, name: str, policy: GuardPolicy, sidecar: Sidecar) -> None:
        """Raises GuardRefused: the sidecar has no such guard, or it is away and nobody knows what the guard judges."""
        self.name, self._policy, self._sidecar = name, policy, sidecar
        told, place = sidecar.guard(name), sidecar.config.place
        if told is None and sidecar.wait(0):
            raise GuardRefused(f'the sidecar at {place} runs no guard {name}: put it there with where = "sidecar"')
        stages = told.stages if told is not None else policy.stages or policy.able
        if not stages:
            raise GuardRefused(f"no sidecar at {place}: start it, or say guards.{name}.stages, to start without it")
        self.stages: frozenset[Stage] = stages

    @property
    def version(self) -> str:
        """As the sidecar says; `unknown` until it has been there."""
        told = self._sidecar.guard(self.name)
        return "unknown" if told is None else told.version

    @property
    def labels(self) -> frozenset[str]:
        """As the sidecar says."""
        told = self._sidecar.guard(self.name)
        return frozenset() if told is None else told.labels

    @property
    def reads(self) -> frozenset[str]:
        """As the sidecar says."""
        told = self._sidecar.guard(self.name)
        return CONTEXT if told is None else told.reads

    @property
    def window_chars(self) -> int:
        """As the sidecar says; 0, the whole answer, until it has been there."""
        told = self._sidecar.guard(self.name)
        return 0 if told is None else told.window_chars

    @property
    def probes(self) -> Sequence[Probe]:
        """As the sidecar says; none until it has been there. It tests its guards itself, at each worker's start."""
        told = self._sidecar.guard(self.name)
        return tuple(
            Probe(
                to_text(probe.text),
                probe.stage,
                probe.block,
                Context(system=to_text(probe.system), prompt=to_text(probe.prompt)),
            )
            for probe in (() if told is None else told.probes)
        )

    def judge(self, text: str, stage: Stage, context: Context = ALONE) -> Judgement:
        """Raises what went wrong here or, by its name, there."""
        return self.judge_many([Text(text, stage, context)])[0]

    def judge_many(self, texts: Sequence[Text]) -> list[Judgement]:
        """Written at once, so that the sidecar's workers share them. Within the deadline of the longest."""
        policy = self._policy
        longest = max((len(text.text) for text in texts), default=0)
        # A little less than the stack waits: a thread that comes back late counts as hung there.
        deadline_ms = policy.deadline_ms + policy.deadline_ms_per_kchar * longest / 1000
        budget_ms = min(0.95 * deadline_ms, BUDGET_MS_MAX)
        until_s = time.monotonic() + budget_ms / 1000
        reads = self.reads
        answers = self._sidecar.ask([_ask(self.name, budget_ms, text, reads) for text in texts], until_s)
        return [_judgement(answer) for answer in answers]

    def watch(self, tell: Changed) -> None:
        """Tell when a guard of this sidecar has changed."""
        self._sidecar.changed = tell

    def close(self) -> None:
        """No more questions, of any guard of this sidecar."""
        self._sidecar.close()


def remote_guards(config: GuardsConfig) -> dict[str, RemoteGuard]:
    """The guards that the config places in the sidecar, once it is there or `connect_timeout_ms` have passed.

    Raises GuardRefused.
    """
    names = [name for name in config.names if config.policy(name).where == "sidecar"]
    if not names:
        return {}
    sidecar = Sidecar(config.sidecar)
    sidecar.wait(config.sidecar.connect_timeout_ms / 1000)
    try:
        return {name: RemoteGuard(name, config.policy(name), sidecar) for name in names}
    except GuardRefused:
        sidecar.close()
        raise


def _ask(name: str, budget_ms: float, text: Text, reads: frozenset[str]) -> Ask:
    """What the guard does not read stays here."""
    context = text.context
    system = to_bytes(context.system) if "system" in reads else b""
    prompt = to_bytes(context.prompt) if "prompt" in reads else b""
    return Ask(name, budget_ms, text.stage, to_bytes(text.text), context.tenant, context.route, system, prompt)


def _judgement(answer: Answer) -> Judgement:
    if answer.error:
        raise type(answer.error, (FailedThere,), {})
    return Judgement(answer.score, answer.label, answer.block)
