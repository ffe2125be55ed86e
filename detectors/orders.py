"""The commands in force: what waits for its time, what holds findings back, and what was planned.

A command counts from `delay_s` after the broker took it, in event time, or from the next second to be judged where
that is later. So with time running normally its effect does not depend on when it was read.

A suppression is bound to one tenant, detector and entity, and never hides another victim: where the entity stands for
many (a model, a tenant), it holds only while everyone behind the alarm is named in it and was known when it was made.

Memory: `active_max` commands of about 500 bytes in force, and ten times as many that wait; at the limit a new one is
refused, since letting an old one go would tell people what they asked not to hear. Ids are kept as long as their
command could come again: after that its signature is too old.
"""

from bisect import insort
from typing import Final

from msgspec import Struct

from detectors.commands import AnyCommand, BadCommand, Change, Maintenance, Revoke, Suppress, public_keys, verify
from detectors.config import CommandsConfig
from detectors.detector import Alarm
from detectors.finding import CONTRIBUTORS_MAX, RANK
from detectors.rollup import Command
from detectors.time import SECOND_US

AGGREGATES: Final = ("model", "tenant")
"""Kinds of entity behind which there are others."""
KEPT_A_COMMAND: Final = 10
"""Ids remembered, and commands that wait, for each that may be in force."""

Key = tuple[str, str, str, str]
"""(tenant, detector, kind and id of the entity)."""


class Hold(Struct, frozen=True):
    """Why something is held back: the command, its operator, his reason."""

    command: str
    by: str
    why: str


class _Waiting(Struct, array_like=True):
    effective_us: int
    command_id: str
    command: AnyCommand


class OrdersState(Struct):
    """All that an `Orders` remembers."""

    waiting: list[_Waiting] = []
    suppressions: list[Suppress] = []
    windows: list[Maintenance] = []
    changes: list[Change] = []
    ids: dict[str, int] = {}
    """Id to append time in ms."""
    applied: dict[int, tuple[int, int]] = {}
    """Partition of iw.commands to (offset, append time in ms) of the last command read."""
    counters: dict[str, int] = {}


class Orders:
    """The commands of one stage-2 engine."""

    def __init__(self, config: CommandsConfig) -> None:
        self._config = config
        self._keys = public_keys(config)
        self._state = OrdersState(counters=dict.fromkeys(("taken", "refused", "repeated", "late"), 0))
        self._by_key: dict[Key, list[Suppress]] = {}
        self._by_tenant: dict[str, list[Maintenance]] = {}

    @property
    def counters(self) -> dict[str, int]:
        """Taken, refused, read again and so dropped, late (read after their time), and how many are in force."""
        return self._state.counters | {"active": self._active()}

    def applied(self, partition: int) -> tuple[int, int] | None:
        """(offset, append time in ms) of the last command read from a partition of iw.commands."""
        return self._state.applied.get(partition)

    def take(self, record: Command, next_us: int) -> None:
        """One record of iw.commands; nothing before `next_us` can be changed any more. Raises `BadCommand`."""
        state = self._state
        last = state.applied.get(record.partition)
        if last is not None and record.offset <= last[0] and record.append_ms <= last[1]:
            state.counters["repeated"] += 1  # carried over once more after a crash
            return
        state.applied[record.partition] = (record.offset, record.append_ms)
        try:
            command = self._admit(record, next_us)
        except BadCommand:
            state.counters["refused"] += 1
            raise
        state.ids[command.id] = record.append_ms
        state.counters["taken"] += 1
        usual_us = max(command.at_us, record.append_ms * 1000) + self._config.delay_s * SECOND_US
        usual_us = -(-usual_us // SECOND_US) * SECOND_US
        state.counters["late"] += usual_us < next_us
        insort(state.waiting, _Waiting(max(usual_us, next_us), command.id, command), key=_when)

    def _admit(self, record: Command, now_us: int) -> AnyCommand:
        command = verify(record.value, record.append_ms, self._keys, self._config)
        keep_ms = 2_000 * (self._config.age_max_s + self._config.ahead_max_s)
        state = self._state
        state.ids = {known: at_ms for known, at_ms in state.ids.items() if at_ms >= record.append_ms - keep_ms}
        if command.id in state.ids:
            raise BadCommand("a command with this id was taken before")
        self._forget(now_us)
        full = self._in_force(record.append_ms * 1000) >= self._config.active_max and not isinstance(command, Revoke)
        if full or max(len(state.ids), len(state.waiting)) >= KEPT_A_COMMAND * self._config.active_max:
            raise BadCommand(
                f"{self._config.active_max} commands are in force, the most allowed: revoke some, or let them end"
            )
        return command

    @property
    def next_us(self) -> int | None:
        """When the next command takes effect."""
        return self._state.waiting[0].effective_us if self._state.waiting else None

    def apply(self) -> AnyCommand:
        """Puts the next command into force and returns it."""
        command = self._state.waiting.pop(0).command
        if isinstance(command, Suppress):
            self._state.suppressions.append(command)
        elif isinstance(command, Maintenance):
            self._state.windows.append(command)
        elif isinstance(command, Change):
            self._state.changes.append(command)
        self._index()
        return command

    def revoke(self, revoked: Revoke) -> bool:
        """Ends a suppression, window or change of the same tenant; whether there was one."""
        before, state = self._active(), self._state
        ended = (revoked.command, revoked.tenant)
        state.suppressions = [each for each in state.suppressions if (each.id, each.tenant) != ended]
        state.windows = [each for each in state.windows if (each.id, each.tenant) != ended]
        state.changes = [each for each in state.changes if (each.id, each.tenant) != ended]
        self._index()
        return self._active() < before

    def suppressed(self, detector: str, alarm: Alarm, at_us: int) -> Hold | None:
        """The suppression that holds the alarm back."""
        for each in self._named(detector, alarm, at_us):
            if RANK[alarm.severity] <= RANK[each.severity] and everyone_known(alarm, set(each.known)):
                return Hold(each.id, each.by, each.reason)
        return None

    def names(self, detector: str, alarm: Alarm, at_us: int) -> bool:
        """Whether a suppression is bound to the alarm's entity, though it may not hold."""
        return bool(self._named(detector, alarm, at_us))

    def _named(self, detector: str, alarm: Alarm, at_us: int) -> list[Suppress]:
        named = self._by_key.get((alarm.tenant, detector, alarm.entity.kind, alarm.entity.id), [])
        return [each for each in named if at_us < each.until_us]

    def maintained(self, detector: str, alarm: Alarm, at_us: int) -> Hold | None:
        """The maintenance window that holds the alarm back. What is critical is told even so."""
        for each in self._by_tenant.get(alarm.tenant, []):
            bound = each.model in ("", alarm.model) and each.detector in ("", detector)
            if bound and each.from_us <= at_us < each.until_us and alarm.severity != "critical":
                return Hold(each.id, each.by, each.reason)
        return None

    def change_before(self, alarm: Alarm) -> str:
        """The newest planned change that could explain an alarm; empty without one."""
        for each in reversed(self._state.changes):
            since_us = alarm.at_us - each.from_us
            bound = each.tenant == alarm.tenant and each.model in ("", alarm.model)
            if bound and 0 <= since_us <= self._config.change_s * SECOND_US:
                return each.id
        return ""

    def dump(self) -> OrdersState:
        """All of it, for the snapshot; not to be changed."""
        return self._state

    def load(self, state: OrdersState) -> None:
        """Goes on from what `dump` gave."""
        self._state = state
        self._index()

    def _active(self) -> int:
        state = self._state
        return len(state.waiting) + len(state.suppressions) + len(state.windows) + len(state.changes)

    def _in_force(self, now_us: int) -> int:
        """How many hold or explain findings after `now_us`. Who reads old commands from the beginning, before any of
        them has taken effect, must not take what ended long ago for more than may be in force."""
        state = self._state
        waiting = (each.command for each in state.waiting)
        ends = [self._ends_us(each) for each in (*waiting, *state.suppressions, *state.windows, *state.changes)]
        return sum(end_us > now_us for end_us in ends)

    def _ends_us(self, command: AnyCommand) -> int:
        if isinstance(command, Suppress | Maintenance):
            return command.until_us
        return command.from_us + self._config.change_s * SECOND_US if isinstance(command, Change) else 0

    def _forget(self, now_us: int) -> None:
        """Lets go of what has ended before `now_us`."""
        state = self._state
        state.suppressions = [each for each in state.suppressions if self._ends_us(each) > now_us]
        state.windows = [each for each in state.windows if self._ends_us(each) > now_us]
        state.changes = [each for each in state.changes if self._ends_us(each) > now_us]
        self._index()

    def _index(self) -> None:
        self._by_key, self._by_tenant = {}, {}
        for order in self._state.suppressions:
            key = (order.tenant, order.detector, order.entity.kind, order.entity.id)
            self._by_key.setdefault(key, []).append(order)
        for window in self._state.windows:
            self._by_tenant.setdefault(window.tenant, []).append(window)


def everyone_known(alarm: Alarm, known: set[str]) -> bool:
    """Whether everyone behind an alarm is in `known`. False where the alarm does not name them all."""
    if alarm.entity.kind not in AGGREGATES:
        return True
    named = {contributor.entity.id for contributor in alarm.contributors}
    users = alarm.counts.get("users")
    all_named = len(named) < CONTRIBUTORS_MAX if users is None else users <= len(named)
    return all_named and named <= known


def _when(waiting: _Waiting) -> tuple[int, str]:
    return waiting.effective_us, waiting.command_id
