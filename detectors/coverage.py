"""coverage: what the audit itself missed. Holes in a lane's `seq`, late events, quarantined records, inference that
the engine counted and nobody audited, and guards that fail on known texts.

Not a statistic: each is a fact, so there is no cold start and no threshold. One finding per lane and problem (T7). A
lane is (collector, boot, partition), so these findings follow the partitions, as the lanes do.

Memory: of each problem at most `LANES_TOLD_MAX` lanes an hour and partition; beyond that the rest is told under one
name, "(other lanes)", so a flood of made-up collector names can't grow it, nor make more findings, nor take names from
another problem's lanes. The last counts of unaudited inference and of failed canaries of as many boots; one that was
forgotten is told anew from 0.
"""

from typing import Final

import msgspec
from msgspec import Struct

from collector.event import Heartbeat, timestamp_us
from detectors.config import DetectConfig
from detectors.detector import Alarm, Card, Detector, StageTwo
from detectors.finding import Entity, Severity, Statistic
from detectors.rollup import Sample, Signal, earliest
from detectors.time import SECOND_US, Problem, Trouble

NAME: Final = "coverage"
LANES_TOLD_MAX: Final = 256
OTHER_LANES: Final = "(other lanes)"
NAMED_S: Final = 3_600
"""How long a lane that was told of keeps its place among those that are told by name."""

SEVERITIES: Final[dict[str, Severity]] = {
    "hole": "high",
    "late": "low",
    "quarantined": "medium",
    "unaudited": "high",
    "canary": "high",
}


class Told(Struct):
    """What one lane did since the last closing."""

    collector_id: str
    records: int = 0
    first_us: int = 0
    last_us: int = 0
    first_offset: int = 0
    last_offset: int = 0
    samples: list[Sample] = []


class _State(Struct, array_like=True):
    told: dict[str, Told]
    counters: dict[str, int]
    unaudited: dict[str, int] = {}
    named: dict[str, dict[str, int]] = {}


class CoverageOne:
    """Gathers the clock's troubles of one partition and tells them when a second closes."""

    def __init__(self, config: DetectConfig, partition: int) -> None:
        self._tenant = config.platform_tenant
        self._partition = partition
        self._told: dict[str, Told] = {}
        self._unaudited: dict[str, int] = {}
        """The last counts of each boot."""
        self._named: dict[str, dict[str, int]] = {}
        """Problem to the lanes told by name, and the second in which each was told last."""
        self.counters: dict[str, int] = {"lost_records": 0, "unnamed_lanes": 0}

    def counts(self, beat: Heartbeat) -> bool:
        """Whether `heartbeat` has to see it: its numbers are the collector's, so one lane of each is read."""
        return self._partition == 0 and (beat.unaudited > 0 or bool(beat.canaries_failed))

    def heartbeat(self, beat: Heartbeat, offset: int) -> None:
        """What a collector counts of its engine and guards. The counts of a boot never fall; their growth is told."""
        boot = f"{beat.collector_id}/{beat.boot}"
        self._grown(beat, offset, boot, "unaudited", beat.unaudited)
        self._grown(beat, offset, f"{boot}#canary", "canary", sum(beat.canaries_failed.values()))

    def _grown(self, beat: Heartbeat, offset: int, key: str, problem: Problem, count: int) -> None:
        if not count:
            return
        grown = count - self._unaudited.pop(key, 0)
        while len(self._unaudited) >= 2 * LANES_TOLD_MAX:
            del self._unaudited[next(iter(self._unaudited))]
        self._unaudited[key] = count
        if grown > 0:
            moment_us = timestamp_us(beat.timestamp)
            self.trouble(Trouble(problem, beat.collector_id, beat.boot, moment_us, grown, beat.event_id, offset))

    def trouble(self, trouble: Trouble) -> None:
        """One hole, late or quarantined record, or growth of unaudited inference."""
        key = f"{trouble.collector_id}/{trouble.boot}/{self._partition}#{trouble.problem}"
        named = self._named.setdefault(trouble.problem, {})
        if key in named or len(named) < LANES_TOLD_MAX:
            named.setdefault(key, 0)
        else:
            self.counters["unnamed_lanes"] += 1
            key = f"{OTHER_LANES}/{self._partition}#{trouble.problem}"
        told = self._told.get(key)
        if told is None:
            told = self._told[key] = Told(trouble.collector_id, first_us=trouble.moment_us, first_offset=trouble.offset)
        told.records += trouble.lost
        told.first_us = min(told.first_us, trouble.moment_us)
        told.last_us = max(told.last_us, trouble.moment_us)
        told.last_offset = trouble.offset
        told.samples = earliest([*told.samples, (trouble.moment_us, trouble.event_id)])
        if trouble.problem == "hole":
            self.counters["lost_records"] += trouble.lost

    def close(self, second: int) -> list[Signal]:
        """Tells it all under the second that has just closed."""
        signals = [
            Signal(
                partition=self._partition,
                second=second,
                tenant=self._tenant,
                kind=NAME,
                key=key,
                entity=Entity(kind="collector", id=key),
                model="",
                first_seen_us=told.first_us,
                last_seen_us=told.last_us,
                observed_milli=told.records * 1_000,
                baseline_milli=0,
                counts={"records": told.records},
                samples=told.samples,
                first_offset=told.first_offset,
                last_offset=told.last_offset,
            )
            for key, told in sorted(self._told.items())
        ]
        self._told, just = {}, self._told
        for problem, named in self._named.items():
            seen = {key: second if key in just else told_s for key, told_s in named.items()}
            self._named[problem] = {key: told_s for key, told_s in seen.items() if second - told_s < NAMED_S}
        return signals

    def snapshot(self) -> bytes:
        return _encoder.encode(_State(self._told, self.counters, self._unaudited, self._named))

    def restore(self, raw: bytes) -> None:
        state = _decoder.decode(raw)
        self._told, self.counters, self._unaudited = state.told, state.counters, state.unaudited
        self._named = state.named


class CoverageTwo(StageTwo):
    """Makes an alarm of each signal."""

    def signal(self, signal: Signal) -> list[Alarm]:
        """An episode starts when its second closed, not at a timestamp that may be hours off."""
        lane, _, problem = signal.entity.id.rpartition("#")
        records, unit = signal.counts["records"], UNITS.get(problem, "record")
        at_us = (signal.second + 1) * SECOND_US
        return [
            Alarm(
                tenant=signal.tenant,
                entity=signal.entity,
                model="",
                at_us=at_us,
                first_seen_us=at_us,
                last_seen_us=at_us,
                severity=SEVERITIES[problem],
                confidence="high",
                statistic=Statistic(
                    name=problem,
                    observed=float(records),
                    baseline=0.0,
                    threshold=0.0,
                    unit=f"{unit}s",
                ),
                counts=signal.counts,
                summary=SUMMARIES[problem].format(lane=lane, records=f"{records} {unit}{'s' * (records != 1)}"),
                offsets={signal.partition: (signal.first_offset, signal.last_offset)},
                samples=signal.samples,
                replay_us=(signal.first_seen_us, signal.last_seen_us),
            )
        ]


SUMMARIES: Final[dict[str, str]] = {
    "hole": "{records} missing from lane {lane}: the audit has a gap",
    "late": "{records} of lane {lane} came after the second was judged; the replay judges them too",
    "quarantined": "{records} of lane {lane} set apart: clock too far ahead, or collector not expected",
    "unaudited": "The engine behind lane {lane} finished {records} that nobody audited",
    "canary": "A guard of lane {lane} failed on {records} whose answer is known",
}
UNITS: Final[dict[str, str]] = {"unaudited": "request", "canary": "text"}

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_State)

DETECTOR: Final = Detector(
    card=Card(
        name=NAME,
        version="4",
        atlas=[],
        owasp=[],
        runbook=[
            "Is the collector alive, its clock right, the missing still in its journal? See `inferwatch status`.",
            "Unaudited: what else runs in the server's process? Failed canaries: was the guard changed?",
            "Was iw.events truncated, or written to by somebody else? Check the broker's access log.",
        ],
        key=["collector", "boot", "partition"],
        window_s=1,
        lookback_s=0,
    ),
    enabled=lambda config: config.enabled,
    stage_one=None,
    stage_two=lambda _: CoverageTwo(),
)
