"""What the publisher's parts hand to each other: tickets of begun requests, counters, and the heads of segments."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from collector.event import AuditEvent
from collector.guards.health import Health
from collector.journal import BEGIN
from collector.reconcile import Tally

KNOWN_BYTES_MAX: Final = 64 * 1024
"""What is known at `begin` is left out of the journal beyond this; a `lost` event then has only its id."""
GUARDS_MAX: Final = 64
UNENCODABLE: Final = (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)
_BEGIN: Final = bytes((BEGIN,))
_encoder = msgspec.json.Encoder()


class Closed(RuntimeError):
    """The publisher is not started, was stopped, or belongs to the process that this one was forked from."""


class Ticket:
    """A request that was begun. `event` is set once, by `finish`."""

    __slots__ = ("body", "event", "event_id", "key", "known", "partition", "segment", "started_us")

    def __init__(self, event_id: str, key: bytes, partition: int, started_us: int, known: Mapping[str, object]) -> None:
        self.event_id, self.key, self.partition, self.started_us = event_id, key, partition, started_us
        self.known = known
        self.body = b""
        """As journalled."""
        self.segment = 0
        """Where it was journalled last."""
        self.event: AuditEvent | None = None


class Begun(msgspec.Struct, frozen=True):
    """A journalled `begin`, read back."""

    event_id: str
    key: str
    partition: int
    started_us: int
    known: Mapping[str, Any]


class Counters:
    """What heartbeats carry. The engine and the guards count here; the rest is the book's."""

    __slots__ = (
        "dropped",
        "engine_requests",
        "events",
        "guard_errors",
        "guards",
        "invalid",
        "oversized",
        "rejections",
        "tally",
    )

    def __init__(self) -> None:
        self.engine_requests = 0
        self.events = 0
        self.rejections = 0
        self.dropped = 0
        """Records that the journal's bound took before Kafka had them."""
        self.oversized = 0
        self.invalid = 0
        self.guard_errors: dict[str, int] = {}
        self.guards: Health | None = None
        self.tally: Tally | None = None
        """The engine's own count, where there is an engine in this process."""

    def guard_error(self, guard: str) -> None:
        """One more error of this guard; at most 64 guards are told apart."""
        if guard in self.guard_errors or len(self.guard_errors) < GUARDS_MAX:
            self.guard_errors[guard] = self.guard_errors.get(guard, 0) + 1


class Meta(msgspec.Struct, frozen=True):
    """Head of a segment: whose journal it is, and where its lanes stood when the segment was made.

    So earlier segments can go, and the numbers are still known.
    """

    collector_id: str = ""
    model_version: str = ""
    seqs: dict[int, int] = {}
    """The next seq of each lane."""
    last_us: int = 0
    """The latest timestamp given."""
    heads: dict[int, tuple[str, str]] = {}
    """The chain's heads of each lane: of its records, of its heartbeats."""
    checkpoints: int = 0
    root: str = ""
    """How many checkpoints there were, and what the last one signed."""


def begin_body(ticket: Ticket, key: str) -> bytes:
    """The `begin` as journalled; without what is known where that is too large or can't be encoded."""
    begun = (ticket.event_id, key, ticket.partition, ticket.started_us)
    try:
        body = _BEGIN + _encoder.encode(Begun(*begun, ticket.known))
    except UNENCODABLE:
        body = b""
    return body if 0 < len(body) <= KNOWN_BYTES_MAX else _BEGIN + _encoder.encode(Begun(*begun, {}))
