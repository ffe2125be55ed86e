"""What a run leads to, and what is wrong with it: the comparison with an undisturbed run, and with what must be true.

The second matters as much as the first: a rule that is broken alike in both runs is seen only by what the log was made
of (users' totals, what was late, how far time came).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from collector.event import Tick, decode
from detectors import finding as findings
from detectors import rollup as rollups
from detectors.finding import Evidence, Finding
from streams.stage import Stage
from tests.sim.logs import CONFIG, Log, Record

Key = tuple[object, ...]


class Answer(NamedTuple):
    """What a log leads to."""

    rollups: Mapping[Key, bytes]
    """By (partition, second, type, tenant, kind, key), as stage 2 overwrites them; without markers."""
    findings: Mapping[Key, bytes]
    """By (uid, revision)."""

    def bare(self) -> list[Finding]:
        """The findings without their offsets: what every layout of the same events must give."""
        return bare(self.findings.values())


def bare(raised: Iterable[bytes]) -> list[Finding]:
    """Findings without their offsets, in an order of their own."""
    return sorted((_bare(findings.decode(raw)) for raw in raised), key=lambda each: (each.uid, each.revision))


def _bare(each: Finding) -> Finding:
    evidence = Evidence(event_ids=each.evidence.event_ids, replay=each.evidence.replay)
    return msgspec.structs.replace(each, evidence=evidence)


def undisturbed(first: Stage, second: Stage, tenant_partitions: int, logs: Sequence[Sequence[Any]]) -> Answer:
    """The engines alone, each partition in one go."""
    merging = [second.make_shard(partition) for partition in range(tenant_partitions)]
    told: list[Record] = []
    for partition, log in enumerate(logs):
        shard = first.make_shard(partition)
        shard.observe(list(log))
        told += [Record(out.partition, n, 0, out.value or b"") for n, out in enumerate(shard.take())]
    for number, engine in enumerate(merging):
        engine.observe([record for record in told if record.partition == number])
    raised = [Record(0, 0, 0, out.value or b"") for engine in merging for out in engine.take()]
    wrong: list[str] = []
    return Answer(_by_key(told, wrong), _by_revision(raised, wrong))


class End(NamedTuple):
    """How a schedule ended."""

    logs: Sequence[Sequence[Record]]
    """iw.events."""
    told: Sequence[Record]
    """iw.rollups."""
    raised: Sequence[Record]
    """iw.findings."""
    counters: Mapping[str, int]
    """Of all stage-1 engines."""
    watermarks: Mapping[int, int | None]


def problems_of(log: Log, wanted: Answer, end: End) -> list[str]:
    """Everything that is wrong, in words."""
    wrong: list[str] = []
    found = Answer(_by_key(end.told, wrong), _by_revision(end.raised, wrong))
    wrong += _markers(end.told)
    if found.rollups != wanted.rollups:
        wrong.append(_differ("rollups", wanted.rollups, found.rollups))
    if found.findings != wanted.findings:
        wrong.append(_differ("findings", wanted.findings, found.findings))
    tokens, blocked = totals(found.rollups.values())
    if tokens != log.prompt_tokens:
        wrong.append(f"prompt tokens by user: {_off(tokens, log.prompt_tokens)} off")
    if blocked != log.blocked:
        wrong.append(f"blocked by user: {_off(blocked, log.blocked)} off")
    for name, expected in (("late", log.late), ("duplicate", log.resent), ("quarantined", 0), ("holes", 0)):
        if end.counters.get(name, 0) != expected:
            wrong.append(f"{name}: {end.counters.get(name, 0)}, must be {expected}")
    for partition, watermark_us in end.watermarks.items():
        if watermark_us != _end_us(end.logs[partition]):
            wrong.append(
                f"time in partition {partition} came to {watermark_us}, must be {_end_us(end.logs[partition])}"
            )
    if not found.findings:
        wrong.append("no finding at all")
    return wrong


def _differ(what: str, wanted: Mapping[Key, bytes], found: Mapping[Key, bytes]) -> str:
    missing = len(wanted.keys() - found.keys())
    more = len(found.keys() - wanted.keys())
    other = sum(wanted[key] != found[key] for key in wanted.keys() & found.keys())
    return f"{what}: {missing} missing, {more} too many, {other} different, of {len(wanted)}"


def _off(found: Counter[str], wanted: Counter[str]) -> str:
    return f"+{(found - wanted).total()} -{(wanted - found).total()}"


def totals(told: Iterable[bytes]) -> tuple[Counter[str], Counter[str]]:
    """(prompt tokens answered, requests blocked) of each user, over all these rollups."""
    tokens: Counter[str] = Counter()
    blocked: Counter[str] = Counter()
    for raw in told:
        rollup = rollups.decode(raw)
        if isinstance(rollup, rollups.Partial) and rollup.kind == "latency":
            tokens.update(rollup.weights.get("prompt_tokens", {}))
        elif isinstance(rollup, rollups.Partial) and rollup.kind == "block_rate":
            blocked.update(rollup.weights.get("blocked", {}))
    return tokens, blocked


def _end_us(log: Sequence[Record]) -> int:
    """Every lane said goodbye, so the last tick says how far time came (T6)."""
    ticks = [record.timestamp for record in log if type(decode(record.value)) is Tick]
    return (max(ticks) - CONFIG.time.tick_lag_ms) * 1_000


def _by_key(records: Sequence[Record], wrong: list[str]) -> dict[Key, bytes]:
    found: dict[Key, bytes] = {}
    for record in records:
        rollup = rollups.decode(record.value)
        if not isinstance(rollup, rollups.Partial | rollups.Signal):
            continue
        key = (rollup.partition, rollup.second, type(rollup).__name__, rollup.tenant, rollup.kind, rollup.key)
        if found.setdefault(key, record.value) != record.value:
            wrong.append(f"a rollup told twice, and differently: second {rollup.second} of {rollup.kind}")
    return found


def _by_revision(records: Sequence[Record], wrong: list[str]) -> dict[Key, bytes]:
    found: dict[Key, bytes] = {}
    for record in records:
        finding = findings.decode(record.value)
        if found.setdefault((finding.uid, finding.revision), record.value) != record.value:
            wrong.append(f"a finding told twice, and differently: {finding.detector} revision {finding.revision}")
    return found


def _markers(told: Sequence[Record]) -> list[str]:
    """No rollup comes for the first time after the marker that closes its second."""
    through: dict[tuple[int, int], int] = {}
    seen: set[tuple[int, bytes]] = set()
    for record in sorted(told, key=lambda record: (record.partition, record.offset)):
        rollup = rollups.decode(record.value)
        if isinstance(rollup, rollups.Command):
            continue
        lane = (record.partition, rollup.partition)
        if isinstance(rollup, rollups.Marker):
            through[lane] = max(through.get(lane, rollup.closed_through), rollup.closed_through)
        elif (record.partition, record.value) not in seen:
            seen.add((record.partition, record.value))
            if rollup.second <= through.get(lane, -1):
                return [f"second {rollup.second} of partition {rollup.partition} was told after its marker"]
    return []
