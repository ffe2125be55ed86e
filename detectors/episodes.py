"""An episode: one stretch of alarms about one entity, and the revisions of the finding that it becomes. Pure."""

import shlex
from typing import Final

import msgspec
from msgspec import Struct

from collector.event import from_timestamp_us
from detectors.detector import Alarm, Card
from detectors.finding import FINDING_SCHEMA_VERSION, RANK, Evidence, Finding, Severity, State
from detectors.orders import Hold
from detectors.rollup import earliest, merge_offsets, offset_ranges
from detectors.time import SECOND_US

LAST_US: Final = 253_402_300_799 * SECOND_US
"""The last second that a date can name."""


class Acknowledged(Struct, frozen=True):
    """Somebody sees to it, as long as it gets no worse."""

    hold: Hold
    severity: Severity
    until_us: int
    false_positive: bool


class Episode(Struct):
    """One open episode: its newest alarm and what has been said of it."""

    uid: str
    detector: str
    alarm: Alarm
    newest: Alarm
    """As it came, where `alarm` may be an earlier and stronger one."""
    start_us: int
    last_alarm_us: int
    incident: str
    openings: list[int]
    change: str = ""
    revision: int = 0
    told_us: int = 0
    told_rank: int = -1
    dirty: bool = True
    acknowledged: Acknowledged | None = None
    held: Hold | None = None
    """The suppression or window that does so."""
    pierced: bool = False
    """A suppression did not hold once, so it holds no more: else a finding would come and go."""
    held_back: bool = False
    """By a command, as of the last revision."""
    loud_rank: int = -1
    """The worst severity that people were told; -1: nothing yet."""
    led: bool = False


def finding_of(
    episode: Episode,
    card: Card,
    digest: str,
    state: State,
    *,
    topics: dict[int, str],
    ranges_max: int,
    flapping: int,
    leads: bool,
    quiet: bool,
) -> Finding:
    """The episode's present revision."""
    alarm, acknowledged, held = episode.alarm, episode.acknowledged, episode.held
    hold = held or (acknowledged.hold if acknowledged is not None else None)
    return Finding(
        schema_version=FINDING_SCHEMA_VERSION,
        uid=episode.uid,
        revision=episode.revision,
        state=state,
        tenant=alarm.tenant,
        detector=episode.detector,
        detector_version=card.version,
        config_digest=digest,
        severity=alarm.severity,
        confidence=alarm.confidence,
        entity=alarm.entity,
        model=alarm.model,
        first_seen_us=episode.start_us,
        last_seen_us=alarm.last_seen_us,
        updated_us=episode.told_us,
        statistic=alarm.statistic,
        counts=dict(sorted(alarm.counts.items())),
        summary=alarm.summary,
        evidence=Evidence(
            offsets=offset_ranges(alarm.offsets, topics, ranges_max),
            event_ids=[event_id for _, event_id in alarm.samples],
            replay=replay_command(episode.detector, alarm, episode.start_us, card.lookback_s),
        ),
        contributors=alarm.contributors,
        atlas=card.atlas,
        owasp=card.owasp,
        runbook=card.runbook,
        cold_start=alarm.cold_start,
        incident=episode.incident,
        leads=leads,
        flapping=flapping,
        acknowledged_by=acknowledged.hold.command if acknowledged is not None else "",
        false_positive=acknowledged is not None and acknowledged.false_positive,
        suppressed_by=held.command if held is not None else "",
        handled_by=hold.by if hold is not None else "",
        handled_why=hold.why if hold is not None else "",
        change=episode.change,
        quiet=quiet,
    )


def replay_command(detector: str, alarm: Alarm, start_us: int, lookback_s: int) -> str:
    """The command that reads the episode's events again. Times only, so it is the same however Kafka was laid out."""
    words = ["inferwatch", "backtest"]
    if alarm.replay_us is None:
        words += ["--detector", detector, "--tenant", alarm.tenant]
    begin_us, end_us = alarm.replay_us or (start_us - lookback_s * SECOND_US, alarm.at_us)
    if alarm.replay_from_us is not None:
        begin_us = min(begin_us, alarm.replay_from_us)
    return shlex.join([*words, "--from", _second(begin_us), "--to", _second(end_us + SECOND_US)])


def _second(moment_us: int) -> str:
    """ISO 8601, kept within 1970 and 9999: a hostile timestamp may lie outside."""
    return f"{from_timestamp_us(min(max(moment_us, 0), LAST_US) // SECOND_US * SECOND_US):%Y-%m-%dT%H:%M:%SZ}"


def joined(old: Alarm, new: Alarm) -> Alarm:
    """The newer alarm, or the stronger where that speaks, with the evidence of both and the worse severity."""
    offsets = dict(old.offsets)
    merge_offsets(offsets, new.offsets)
    begin_us, end_us = old.replay_us or (0, 0)
    spoken = old if new.peak_speaks and old.statistic.observed > new.statistic.observed else new
    return msgspec.structs.replace(
        spoken,
        at_us=new.at_us,
        replay_us=new.replay_us and (min(begin_us, new.replay_us[0]), max(end_us, new.replay_us[1])),
        replay_from_us=new.replay_from_us and min(new.replay_from_us, old.replay_from_us or new.replay_from_us),
        offsets=offsets,
        samples=earliest([*old.samples, *new.samples]),
        severity=max(old.severity, new.severity, key=RANK.__getitem__),
        last_seen_us=max(old.last_seen_us, new.last_seen_us),
    )
