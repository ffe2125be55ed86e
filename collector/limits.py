"""How much one API key, or one user known by a token or a proxy, may ask for: requests and tokens a minute, requests at
a time, bytes a request.

Guarantee: in no 60 s more than the limit. Time is counted in slots of 5 s, so a limit that was used up is whole again
after 60 to 65 s. Tokens are counted when an answer ends: what is in flight when the limit is met may go over it, so
`tokens_per_minute` wants `concurrent` beside it. Each server process counts for itself, and from nothing at its start.

Pure: the monotonic clock is an argument. Memory: one meter of 0.5 to 2.5 KB for each key that has a limit and asked in
the last 65 s, at most `keys_max`; where all are in use, a further key is refused.
"""

import threading
from collections import OrderedDict
from itertools import islice
from math import ceil
from typing import Annotated, Final

from msgspec import Meta, Struct

from collector.identity_config import LimitsConfig

SLOT_S: Final = 5
SLOTS: Final = 60 // SLOT_S
_LOOKED_AT: Final = 4

Bound = Annotated[int, Meta(ge=0, le=2**53)]


class Limit(Struct, frozen=True, forbid_unknown_fields=True):
    """What one key may use; 0 is no limit, None the limit of `[collector.identity.limits]`."""

    requests_per_minute: Bound | None = None
    tokens_per_minute: Bound | None = None
    concurrent: Bound | None = None
    body_bytes_max: Bound | None = None

    def over(self, other: "Limit") -> "Limit":
        """This one, and where it says nothing the other."""
        return Limit(
            *(mine if mine is not None else theirs for mine, theirs in zip(_all(self), _all(other), strict=True))
        )


def _all(limit: Limit) -> tuple[int | None, ...]:
    return limit.requests_per_minute, limit.tokens_per_minute, limit.concurrent, limit.body_bytes_max


class LimitReached(Exception):
    """A request is over a limit. `reason` is a fixed word for the event."""

    def __init__(self, reason: str, sentence: str, retry_after_s: int) -> None:
        super().__init__(sentence)
        self.reason, self.sentence, self.retry_after_s = reason, sentence, retry_after_s


class Window:
    """A count over the last 60 to 65 s. At most 13 slots."""

    __slots__ = ("_slots", "total")

    def __init__(self) -> None:
        self._slots: list[list[int]] = []
        self.total = 0

    def add(self, count: int, now_s: float) -> None:
        """Count at this moment."""
        self.pass_time(now_s)
        slot = int(now_s // SLOT_S)
        if self._slots and self._slots[-1][0] >= slot:
            self._slots[-1][1] += count
        else:
            self._slots.append([slot, count])
        self.total += count

    def pass_time(self, now_s: float) -> None:
        """Forget what is 60 s past."""
        first = int(now_s // SLOT_S) - SLOTS
        while self._slots and self._slots[0][0] < first:
            self.total -= self._slots.pop(0)[1]

    def free_in_s(self, limit: int, now_s: float) -> int:
        """Whole seconds until less than `limit` is counted; at least 1."""
        left, at = self.total, now_s
        for slot, count in self._slots:
            if left < limit:
                break
            left -= count
            at = (slot + SLOTS + 1) * SLOT_S
        return max(1, ceil(at - now_s))


class _Meter:
    __slots__ = ("last_s", "requests", "running", "tokens")

    def __init__(self) -> None:
        self.requests, self.tokens = Window(), Window()
        self.running, self.last_s = 0, 0.0


class Lease:
    """A request that was let in: `spend` what it used, `release` it at its end. Without a limit nothing is counted."""

    __slots__ = ("_limits", "_meter", "_running", "body_bytes_max")

    def __init__(self, limits: "Limits", meter: _Meter | None, body_bytes_max: int) -> None:
        self._limits, self._meter = limits, meter
        self._running = meter is not None
        self.body_bytes_max = body_bytes_max
        """0: no limit of its own."""

    def spend(self, tokens: int, now_s: float) -> None:
        """Count tokens; after `release` too, since an engine may end later than its request."""
        if self._meter is not None:
            self._limits.spend(self._meter, tokens, now_s)

    def release(self) -> None:
        """The request has ended. Later calls do nothing."""
        if self._running and self._meter is not None:
            self._running = False
            self._limits.release(self._meter)


class Limits:
    """The meters of all keys. Thread-safe."""

    def __init__(self, config: LimitsConfig) -> None:
        self._keys_max = config.keys_max
        self._default = Limit(
            config.requests_per_minute, config.tokens_per_minute, config.concurrent, config.body_bytes_max
        )
        self._meters: OrderedDict[str, _Meter] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._meters)

    def admit(self, key: str, own: Limit | None, now_s: float) -> Lease:
        """Let one request of `key` in and count it. Raises `LimitReached`; what is refused is not counted."""
        limit = self._default if own is None else own.over(self._default)
        body_bytes_max = limit.body_bytes_max or 0
        if not (limit.requests_per_minute or limit.tokens_per_minute or limit.concurrent):
            return Lease(self, None, body_bytes_max)
        with self._lock:
            meter = self._meter(key, now_s)
            _check(meter, limit, now_s)
            meter.requests.add(1, now_s)
            meter.running += 1
        return Lease(self, meter, body_bytes_max)

    def spend(self, meter: _Meter, tokens: int, now_s: float) -> None:
        """Count tokens of a request."""
        with self._lock:
            meter.tokens.add(tokens, now_s)
            meter.last_s = max(meter.last_s, now_s)

    def release(self, meter: _Meter) -> None:
        """One request less at work."""
        with self._lock:
            meter.running -= 1

    def _meter(self, key: str, now_s: float) -> _Meter:
        meter = self._meters.get(key)
        if meter is None:
            self._make_room(now_s)
            meter = self._meters[key] = _Meter()
        else:
            self._meters.move_to_end(key)
        meter.last_s = max(meter.last_s, now_s)
        return meter

    def _make_room(self, now_s: float) -> None:
        """Forgets keys of which nothing is counted any more: looks at four, those longest unused first.

        More are forgotten than come. One still in use goes to the end, so that a long stream hides nobody behind it.
        """
        for key in list(islice(self._meters, _LOOKED_AT)):
            oldest = self._meters[key]
            if oldest.running or oldest.last_s > now_s - 60 - SLOT_S:
                self._meters.move_to_end(key)
            else:
                del self._meters[key]
        if len(self._meters) >= self._keys_max:
            raise LimitReached("limits_full", "Too many keys are in use. Try again later.", 60)


def _check(meter: _Meter, limit: Limit, now_s: float) -> None:
    """Raises `LimitReached` where one more request is too many."""
    meter.requests.pass_time(now_s)
    meter.tokens.pass_time(now_s)
    if limit.concurrent and meter.running >= limit.concurrent:
        said = f"This key may have {limit.concurrent} requests at a time. Wait for one to end."
        raise LimitReached("concurrency_limit", said, 1)
    for name, reason, window, most in (
        ("requests", "request_limit", meter.requests, limit.requests_per_minute),
        ("tokens", "token_limit", meter.tokens, limit.tokens_per_minute),
    ):
        if most and window.total >= most:
            raise LimitReached(reason, f"This key may use {most} {name} a minute.", window.free_in_s(most, now_s))
