"""From alarms to findings: an episode opens, is updated, and closes when it has been quiet.

Guarantees: one open episode per (tenant, detector, entity); `uid` is a digest of these and of the moment it opened, so
the same events give the same uid whoever computes them; revisions count from 1 without a hole; between two revisions
lie at least `update_s`, unless the severity rises, a command is applied, or the episode closes. An alarm within
`quiet_s` of the last belongs to the same episode: that is also the refractory period.

What a command holds back is no less an episode: every revision is made, and marked `quiet`, which sinks of people pass
over. It is told again (`leads`) once it is worse than what the command was given for, or the command ends.

Times are event time. What is due at a moment is done before anything later, so batches don't change the answer.
Memory: `episodes_max` episodes of about 4 KB; beyond that the longest quiet one closes early, of the tenant that has
most of them, which is counted;
`closed_max` closed findings of about 1 KB, so that they can still be called false.
"""

import heapq
import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Final

import msgspec
from msgspec import Struct

from detectors import finding as findings
from detectors.commands import Acknowledge, AnyCommand, FalsePositive, Revoke, Suppress
from detectors.config import CommandsConfig, LifecycleConfig
from detectors.detector import Alarm, Card
from detectors.episodes import Acknowledged, Episode, finding_of, joined
from detectors.finding import RANK, Finding, State, finding_uid
from detectors.flapping import Flapping
from detectors.incidents import Incident, Incidents
from detectors.orders import Hold, Key, Orders, OrdersState
from detectors.rollup import Command
from detectors.time import SECOND_US

__all__ = ["RANK", "Lifecycle"]

COUNTED: Final = (
    "alarms", "findings", "closed_early", "suppressed", "maintained", "acknowledged", "false_positives", "reopened",
    "pierced", "quiet", "unmatched",
)  # fmt: skip


class _State(Struct):
    episodes: list[tuple[Key, Episode]]
    closed: list[tuple[str, bytes]]
    incidents: list[tuple[str, Incident]]
    flapping: list[tuple[Key, tuple[int, list[int]]]]
    orders: OrdersState
    counters: list[dict[str, int]]


class Lifecycle:
    """The open episodes of one stage-2 engine."""

    def __init__(
        self,
        config: LifecycleConfig,
        cards: Mapping[str, Card],
        digest: str,
        commands: CommandsConfig | None = None,
    ) -> None:
        self._config = config
        self._cards = cards
        self._digest = digest
        self._commands = commands or CommandsConfig()
        self._episodes: dict[Key, Episode] = {}
        self._closed: dict[str, bytes] = {}
        """The last revision of closed findings, packed, longest closed first."""
        self._due: list[tuple[int, Key]] = []
        """A heap; an entry is stale when the episode's own deadline is later."""
        self._incidents = Incidents(config)
        self._flapping = Flapping(config)
        self._orders = Orders(self._commands)
        self.topics: dict[int, str] = {}
        """Partition to topic, for the evidence."""
        self._counters = dict.fromkeys(COUNTED, 0)

    @property
    def counters(self) -> dict[str, int]:
        """What was counted, by name; that of commands under commands.NAME."""
        orders = {f"commands.{name}": value for name, value in self._orders.counters.items()}
        return self._counters | self._incidents.counters | self._flapping.counters | orders

    @property
    def open_episodes(self) -> int:
        return len(self._episodes)

    def applied(self, partition: int) -> tuple[int, int] | None:
        """See `Orders.applied`."""
        return self._orders.applied(partition)

    def command(self, record: Command, next_us: int) -> None:
        """A record of iw.commands, to take effect at `next_us` or later. Raises `BadCommand`."""
        self._orders.take(record, next_us)

    def alarm(self, detector: str, alarm: Alarm) -> list[Finding]:
        """Opens an episode or adds to one."""
        self._counters["alarms"] += 1
        key: Key = (alarm.tenant, detector, alarm.entity.kind, alarm.entity.id)
        episode = self._episodes.get(key)
        said: list[Finding] = []
        if episode is None:
            said = self._make_room(alarm.at_us)
            episode = self._episodes[key] = self._open(key, alarm)
        else:
            episode.alarm = joined(episode.alarm, alarm)
            episode.newest = alarm
            episode.last_alarm_us = alarm.at_us
            episode.dirty = True
            self._incidents.touch(episode.incident, detector, alarm, episode.loud_rank)
        worse = RANK[episode.alarm.severity] > episode.told_rank
        freed = episode.held_back and not (_still(episode, alarm.at_us) or self._held(episode, alarm.at_us))
        if worse or freed or alarm.at_us >= self._update_us(episode):
            said.append(self._say(episode, alarm.at_us))
        heapq.heappush(self._due, (self._deadline_us(episode), key))
        return said

    def advance(self, until_us: int) -> list[Finding]:
        """Commands, updates and closings due at or before `until_us`, in order of their time."""
        said: list[Finding] = []
        while True:
            order_us = self._orders.next_us
            if order_us is not None and order_us <= min(until_us, self._due[0][0] if self._due else until_us):
                said += self._apply(self._orders.apply(), order_us)
                continue
            if not self._due or self._due[0][0] > until_us:
                return said
            due_us, key = heapq.heappop(self._due)
            episode = self._episodes.get(key)
            if episode is None or due_us != self._deadline_us(episode):
                continue
            if due_us >= self._close_us(episode):
                said.append(self._close(key, due_us))
            else:
                said.append(self._say(episode, due_us))
                heapq.heappush(self._due, (self._deadline_us(episode), key))

    def snapshot(self) -> bytes:
        return _encoder.encode(
            _State(
                list(self._episodes.items()),
                list(self._closed.items()),
                self._incidents.dump(),
                self._flapping.dump(),
                self._orders.dump(),
                [self._counters, self._incidents.counters, self._flapping.counters],
            )
        )

    def restore(self, raw: bytes) -> None:
        """Goes on from a snapshot. Raises `msgspec.DecodeError` for other bytes."""
        state = _decoder.decode(raw)
        self._episodes, self._closed = dict(state.episodes), dict(state.closed)
        self._incidents.load(state.incidents)
        self._flapping.load(state.flapping)
        self._orders.load(state.orders)
        self._counters, self._incidents.counters, self._flapping.counters = state.counters
        self._due = [(self._deadline_us(episode), key) for key, episode in state.episodes]
        heapq.heapify(self._due)

    def _open(self, key: Key, alarm: Alarm) -> Episode:
        detector = key[1]
        # Not by first_seen_us: evidence that fades slowly goes on from before an earlier episode.
        uid = finding_uid(alarm.tenant, detector, alarm.entity, alarm.at_us)
        return Episode(
            uid,
            detector,
            alarm,
            alarm,
            alarm.first_seen_us,
            alarm.at_us,
            self._incidents.join(uid, detector, alarm),
            self._flapping.opened(key, alarm.at_us),
            self._orders.change_before(alarm),
        )

    def _update_us(self, episode: Episode) -> int:
        return episode.told_us + self._config.update_s * SECOND_US

    def _close_us(self, episode: Episode) -> int:
        flaps = self._flapping.flaps(episode.openings)
        quiet_s = self._config.flap_quiet_s if flaps else self._config.quiet_s
        return episode.last_alarm_us + quiet_s * SECOND_US

    def _deadline_us(self, episode: Episode) -> int:
        close_us = self._close_us(episode)
        return min(close_us, self._update_us(episode)) if episode.dirty else close_us

    def _make_room(self, at_us: int) -> list[Finding]:
        """Closes the longest quiet episode of the tenant with most of them: a flood closes its own tenant's."""
        if len(self._episodes) < self._config.episodes_max:
            return []
        self._counters["closed_early"] += 1
        open_of = Counter(tenant for tenant, *_ in self._episodes)
        fullest = max(open_of, key=lambda tenant: (open_of[tenant], tenant))
        mine = (key for key in self._episodes if key[0] == fullest)
        return [self._close(min(mine, key=lambda key: (self._episodes[key].last_alarm_us, key)), at_us)]

    def _close(self, key: Key, at_us: int) -> Finding:
        episode = self._episodes.pop(key)
        self._flapping.closed(key, episode.openings, at_us)
        said = self._say(episode, at_us, closing=True)
        self._keep(said)
        return said

    def _keep(self, closed: Finding) -> None:
        if len(self._closed) >= self._config.closed_max:
            del self._closed[next(iter(self._closed))]
        self._closed[closed.uid] = zlib.compress(findings.encode(closed), 1)

    def _say(self, episode: Episode, at_us: int, *, closing: bool = False, answering: bool = False) -> Finding:
        """The next revision. Who was told of a finding is told of its close too, and of the answer to a command."""
        told, was_held = episode.loud_rank >= 0, episode.held_back
        if not closing:
            episode.held_back = self._settle(episode, at_us)
        quiet = not told if closing else episode.held_back and not (answering and told)
        state: State = "close" if closing else "update" if episode.revision and (told or quiet) else "open"
        rank = RANK[episode.alarm.severity]
        leads = episode.led and closing
        if not (closing or episode.held_back):
            leads = self._lead(episode, rank, freed=was_held)
        episode.revision += 1
        episode.told_us = at_us
        episode.told_rank = max(episode.told_rank, rank)
        episode.dirty = False
        self._counters["findings"] += 1
        self._counters["quiet"] += quiet
        return finding_of(
            episode,
            self._cards[episode.detector],
            self._digest,
            state,
            topics=self.topics,
            ranges_max=self._config.offset_ranges_max,
            flapping=len(episode.openings) if self._flapping.flaps(episode.openings) else 0,
            leads=leads,
            quiet=quiet,
        )

    def _lead(self, episode: Episode, rank: int, *, freed: bool) -> bool:
        """Whether a pager should ring for a revision that people are told; `freed`: the last one was held back."""
        leads = freed
        if freed or rank > episode.loud_rank:
            leads = self._incidents.leads(episode.incident, rank) or freed
        episode.loud_rank = max(episode.loud_rank, rank)
        episode.led = episode.led or leads
        return leads

    def _settle(self, episode: Episode, at_us: int) -> bool:
        """Whether the episode is held back from now on; notes by what, and what holds no more."""
        if episode.acknowledged is not None and not _still(episode, at_us):
            episode.acknowledged = None
            self._counters["reopened"] += 1
        held = self._held(episode, at_us)
        if held is not None and episode.held is None:
            self._incidents.hush(episode.incident)
        episode.held = None if held is None else held[1]
        if held is not None:
            self._counters[held[0]] += 1
        elif not episode.pierced and self._orders.names(episode.detector, episode.newest, at_us):
            episode.pierced = True
            self._counters["pierced"] += 1
        return episode.held is not None or episode.acknowledged is not None

    def _held(self, episode: Episode, at_us: int) -> tuple[str, Hold] | None:
        """The suppression or window that holds the episode back, and under which name that is counted.

        The newest alarm says who is behind it, the episode how bad it is.
        """
        alarm = msgspec.structs.replace(episode.newest, severity=episode.alarm.severity)
        suppressed = None if episode.pierced else self._orders.suppressed(episode.detector, alarm, at_us)
        if suppressed is not None:
            return "suppressed", suppressed
        maintained = self._orders.maintained(episode.detector, alarm, at_us)
        return None if maintained is None else ("maintained", maintained)

    def _apply(self, command: AnyCommand, at_us: int) -> list[Finding]:
        """What a command changes at once: the revision that says so, where it is about a finding."""
        if isinstance(command, Acknowledge | FalsePositive):
            return self._acknowledge(command, at_us)
        if isinstance(command, Suppress):
            named: Key = (command.tenant, command.detector, command.entity.kind, command.entity.id)
            bound = self._episodes.get(named)
            if bound is None:
                return []
            bound.pierced = False
            return [self._answer(named, bound, at_us)]
        if isinstance(command, Revoke) and not self._orders.revoke(command):
            for key, episode in self._episodes.items():
                acknowledged = episode.acknowledged
                if key[0] == command.tenant and acknowledged and acknowledged.hold.command == command.command:
                    episode.acknowledged = None
                    return [self._answer(key, episode, at_us)]
            self._counters["unmatched"] += 1
        return []

    def _answer(self, key: Key, episode: Episode, at_us: int) -> Finding:
        said = self._say(episode, at_us, answering=True)
        heapq.heappush(self._due, (self._deadline_us(episode), key))
        return said

    def _acknowledge(self, command: Acknowledge | FalsePositive, at_us: int) -> list[Finding]:
        """A finding that got worse since the operator looked is not acknowledged."""
        false = isinstance(command, FalsePositive)
        hold = Hold(command.id, command.by, command.reason)
        for key, episode in self._episodes.items():
            if episode.uid == command.uid and key[0] == command.tenant:
                if RANK[episode.alarm.severity] > RANK[command.severity]:
                    break
                before = episode.acknowledged
                self._count_feedback(key[1], false and not (before and before.false_positive), before is None)
                until_us = at_us + self._commands.acknowledge_s * SECOND_US
                episode.acknowledged = Acknowledged(hold, command.severity, until_us, false)
                return [self._answer(key, episode, at_us)]
        packed = self._closed.get(command.uid)
        closed = None if packed is None else findings.decode(zlib.decompress(packed))
        if closed is None or closed.tenant != command.tenant or RANK[closed.severity] > RANK[command.severity]:
            self._counters["unmatched"] += 1
            return []
        self._count_feedback(closed.detector, false and not closed.false_positive, not closed.acknowledged_by)
        said = msgspec.structs.replace(
            closed,
            revision=closed.revision + 1,
            updated_us=at_us,
            acknowledged_by=hold.command,
            false_positive=false,
            handled_by=hold.by,
            handled_why=hold.why,
            leads=False,
        )
        self._counters["findings"] += 1
        self._closed[said.uid] = zlib.compress(findings.encode(said), 1)
        return [said]

    def _count_feedback(self, detector: str, newly_false: bool, newly_seen: bool) -> None:
        self._counters["acknowledged"] += newly_seen
        if newly_false:
            self._counters["false_positives"] += 1
            name = f"false_positives.{detector}"
            self._counters[name] = self._counters.get(name, 0) + 1


def _still(episode: Episode, at_us: int) -> bool:
    """Whether its acknowledgement holds: neither worse than acknowledged, nor for too long."""
    acknowledged = episode.acknowledged
    if acknowledged is None:
        return False
    return RANK[episode.alarm.severity] <= RANK[acknowledged.severity] and at_us < acknowledged.until_us


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(_State)
