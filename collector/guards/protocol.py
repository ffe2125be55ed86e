"""What a guard is: it reads one text and answers with a score, a label and whether it would block.

A guard is a file of this room with two classes: its config (a `GuardPolicy` with `build`) and itself (a `Guard`). The
fields of `collector.guards.config.GuardsConfig` are the table of all guards. Guards know neither tenants nor policy,
nor each other: `collector.guards.stack` runs them, bounds their time and turns judgements into decisions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field

from collector.event import Stage
from collector.guards.policy import Poisoned, Route, RoutePolicy, Rule, Sample, TenantPolicy, Threshold, narrowest

if TYPE_CHECKING:
    from collector.media import Item

UNSAMPLED: Final = "unsampled"
"""The label of a verdict that was not made, since sampling left the request out."""
CONTEXT: Final = frozenset({"route", "system", "prompt"})
"""What a guard may read of the context, beside the tenant."""


class GuardRefused(Exception):
    """A guard can't start: damaged weights, or a self-test that failed. One sentence for the operator."""


class TextTooLong(Exception):
    """A text longer than a guard can judge. Never read as an allow."""


class Judgement(NamedTuple):
    """A guard's answer on one text."""

    score: float
    """In [0, 1], higher is worse; 0.5 is the guard's own shipped threshold where it has one."""
    label: str
    """Words of the guard's `labels`, joined by `+`; empty when there is nothing to say. Never a piece of the text."""
    block: bool
    """The guard's own advice; a threshold in the config overrules it."""


@dataclass(frozen=True, slots=True)
class Context:
    """What stands around a text, for guards that can't judge it alone. In memory only, for the time of one request."""

    tenant: str = ""
    route: str = ""
    """As in the event; empty outside the gate."""
    system: str = field(default="", repr=False)
    """The system prompt."""
    prompt: str = field(default="", repr=False)
    """What was asked: the user's objective, and what an answer answers."""
    draw: Callable[[str], str] | None = field(default=None, repr=False, compare=False)
    """A digest under a key of the tenant's, hexadecimal at its end: decides what is sampled."""


ALONE: Final = Context()
"""Nothing is known around the text."""


class Text(NamedTuple):
    """One text to judge."""

    text: str
    stage: Stage
    context: Context = ALONE

    def __repr__(self) -> str:
        return f"Text({len(self.text)} characters, {self.stage})"


@dataclass(frozen=True, slots=True)
class Probe:
    """A text with a known answer: part of the self-test without which no guard starts."""

    text: str = field(repr=False)
    stage: Stage
    block: bool
    context: Context = ALONE


class Guard(Protocol):
    """Judges one text at a time; called from several threads at once."""

    @property
    def name(self) -> str:
        """As in the config and in the event."""

    @property
    def version(self) -> str:
        """Changes whenever a verdict could change: code version and a short digest of weights or patterns."""

    @property
    def stages(self) -> frozenset[Stage]:
        """The stages it can judge."""

    @property
    def labels(self) -> frozenset[str]:
        """Every word that a label may be made of."""

    @property
    def probes(self) -> Sequence[Probe]:
        """At least one text that must be blocked and one that must pass, at the shipped threshold."""

    def judge(self, text: str, stage: Stage, context: Context = ALONE) -> Judgement:
        """The judgement on `text`, of any length and content, lone surrogates included. Deterministic.

        It may be kept and given again for the same text, stage, tenant and context. A guard that does not read all of
        the context says so by an attribute `reads`, names out of `CONTEXT`: more can be kept then.
        """


class WindowGuard(Guard, Protocol):
    """A guard that can judge an answer in pieces while it comes; every other guard is given answers whole.

    What it would block in an answer is at most `window_chars` long, and is blocked in any piece that holds it whole and
    begins at a run's beginning. Runs of visible ASCII without a blank are not parted for it, up to 8,192 characters.
    """

    @property
    def window_chars(self) -> int:
        """At least 1."""


class BatchGuard(Guard, Protocol):
    """A guard that judges several texts together for less than one by one."""

    def judge_many(self, texts: Sequence[Text]) -> list[Judgement]:
        """The judgement on each, in order; the same as `judge` gives."""


class MediaGuard(Protocol):
    """Judges one image, sound or film at a time, for tenants whose media policy is `guard`; called from threads.

    What it raises blocks the request. A remote address comes as such: fetching it is the guard's decision.
    """

    @property
    def name(self) -> str:
        """As in the event."""

    @property
    def version(self) -> str:
        """Changes whenever a verdict could change."""

    def judge(self, item: "Item", context: Context = ALONE) -> Judgement:
        """The judgement on one item; `context` tells tenant, route and what was asked beside it."""


class GuardPolicy(BaseModel, ABC):
    """What every guard's table in the config can say. Guards add fields of their own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    able: ClassVar[frozenset[Stage]] = frozenset()
    """The stages that its guard can judge, where they are known before it is built: what a server needs to start while
    the sidecar is away."""

    quick: ClassVar[bool] = False
    """Whether its guard takes no longer than about a millisecond for a thousand characters, and asks nobody."""

    where: Literal["process", "sidecar"] = Field(
        "process", description="process: in the server itself. sidecar: in the process of `inferwatch guards serve`."
    )
    mode: Literal["enforce", "shadow"] = Field(
        "enforce", description="shadow: judge and report, never block, not on error either."
    )
    threshold: Threshold | None = Field(
        None, description="Block at this score and above. Unset: the guard's own advice (0.5 for scored guards)."
    )
    on_error: Literal["block", "allow"] = Field(
        "block", description="What happens to a text that the guard failed to judge: too long, too slow, broken."
    )
    stages: frozenset[Stage] | None = Field(
        None, min_length=1, description="Judge only these stages. Unset: all that the guard is for."
    )
    shadow_stages: frozenset[Stage] = Field(
        frozenset(), description="Stages at which the guard only watches, as in mode shadow, whatever the mode says."
    )
    deadline_ms: float = Field(
        2_000, gt=0, le=600_000, description="Time for one text; beyond it the verdict is error."
    )
    deadline_ms_per_kchar: float = Field(
        5, ge=0, le=10_000, description="Added to the deadline for every 1,000 characters of the text."
    )
    sample: Sample = Field(
        1.0,
        description="The share of requests that it judges, for guards that cost much. Which ones, a keyed hash of the "
        "prompt says, so the same prompt is always judged or never; the verdict on the others is allow, `unsampled`.",
    )
    poisoned: Poisoned = Field(
        "block",
        description="What happens to a document, a marked span or tool output that it blocks. drop: it is taken out, "
        "the rest of the request goes on, and the event has the count.",
    )
    tenants: dict[str, TenantPolicy] = Field(
        default_factory=dict, max_length=4096, description="By tenant name: what it has otherwise, routes within."
    )
    routes: dict[Route, RoutePolicy] = Field(
        default_factory=dict, max_length=256, description="By route, `POST /v1/completions`: what it has otherwise."
    )

    @abstractmethod
    def build(self) -> Guard:
        """The guard, ready to judge. Raises `GuardRefused`."""

    def rule(self, tenant: str = "", route: str = "") -> Rule:
        """What holds for one tenant on one route: the narrowest of what is set."""
        own = self.tenants.get(tenant)
        layers = [own.routes.get(route) if own is not None else None, own, self.routes.get(route)]
        return Rule(
            threshold=narrowest("threshold", layers, self.threshold),
            mode=narrowest("mode", layers, self.mode),
            on_error=narrowest("on_error", layers, self.on_error),
            sample=narrowest("sample", layers, self.sample),
            poisoned=narrowest("poisoned", layers, self.poisoned),
            shadow_stages=self.shadow_stages,
        )


def windows(length: int, size: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, end) of overlapping windows of `size`, `step` apart, over `length` characters; the last ends at the end.

    A text of at most `size` is one window; an empty text is one empty window.
    """
    start = 0
    while start + size < length:
        yield start, start + size
        start += step
    yield max(0, length - size), length


def whole(text: str) -> str:
    """The text with each lone surrogate as a question mark: what UTF-8 can say."""
    return text.encode("utf-8", "replace").decode("utf-8")
