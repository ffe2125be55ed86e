"""What a block_rate finding says: how many blocks against what is usual, by few or by many, and what changed before.

Few or many. Two explanations of the counted blocks are compared by their likelihood (J. Neyman and E. S. Pearson, "On
the problem of the most efficient tests of statistical hypotheses", Phil. Trans. R. Soc. A 231, 1933), each against
blocks at the usual rate p. *Many*: everyone is blocked at the rate of the whole spike. *Few*: up to five users are
blocked at .6 of their requests and the others as usual; a user with k blocks among n requests since the chart began
adds k ln(.6 / p) + (n - k) ln(.4 / (1 - p)), and naming him costs 1.5 nats. Few is said where it is 3 nats likelier.
Blocks alone tell it badly: a tenant of a hundred users has three or four who ask most, and an honest one is blocked
twice in a row.

n is known from running numbers (`detectors.block_rate_asked`): requests between the user's first and last block; one,
three or nine after the last where he sent so many; and those of the eight up to the first that came after the chart
began.
"""

import math
from typing import Final

from msgspec import Struct

from detectors.block_rate_charts import SLOTS_A_WEEK, Chart
from detectors.detector import Alarm, contributors
from detectors.finding import CONTRIBUTORS_MAX, Entity, Severity, Statistic
from detectors.rollup import Cell, Sample, earliest, first, merge_offsets
from detectors.time import SECOND_US

USERS_TOLD_MAX: Final = 256
FEW_MAX: Final = 5
ATTACKER_RATE: Final = 0.6
"""Share of an attacker's requests that are blocked."""
NAMED_NATS: Final = 1.5
"""What naming a user costs: among those with blocks there is always one who looks like an attacker."""
FEW_NATS: Final = 3.0
BLOCKS_HIGH: Final = 20
COLD_RATE: Final = "Fewer than 1,000 settled requests: compared with an assumed block rate."
COLD_CHART: Final = "Less than a week of this guard and model: the threshold is not from its own past yet."


class Blocks(Struct):
    """A second with blocks, kept for the explanation."""

    second: int
    blocks: int
    distinct: int
    blocked: dict[str, int]
    counted: dict[str, int]
    asked: dict[str, int]
    """User to how many requests he had sent by then."""
    times: dict[str, list[int]]
    """User to the seconds of his last eight requests, oldest first."""
    later: dict[str, int]
    """User to how many he had sent a little after it, as far as it was told."""
    samples: list[Sample]
    offsets: dict[int, tuple[int, int]]


class Announced(Struct, frozen=True):
    """A change of guard, model, adapter or template that a collector told of."""

    second: int
    subject: str
    before: str
    after: str


class Spike(Struct, frozen=True):
    """What the charts found: the chart, whose key, and against what."""

    tenant: str
    key: str
    chart: Chart
    second: int
    rate: float
    """Usual, of the chart's stream."""
    distinct_rate: float
    cold: bool


def blocks_of(second: int, cell: Cell, users_max: int) -> Blocks:
    """What is kept of a second with blocks."""
    times = {
        who: [at_s for at_s, count in sorted(seen.items()) for _ in range(count)]
        for who, seen in cell.histograms.items()
    }
    blocked = first(cell.weights["blocked"], users_max)
    return Blocks(
        second,
        cell.counts["blocks"],
        cell.counts.get("distinct_blocks", 0),
        blocked,
        first(cell.weights.get("counted", {}), users_max),
        {who: total for who, total in sorted(cell.weights.get("asked", {}).items()) if who in blocked},
        {who: seen for who, seen in sorted(times.items()) if who in blocked},
        {},
        cell.samples,
        cell.offsets,
    )


def heard_later(recent: list[Blocks], later: dict[str, int]) -> None:
    """Users who went on after a block: their new numbers of requests."""
    for user, total in later.items():
        for seen in reversed(recent):
            if user in seen.asked:
                seen.later[user] = total
                break


def by_user(recent: list[Blocks], start_s: int, name: str) -> dict[str, int]:
    """`blocked` or `counted` blocks by user since a second; of many users the largest are kept."""
    total: dict[str, int] = {}
    for seen in recent:
        if seen.second >= start_s:
            for user, weight in (seen.counted if name == "counted" else seen.blocked).items():
                total[user] = total.get(user, 0) + weight
    return first(total, USERS_TOLD_MAX)


def asked_since(recent: list[Blocks], start_s: int) -> dict[str, int]:
    """Requests of each blocked user since a second, as far as they are known."""
    begun: dict[str, int] = {}
    asked: dict[str, int] = {}
    for seen in recent:
        for user, total in seen.asked.items():
            if user not in begun:
                begun[user] = total - sum(at_s >= start_s for at_s in seen.times.get(user, ()))
            asked[user] = max(seen.later.get(user, total) - begun[user], 1)
    return asked


def by_few(spike: Spike, recent: list[Blocks]) -> bool:
    """Whether a few users made the spike."""
    counted, blocked = by_user(recent, spike.chart.start_s, "counted"), by_user(recent, spike.chart.start_s, "blocked")
    asked = asked_since(recent, spike.chart.start_s)
    blocks, usual = sum(counted.values()), spike.distinct_rate
    requests = max(spike.chart.requests, blocks, 1)
    rate = min(max(blocks / requests, spike.chart.ratio * usual), 0.9)
    named = []
    for user, mine in counted.items():
        if not user:
            continue  # callers without a name may be many
        # A prompt sent again is neither a block that counts nor a request that was answered.
        sent = max(asked.get(user, requests) - (blocked.get(user, mine) - mine), mine)
        named.append(_gain(mine, sent, ATTACKER_RATE, usual) - NAMED_NATS)
    few = sum(sorted((nats for nats in named if nats > 0), reverse=True)[:FEW_MAX])
    return few - _gain(blocks, requests, rate, usual) >= FEW_NATS


def _gain(blocks: int, requests: int, rate: float, usual: float) -> float:
    """ln of how much likelier so many blocks are at a rate than at the usual one."""
    return blocks * math.log(rate / usual) + (requests - blocks) * math.log((1 - rate) / (1 - usual))


def change_of(known: list[Announced], first_s: int, second: int, change_s: int) -> str:
    """What changed last in the `change_s` before the spike or in it, for the summary."""
    near = [each for each in known if first_s - change_s <= each.second <= second]
    if not near:
        return ""
    last = max(near, key=lambda each: (each.second, each.subject, each.after))
    how = f" from {last.before} to {last.after}" if last.before and last.after else ""
    return f", after a change of {last.subject}{how}: suspect the rollout"


def _whose(blocked: dict[str, int]) -> str:
    """Who was blocked, in words."""
    named = len(blocked) - ("" in blocked)
    users = f"{named} user{'s' * (named != 1)}"
    nameless = "callers without a name"
    return users if named == len(blocked) else f"{users} and {nameless}" if named else nameless


def alarm_of(spike: Spike, recent: list[Blocks], announced: list[Announced], change_s: int) -> Alarm:
    """The alarm, of the seconds with blocks since the chart began."""
    chart, second = spike.chart, spike.second
    model, _, guard = spike.key.partition("\n")
    recent = [seen for seen in recent if seen.second >= chart.start_s]
    blocked = by_user(recent, chart.start_s, "blocked")
    blocks = sum(seen.blocks for seen in recent)
    observed = blocks / max(chart.requests, blocks)
    few = by_few(spike, recent)
    offsets: dict[int, tuple[int, int]] = {}
    for seen in recent:
        merge_offsets(offsets, seen.offsets)
    samples = earliest(sample for seen in recent for sample in seen.samples)
    severity: Severity = "high" if not few and blocks >= BLOCKS_HIGH else "medium"
    cold_start = " ".join([COLD_RATE] * spike.cold + [COLD_CHART] * (len(chart.maxima) < SLOTS_A_WEEK))
    usually = f"{'assumed' if spike.cold else 'usual'} {100 * spike.rate:.1f} %"
    return Alarm(
        tenant=spike.tenant,
        entity=Entity(kind="model", id=f"{model}/{guard}"),
        model=model,
        at_us=(second + 1) * SECOND_US,
        first_seen_us=samples[0][0],
        last_seen_us=(second + 1) * SECOND_US,
        severity=severity,
        confidence="medium" if cold_start else "high",
        statistic=Statistic(
            name=f"CUSUM of {chart.stream} blocks, {chart.ratio:g} times",
            observed=round(chart.sum, 3),
            baseline=0.0,
            threshold=round(chart.threshold, 3),
            unit="nats",
            improbability=round(chart.sum / math.log(10), 2),
        ),
        counts={
            "requests": chart.requests,
            "blocks": blocks,
            "users": len(blocked),
            "usual_ppm": round(spike.rate * 1e6),
        },
        summary=(
            f"Guard {guard} blocked {blocks} of {chart.requests} requests in {second - chart.start_s + 1} s,"
            f" {observed / spike.rate:.1f} times the {usually}, by {_whose(blocked)}"
            f"{change_of(announced, samples[0][0] // SECOND_US, second, change_s)} ({'few' if few else 'many'} users)"
        ),
        offsets=offsets,
        samples=samples,
        contributors=contributors(blocked, "blocked requests", CONTRIBUTORS_MAX),
        cold_start=cold_start,
    )
