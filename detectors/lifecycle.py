"""From alarms to findings: an episode opens, is updated, and closes when it has been quiet.

Guarantees: one open episode per (tenant, detector, entity); `uid` is a digest of these and the episode's start, so the
same events give the same uid whoever computes them; revisions count from 1 without a hole; between two revisions lie at
least `update_s`, unless the severity rises or the episode closes. An alarm within `quiet_s` of the last belongs to the
same episode: that is also the refractory period.

Times are event time. What is due at a moment is done before anything later, so batches don't change the answer.
Memory: `episodes_max` episodes of about 2 KB; beyond that the longest quiet one closes early, which is counted.
"""

import heapq
import shlex
from typing import Final

import msgspec
from msgspec import Struct

from collector.event import from_timestamp_us
from detectors.config import LifecycleConfig
from detectors.detector import Alarm, Card
from detectors.finding import FINDING_SCHEMA_VERSION, Evidence, Finding, Severity, State, finding_uid
from detectors.rollup import earliest, merge_offsets, offset_ranges
from detectors.time import SECOND_US

LAST_US: Final = 253_402_300_799 * SECOND_US
"""The last second that a date can name."""
RANK: Final[dict[Severity, int]] = {"info": 0, "low": 1, "medium": 2, "high": 3, "critical": 4}


class Episode(Struct):
    """One open episode: its newest alarm and what has been said of it."""

    uid: str
    detector: str
    alarm: Alarm
    start_us: int
    last_alarm_us: int
    revision: int = 0
    told_us: int = 0
    told_rank: int = -1
    dirty: bool = True


Key = tuple[str, str, str, str]


class Lifecycle:
    """The open episodes of one stage-2 engine."""

    def __init__(self, config: LifecycleConfig, cards: dict[str, Card], digest: str) -> None:
        self._config = config
        self._cards = cards
        self._digest = digest
        self._episodes: dict[Key, Episode] = {}
        self._due: list[tuple[int, Key]] = []
        """A heap; an entry is stale when the episode's own deadline is later."""
        self.topics: dict[int, str] = {}
        """Partition to topic, for the evidence."""
        self.counters: dict[str, int] = {"alarms": 0, "findings": 0, "closed_early": 0}

    @property
    def open_episodes(self) -> int:
        return len(self._episodes)

    def alarm(self, detector: str, alarm: Alarm) -> list[Finding]:
        """Opens an episode or adds to one."""
        self.counters["alarms"] += 1
        key: Key = (alarm.tenant, detector, alarm.entity.kind, alarm.entity.id)
        episode = self._episodes.get(key)
        said: list[Finding] = []
        if episode is None:
            said = self._make_room(alarm.at_us)
            uid = finding_uid(alarm.tenant, detector, alarm.entity, alarm.first_seen_us)
            episode = Episode(uid, detector, alarm, alarm.first_seen_us, alarm.at_us)
            self._episodes[key] = episode
        else:
            episode.alarm = _joined(episode.alarm, alarm)
            episode.last_alarm_us = alarm.at_us
            episode.dirty = True
        if RANK[episode.alarm.severity] > episode.told_rank or alarm.at_us >= self._update_us(episode):
            said.append(self._say(episode, alarm.at_us))
        heapq.heappush(self._due, (self._deadline_us(episode), key))
        return said

    def advance(self, until_us: int) -> list[Finding]:
        """Updates and closings due at or before `until_us`, in order of their time."""
        said: list[Finding] = []
        while self._due and self._due[0][0] <= until_us:
            due_us, key = heapq.heappop(self._due)
            episode = self._episodes.get(key)
            if episode is None or due_us != self._deadline_us(episode):
                continue
            if due_us >= self._close_us(episode):
                said.append(self._close(key, due_us))
            else:
                said.append(self._say(episode, due_us))
                heapq.heappush(self._due, (self._deadline_us(episode), key))
        return said

    def snapshot(self) -> bytes:
        return _encoder.encode((list(self._episodes.items()), self.counters))

    def restore(self, raw: bytes) -> None:
        episodes, self.counters = _decoder.decode(raw)
        self._episodes = dict(episodes)
        self._due = [(self._deadline_us(episode), key) for key, episode in episodes]
        heapq.heapify(self._due)

    def _update_us(self, episode: Episode) -> int:
        return episode.told_us + self._config.update_s * SECOND_US

    def _close_us(self, episode: Episode) -> int:
        return episode.last_alarm_us + self._config.quiet_s * SECOND_US

    def _deadline_us(self, episode: Episode) -> int:
        close_us = self._close_us(episode)
        return min(close_us, self._update_us(episode)) if episode.dirty else close_us

    def _make_room(self, at_us: int) -> list[Finding]:
        if len(self._episodes) < self._config.episodes_max:
            return []
        self.counters["closed_early"] += 1
        oldest = min(self._episodes, key=lambda key: (self._episodes[key].last_alarm_us, key))
        return [self._close(oldest, at_us)]

    def _close(self, key: Key, at_us: int) -> Finding:
        return self._say(self._episodes.pop(key), at_us, closing=True)

    def _say(self, episode: Episode, at_us: int, *, closing: bool = False) -> Finding:
        state: State = "close" if closing else "update" if episode.revision else "open"
        episode.revision += 1
        episode.told_us = at_us
        episode.told_rank = max(episode.told_rank, RANK[episode.alarm.severity])
        episode.dirty = False
        self.counters["findings"] += 1
        return self._finding(episode, state)

    def _finding(self, episode: Episode, state: State) -> Finding:
        alarm, card = episode.alarm, self._cards[episode.detector]
        return Finding(
            schema_version=FINDING_SCHEMA_VERSION,
            uid=episode.uid,
            revision=episode.revision,
            state=state,
            tenant=alarm.tenant,
            detector=episode.detector,
            detector_version=card.version,
            config_digest=self._digest,
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
                offsets=offset_ranges(alarm.offsets, self.topics, self._config.offset_ranges_max),
                event_ids=[event_id for _, event_id in alarm.samples],
                replay=replay_command(episode.detector, alarm, episode.start_us, card.lookback_s),
            ),
            contributors=alarm.contributors,
            atlas=card.atlas,
            owasp=card.owasp,
            runbook=card.runbook,
            cold_start=alarm.cold_start,
        )


def replay_command(detector: str, alarm: Alarm, start_us: int, lookback_s: int) -> str:
    """The command that reads the episode's events again. Times only, so it is the same however Kafka was laid out."""
    words = ["inferwatch", "backtest"]
    if alarm.replay_us is None:
        words += ["--detector", detector, "--tenant", alarm.tenant]
    begin_us, end_us = alarm.replay_us or (start_us - lookback_s * SECOND_US, alarm.at_us)
    return shlex.join([*words, "--from", _second(begin_us), "--to", _second(end_us + SECOND_US)])


def _second(moment_us: int) -> str:
    """ISO 8601, kept within 1970 and 9999: a hostile timestamp may lie outside."""
    return f"{from_timestamp_us(min(max(moment_us, 0), LAST_US) // SECOND_US * SECOND_US):%Y-%m-%dT%H:%M:%SZ}"


def _joined(old: Alarm, new: Alarm) -> Alarm:
    """The newer alarm, or the stronger where that speaks, with the evidence of both and the worse severity."""
    offsets = dict(old.offsets)
    merge_offsets(offsets, new.offsets)
    begin_us, end_us = old.replay_us or (0, 0)
    spoken = old if new.peak_speaks and old.statistic.observed > new.statistic.observed else new
    return msgspec.structs.replace(
        spoken,
        at_us=new.at_us,
        replay_us=new.replay_us and (min(begin_us, new.replay_us[0]), max(end_us, new.replay_us[1])),
        offsets=offsets,
        samples=earliest([*old.samples, *new.samples]),
        severity=max(old.severity, new.severity, key=RANK.__getitem__),
        last_seen_us=max(old.last_seen_us, new.last_seen_us),
    )


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[list[tuple[Key, Episode]], dict[str, int]])
