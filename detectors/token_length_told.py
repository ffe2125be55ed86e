"""What `token_length` keeps of a model and of a user, and the words and figures of its alarms."""

import math
from typing import Final

from msgspec import Struct, field

from detectors.detector import Alarm, actor_entity, contributors
from detectors.exceedances import Exceedances
from detectors.finding import Statistic
from detectors.histogram import Histogram, total, upper_tail
from detectors.rollup import Sample
from detectors.time import SECOND_US

EXPONENT: Final = 0.9
"""Solves E[exp(x gain)] = 1 for gains of Exp(1) with chance 1/1000 less .01: 1 / (1 - x) = 10."""
ADOPT_S: Final = 86_400
"""Age at which even rare completions enter the baseline."""

RUN_EDGE: Final = 6.0
"""Of a run, in nats: what passes it is a peak."""
PEERS_S: Final = 1_800
PEERS_MIN: Final = 4
PEERS_CHANCE: Final = 1e-4
SUSPECTED_CHANCE: Final = 0.01
SUSPECTED_PRIOR: Final = 200.0
"""What the assumption that guards suspect 1 in 100 weighs, in completions."""
PEERS_USERS_MAX: Final = 64
RARE_SHARE: Final = 1e-3


class Peers(Struct):
    """Of one model and adapter, this half hour and the one before: completions and users with a rare one, by prompt
    size."""

    slot: int = 0
    completions: list[dict[str, int]] = field(default_factory=lambda: [{}, {}])
    users: list[dict[str, list[str]]] = field(default_factory=lambda: [{}, {}])

    def add(self, second: int, prompt: str, completions: int) -> None:
        """So many completions with prompts of this size."""
        slot = second // PEERS_S
        if slot != self.slot:
            self.completions = [{}, self.completions[0] if slot == self.slot + 1 else {}]
            self.users = [{}, self.users[0] if slot == self.slot + 1 else {}]
            self.slot = slot
        self.completions[0][prompt] = self.completions[0].get(prompt, 0) + completions

    def rare(self, prompt: str, user: str) -> None:
        """The user had one."""
        users = self.users[0].setdefault(prompt, [])
        if user not in users and len(users) < PEERS_USERS_MAX:
            users.append(user)

    def others(self, user: str) -> int:
        """How many other users had a rare one, of the prompt size at which they are too many; 0 where of none."""
        told = 0
        for prompt in sorted(self.users[0].keys() | self.users[1].keys()):
            users = {*self.users[0].get(prompt, ()), *self.users[1].get(prompt, ())} - {user}
            calls = self.completions[0].get(prompt, 0) + self.completions[1].get(prompt, 0)
            unlikely = upper_tail(len(users), calls, 2 * RARE_SHARE) < math.log(PEERS_CHANCE)
            if len(users) >= PEERS_MIN and unlikely:
                told = max(told, len(users))
        return told


class Tail(Struct):
    """The model's whole distribution beyond its upper tenth: P(ln tokens > ln edge + x) = share exp(-x / scale)."""

    edge: int
    share: float
    scale: float


class Batch(Struct):
    """Ten seconds of lengths that wait to be learned."""

    index: int
    buckets: dict[str, Histogram]


class ModelState(Struct):
    """What is known of one tenant x model x adapter."""

    first_s: int
    runs: Exceedances
    """Peaks of its users' runs."""
    peers: Peers = field(default_factory=Peers)
    completions: int = 0
    scored: int = 0
    suspected: int = 0
    """Of the longest completions of each second: how many there were, and how many guards suspected."""
    buckets: dict[str, Histogram] = {}
    whole: Histogram = {}
    tail: Tail | None = None
    waiting: list[Batch] = []
    rare: list[tuple[int, str, int]] = []
    """(second, bucket key, length bucket) of rare completions, not learned for a day."""


class Evidence(Struct):
    """A user's long completions, since his charts were last zero."""

    sum: float
    """Of rare ones."""
    start_us: int
    last_us: int
    run: float = 0.0
    peaked: bool = False
    """Whether this run was counted among the peaks."""
    unpaid: int = 0
    """Completions whose cost is not taken off yet."""
    completions: int = 0
    rare: int = 0
    longest: int = 0
    tokens: int = 0
    suspected: int = 0
    """Those whose guard score was above the configured one: the second signal."""
    cut: int = 0
    """How many of the last ones, in a row, were cut at their limit."""
    samples: list[Sample] = []
    offsets: dict[int, tuple[int, int]] = {}


def second_signals(model: ModelState, evidence: Evidence, user: str) -> list[str]:
    """What else speaks against the user, in words."""
    told = []
    usual = (model.suspected + 0.01 * SUSPECTED_PRIOR) / (model.scored + SUSPECTED_PRIOR)
    if upper_tail(evidence.suspected, evidence.completions, usual) < math.log(SUSPECTED_CHANCE):
        told.append(f"guards suspected {evidence.suspected} of them")
    others = model.peers.others(user)
    if others:
        told.append(f"{others} other users of the same prompt size had such answers within the hour")
    return told


def alarm_of(
    model: ModelState, evidence: Evidence, second: int, where: tuple[str, str, str], bars: tuple[float, float]
) -> Alarm:
    """A user's evidence has reached a threshold; `where` is tenant, model and user, `bars` those of the two charts."""
    tenant, name, user = where
    edge = model.tail.edge if model.tail is not None else 0
    span_s = (evidence.last_us - evidence.start_us) // SECOND_US + 1
    cold = second - model.first_s < ADOPT_S
    signals = second_signals(model, evidence, user)
    by_rare = evidence.sum / bars[0] >= evidence.run / bars[1]
    observed, threshold = (evidence.sum, bars[0]) if by_rare else (evidence.run, bars[1])
    odds = EXPONENT * evidence.sum if by_rare else 1_000 * (evidence.run - RUN_EDGE) / model.runs.mean_milli()
    each = f"{evidence.rare} of them rarer than 1 in 1,000" if evidence.rare else "unusually long one after the other"
    return Alarm(
        tenant=tenant,
        entity=actor_entity(user),
        model=name,
        at_us=(second + 1) * SECOND_US,
        first_seen_us=evidence.start_us,
        last_seen_us=evidence.last_us + SECOND_US,
        severity="high" if signals else "low" if cold else "medium",
        confidence="low" if cold else "high" if signals else "medium",
        statistic=Statistic(
            name="rare completion lengths" if by_rare else "run of long completions",
            observed=round(observed, 3),
            baseline=0.0,
            threshold=round(min(threshold, observed), 3),
            unit="nats",
            improbability=round(odds / math.log(10), 2),
        ),
        counts={
            "completions": evidence.completions,
            "rare": evidence.rare,
            "tokens": evidence.tokens,
            "longest_tokens": evidence.longest,
            "usual_p90_tokens": edge,
            "baseline_completions": total(model.whole),
            "guard_suspected": evidence.suspected,
            "cut_at_limit_in_a_row": evidence.cut,
        },
        summary=(
            f"User {user} got {evidence.completions} completions of up to {evidence.longest} tokens in {span_s} s,"
            f" {each}; nine in ten of this model's are below {edge} tokens{''.join(f'; {told}' for told in signals)}"
        ),
        offsets=evidence.offsets,
        samples=evidence.samples,
        contributors=contributors({user: evidence.tokens}, "completion tokens", 1),
        cold_start="Less than a day of baseline: new kinds of honest work look unusual." if cold else "",
    )
