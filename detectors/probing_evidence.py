"""What `probing` holds against a client: the statistics, and what is kept of them. Nothing here reads an event.

Fast evidence is a one-sided CUSUM of log-likelihood ratios (E. S. Page, Biometrika 41, 1954; A. Wald, "Sequential
Analysis", 1947) with a half-life. Slow evidence is a likelihood ratio of a mixture of attackers against a
beta-binomial: honest clients differ, so the more often one is blocked, the likelier he is one of the few who always
are, and the evidence against him has a ceiling (J. G. Skellam, J. R. Stat. Soc. B 10, 1948).
"""

import math
from copy import copy
from typing import Final

from msgspec import Struct, field

from detectors.config import ProbingConfig
from detectors.finding import EVENT_IDS_MAX
from detectors.prompts import Known, Prompt
from detectors.rollup import Sample
from detectors.time import SECOND_US

EVIDENCE_MAX: Final = 20.0
"""Most fast evidence kept, in nats, or twice the threshold: so an episode can't outlast its last block for long."""
SWING_PROMPTS: Final = 200
"""Prompts from which a client's past is firm enough that honest work may exceed it."""
ATTACK_RATIO: Final = 2.0
"""A client who probes is blocked at least so many times as often as usual."""
RETRY_RATIO: Final = 1.4
"""The same of a prompt reworded right after a block, which honest people have blocked again at `retry_rate`."""
SLOW_RATES: Final = (0.1, 0.3, 0.6)
"""Block rates of clients who try for weeks, each as likely as the next."""
SLOW_GAP_US: Final = 3_600 * SECOND_US
"""The slow evidence looks at one prompt an hour, so that neither a conversation nor a job counts many times."""
SLOW_PROMPTS_MAX: Final = 100
"""After so many of them it begins anew: a client with so many prompts is judged by the fast evidence."""


class Taken(Struct, gc=False):
    """A request, as far as the evidence goes."""

    moment_us: int
    offset: int
    event_id: str
    """Of a blocked one."""
    session: str
    blocked: bool
    new: bool
    """Whether the prompt is like none that is remembered."""
    retry: bool
    """Whether it is one of the first rewordings of what was blocked just before."""


class Suspicion(Struct, gc=False):
    """The evidence against a session or a user, since it was last zero."""

    sum: float = 0.0
    last_us: int = 0
    start_us: int = 0
    prompts: int = 0
    distinct: int = 0
    blocked: int = 0
    samples: list[Sample] = []
    first_offset: int = 0
    last_offset: int = 0

    def add(self, taken: Taken) -> None:
        """Counts the request, whatever it weighs."""
        if not self.prompts:
            self.start_us, self.first_offset = taken.moment_us, taken.offset
        elif taken.offset < self.first_offset:
            self.first_offset = taken.offset
        self.last_us, self.last_offset = taken.moment_us, taken.offset
        self.prompts += 1
        self.distinct += taken.new
        if taken.blocked:
            self.blocked += 1
            if len(self.samples) < EVENT_IDS_MAX:  # the first ones: requests come in order
                self.samples = [*self.samples, (taken.moment_us, taken.event_id)]


class Slow(Suspicion, gc=False):
    """The same over weeks, of blocked requests and of those that it looked at; `sum` is the mixture's ratio."""

    past: tuple[int, int] = (0, 0)
    """Prompts and blocks before it began: what goes on for weeks is not learned."""
    judged: float = 0.0
    judged_blocked: float = 0.0
    """Prompts that it looked at, and the blocked ones of them, faded."""
    judged_us: int = 0
    looks: int = 0


class Client(Struct, gc=False):
    """The evidence against a user and his sessions; kept while there is any."""

    usual: tuple[int, int] = (0, 0)
    """Prompts and blocks that the client is compared with: all before he was last learned."""
    usual_s: int = 0
    """When that was."""
    since: int = 0
    """Distinct prompts since then."""
    record: float = 0.0
    """What the evidence once came to, honestly or not; it raises this client's bar."""
    peak: float = 0.0
    """The same since he was last learned, which does not count yet."""
    whole: Suspicion | None = None
    slow: Slow | None = None
    sessions: dict[str, Suspicion] = {}
    """The evidence against each. Of the first it is that against the client, until he has another: one object."""
    known: Known = field(default_factory=Known)
    last_blocked: Prompt | None = None
    last_blocked_us: int = 0
    retries: int = 0
    """Rewordings of what was blocked, one after the other."""
    session_told_us: int = 0

    @property
    def suspected(self) -> bool:
        """Whether there is any evidence."""
        return self.whole is not None or self.slow is not None

    def part(self) -> None:
        """The evidence against his first session is its own from now on."""
        for name, session in self.sessions.items():
            if session is self.whole:
                self.sessions[name] = copy(session)

    @property
    def awake_s(self) -> int:
        """Until then a request that is not blocked changes nothing: the slow evidence would not look at it."""
        if self.whole is not None or self.slow is None:
            return 0
        return (self.slow.judged_us + SLOW_GAP_US) // SECOND_US


def rate(config: ProbingConfig, past: tuple[int, int]) -> float:
    """The client's own block rate so far, drawn towards the assumed one."""
    prompts, blocks = past
    return (blocks + config.prior_rate * config.prior_prompts) / (prompts + config.prior_prompts)


def gains(config: ProbingConfig, past: tuple[int, int]) -> tuple[float, float, float, float]:
    """What a prompt weighs in nats: passed, blocked; and as a retry passed, blocked."""
    known = past[0] / (past[0] + SWING_PROMPTS)
    usual = (1 + (config.swing - 1) * known) * rate(config, past)
    usual = min(max(config.prior_rate, usual), 0.9)
    attack = min(max(config.attack_rate, ATTACK_RATIO * usual), 0.95)
    again = max(usual, config.retry_rate)
    retried = min(max(attack, RETRY_RATIO * again), 0.95)
    return (
        math.log((1 - attack) / (1 - usual)),
        math.log(attack / usual),
        math.log((1 - retried) / (1 - again)),
        math.log(retried / again),
    )


def stepped(before: Suspicion | None, taken: Taken, gain: float, half_life_us: int, most: float) -> Suspicion | None:
    """The fast evidence after this request; None when it is back to nothing."""
    if before is None:
        if gain <= 0:
            return None
        before = Suspicion(last_us=taken.moment_us)
    total = before.sum * 0.5 ** ((taken.moment_us - before.last_us) / half_life_us) + gain
    if total <= 0:
        return None
    before.sum = min(total, most)
    before.add(taken)
    return before


def slow_stepped(before: Slow | None, taken: Taken, past: tuple[int, int], config: ProbingConfig) -> Slow | None:
    """The slow evidence after this request; None when there is none, or it has looked at enough."""
    judges = taken.new and not taken.retry
    if before is None:
        if not (judges and taken.blocked):
            return None
        before = Slow(past=past, judged_us=taken.moment_us - SLOW_GAP_US)
    looks = judges and taken.moment_us - before.judged_us >= SLOW_GAP_US
    if looks or taken.blocked:
        before.add(taken)
    if not looks:
        return before
    fade = 0.5 ** ((taken.moment_us - before.judged_us) / (config.slow_half_life_s * SECOND_US))
    before.judged = before.judged * fade + 1
    before.judged_blocked = before.judged_blocked * fade + taken.blocked
    before.judged_us, before.looks = taken.moment_us, before.looks + 1
    before.sum = mixture_ratio(before.judged, before.judged_blocked, before.past, config)
    return before if before.sum > 0 and before.looks < SLOW_PROMPTS_MAX else None


def mixture_ratio(prompts: float, blocks: float, past: tuple[int, int], config: ProbingConfig) -> float:
    """ln of how much likelier so many blocks are from `SLOW_RATES` than from an honest client with this past, whose
    rate is beta-distributed with a mean of `prior_rate` and a shape of `prior_shape` where nothing is known."""
    often = config.prior_shape + past[1]
    seldom = config.prior_shape * (1 / config.prior_rate - 1) + past[0] - past[1]
    passed = prompts - blocks
    attack = sum(math.exp(blocks * math.log(each) + passed * math.log1p(-each)) for each in SLOW_RATES)
    honest = _log_beta(often + blocks, seldom + passed) - _log_beta(often, seldom)
    return math.log(attack / len(SLOW_RATES)) - honest


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
