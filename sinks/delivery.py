"""Delivery, once for all sinks: retries with back-off and jitter, the dead letter, order, and no sending twice.

A sink only sends; this decides what a failure means. Guarantee, per sink: findings leave in the order given, so those
of one uid too; `deliver` returns when each was delivered or handed to the dead letter, so the caller may commit then.
A crash before that sends again what went out since the last commit: receivers tell by uid and revision. Within a
process nothing that was delivered goes out again, nor a revision older than one delivered.

Memory: one small integer for each of at most `remembered_max` uids, least recently used forgotten first.
"""

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

import structlog

from detectors.finding import Finding
from sinks.config import DeliveryConfig

log = structlog.get_logger(__name__)

DeadLetter = Callable[[Finding, str], Awaitable[None]]
"""Takes a finding that can't be delivered, and why. When it raises, `deliver` raises, and nothing is committed."""

_DEFECTS: Final = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
"""Raised by a builder that can't cope with a finding: trying again would only hold up the others."""


class Sink(Protocol):
    """Somewhere that findings go. One file, `sinks/NAME.py`, with a `build`; the contract tests run over all."""

    name: str
    """As in `[sinks.NAME]`; also the label of its metrics."""
    batch_max: int
    """Most findings that one `send` is given; 1 where a failure must touch one alone."""

    async def send(self, findings: Sequence[Finding]) -> None:
        """Sends all, in order, and returns once the other side has them.

        Raises `Refused` when this can never succeed, `RetryLater` when the other side says when to come back, anything
        else (OSError, TimeoutError) for a failure that may pass; then all are given again.
        """

    async def close(self) -> None:
        """Frees what it holds. May be called twice."""


class SinkSetupError(ValueError):
    """A sink can't be built from its settings; the message is one sentence that names the setting."""


class Refused(Exception):
    """The other side will never take this finding: it goes to the dead letter, and the next one is sent."""


class RetryLater(Exception):
    """The other side asks to wait `retry_after_s` seconds."""

    def __init__(self, reason: str, retry_after_s: float) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Delivery:
    """Brings findings to one sink. One `deliver` at a time."""

    def __init__(
        self,
        sink: Sink,
        config: DeliveryConfig,
        dead_letter: DeadLetter,
        *,
        jitter: Callable[[], float] = random.random,
        clock_s: Callable[[], float] = time.monotonic,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`jitter` gives a number in [0, 1); `clock_s` measures waiting, `now_us` the findings' lag."""
        self.sink = sink
        self.why = ""
        """The last failure, while a finding waits for its next attempt or after the sink refused one; else empty."""
        self._config = config
        self._dead_letter = dead_letter
        self._jitter, self._clock_s, self._now_us, self._sleep = jitter, clock_s, now_us, sleep
        self._revisions: OrderedDict[str, int] = OrderedDict()
        self._waiting_since_s: float | None = None
        self._lag_s = 0.0
        self._totals = dict.fromkeys(("delivered", "retried", "refused", "skipped", "quiet", "joined"), 0)
        self._gives_quiet = sink.name in config.quiet_sinks
        self._gives_leads_only = sink.name in config.once_per_incident

    @property
    def totals(self) -> dict[str, int]:
        """Since the start: findings delivered, refused (dead letters), skipped (sent before), and attempts retried;
        not meant for this sink: quiet (a command holds them back), joined (an incident that it was told of)."""
        return dict(self._totals)

    @property
    def levels(self) -> dict[str, float]:
        """`lag_s`: age of the last finding when delivered. `waiting_s`: how long the present one has been tried."""
        since = self._waiting_since_s
        return {"lag_s": self._lag_s, "waiting_s": 0.0 if since is None else self._clock_s() - since}

    async def deliver(self, findings: Sequence[Finding]) -> None:
        """Delivers in order, each finding once; what can't be goes to the dead letter. Raises what that raises."""
        batch: list[Finding] = []
        newest: dict[str, int] = {}
        for finding in filter(self._meant, findings):
            if finding.revision <= newest.get(finding.uid, self._revisions.get(finding.uid, 0)):
                self._totals["skipped"] += 1
                continue
            batch.append(finding)
            newest[finding.uid] = finding.revision
            if len(batch) >= self.sink.batch_max:
                await self._bring(batch)
                batch, newest = [], {}
        if batch:
            await self._bring(batch)

    def _meant(self, finding: Finding) -> bool:
        """Whether the sink is to be told; counts what is not."""
        if finding.quiet and not self._gives_quiet:
            self._totals["quiet"] += 1
            return False
        if self._gives_leads_only and not finding.leads:
            self._totals["joined"] += 1
            return False
        return True

    async def close(self) -> None:
        """Closes the sink."""
        await self.sink.close()

    async def _bring(self, batch: Sequence[Finding]) -> None:
        """Until delivered or given up. A batch that is refused is tried one by one, so that only the bad one goes."""
        reason = await self._try(batch)
        if reason is None:
            for finding in batch:
                self._remember(finding)
        elif len(batch) > 1:
            for finding in batch:
                await self._bring([finding])
        else:
            self._totals["refused"] += 1
            log.error("finding not delivered", sink=self.sink.name, uid=batch[0].uid, reason=reason)
            await self._dead_letter(batch[0], reason)

    async def _try(self, batch: Sequence[Finding]) -> str | None:
        """None when delivered, else why it never will be."""
        began_s = self._waiting_since_s = self._clock_s()
        attempt = 0
        try:
            while True:
                attempt += 1
                least_s = 0.0
                try:
                    async with asyncio.timeout(self._config.send_timeout_s):
                        await self.sink.send(batch)
                except Refused as error:
                    self.why = str(error)
                    return self.why
                except RetryLater as error:
                    self.why, least_s = str(error), min(error.retry_after_s, self._config.retry_after_max_s)
                except Exception as error:  # noqa: BLE001  # whatever a sink raises must stay this sink's trouble
                    self.why = describe(error)
                    if isinstance(error, _DEFECTS) and not isinstance(error, OSError):
                        return self.why
                else:
                    self.why = ""
                    return None
                wait_s = max(least_s, self._wait_s(attempt))
                if self._given_up(attempt, self._clock_s() - began_s + wait_s):
                    return f"given up after {attempt} attempts: {self.why}"
                self._totals["retried"] += 1
                log.warning(
                    "delivery waits", sink=self.sink.name, attempt=attempt, wait_s=round(wait_s, 1), why=self.why
                )
                await self._sleep(wait_s)
        finally:
            self._waiting_since_s = None

    def _wait_s(self, attempt: int) -> float:
        """Exponential back-off with full jitter: uniform between 0 and the bound, which doubles each attempt.

        Source: M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
        """
        bound_s = min(self._config.wait_max_s, self._config.first_wait_s * 2.0 ** min(attempt - 1, 60))
        return self._jitter() * bound_s

    def _given_up(self, attempt: int, age_s: float) -> bool:
        attempts_max = self._config.attempts_max
        return (attempts_max > 0 and attempt >= attempts_max) or age_s > self._config.age_max_s

    def _remember(self, finding: Finding) -> None:
        self._totals["delivered"] += 1
        self._lag_s = max(0.0, (self._now_us() - finding.updated_us) / 1e6)
        self._revisions[finding.uid] = finding.revision
        self._revisions.move_to_end(finding.uid)
        if len(self._revisions) > self._config.remembered_max:
            self._revisions.popitem(last=False)


def describe(error: BaseException, limit: int = 200) -> str:
    """Class and message of an error on one line, cut."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}" if text else type(error).__name__
