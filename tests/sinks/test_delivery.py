"""Delivery: what a failure means, when to try again, and what goes out once."""

import asyncio
import ssl
from collections.abc import Callable

import pytest

from sinks.config import DeliveryConfig
from sinks.delivery import Delivery, Refused, RetryLater
from tests.sinks.samples import START_US, finding


class ScriptedSink:
    """Answers each send with the next outcome of a script, then takes everything."""

    name = "scripted"

    def __init__(self, *script: BaseException | None, batch_max: int = 1) -> None:
        self.batch_max = batch_max
        self.script = list(script)
        self.sent: list[list[tuple[str, int]]] = []
        self.poison: Callable[[str], bool] = lambda uid: False

    async def send(self, findings):
        self.sent.append([(f.uid, f.revision) for f in findings])
        if any(self.poison(f.uid) for f in findings):
            raise Refused("poison")
        outcome = self.script.pop(0) if self.script else None
        if outcome is not None:
            raise outcome

    async def close(self):
        self.sent.append([])


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


def delivery(sink, clock=None, jitter=1.0, letters=None, **config):
    clock = clock or Clock()
    letters = [] if letters is None else letters

    async def dead_letter(found, reason):
        letters.append((found.uid, found.revision, reason))

    return Delivery(
        sink,
        DeliveryConfig(**config),
        dead_letter,
        jitter=lambda: jitter,
        clock_s=lambda: clock.now_s,
        now_us=lambda: START_US + 63_000_000,
        sleep=clock.sleep,
    )


async def test_failures_are_tried_again_with_doubling_bounds():
    """Full jitter: the wait is a fraction of a bound that doubles up to its maximum."""
    sink, clock = ScriptedSink(*[OSError("down")] * 5), Clock()
    await delivery(sink, clock, jitter=0.5, first_wait_s=1, wait_max_s=6).deliver([finding("a")])
    assert clock.slept == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert sink.sent == [[("a", 1)]] * 6


async def test_retry_after_is_honoured_up_to_a_limit():
    """The other side's wish wins over the jitter, but not over the configured maximum."""
    sink, clock = ScriptedSink(RetryLater("slow down", 30), RetryLater("slow down", 9999)), Clock()
    await delivery(sink, clock, retry_after_max_s=120).deliver([finding("a")])
    assert clock.slept == [30, 120]


async def test_a_refused_finding_goes_to_the_dead_letter_and_the_next_is_sent():
    """One bad finding stays one."""
    sink, letters = ScriptedSink(Refused("bad")), []
    made = delivery(sink, letters=letters)
    await made.deliver([finding("a"), finding("b")])
    assert letters == [("a", 1, "bad")]
    assert sink.sent == [[("a", 1)], [("b", 1)]]
    assert made.totals == {"delivered": 1, "retried": 0, "refused": 1, "skipped": 0, "quiet": 0, "joined": 0}


async def test_a_refused_batch_is_sent_one_by_one():
    """Only the bad finding of a batch is lost to the sink, and order is kept."""
    sink, letters = ScriptedSink(batch_max=10), []
    sink.poison = lambda uid: uid == "b"
    await delivery(sink, letters=letters).deliver([finding(u) for u in "abc"])
    assert sink.sent == [[("a", 1), ("b", 1), ("c", 1)], [("a", 1)], [("b", 1)], [("c", 1)]]
    assert letters == [("b", 1, "poison")]


@pytest.mark.parametrize(
    "defect", [ValueError("x"), KeyError("x"), TypeError(), UnicodeEncodeError("utf-8", "x", 0, 1, "no")]
)
async def test_a_defect_in_a_builder_does_not_block_the_sink(defect):
    """An error that would come again is a dead letter at once."""
    sink, letters = ScriptedSink(defect), []
    await delivery(sink, letters=letters).deliver([finding("a"), finding("b")])
    assert [(uid, revision) for uid, revision, _ in letters] == [("a", 1)]
    assert sink.sent == [[("a", 1)], [("b", 1)]]


async def test_a_bad_certificate_is_tried_again():
    """SSLCertVerificationError is a ValueError too, but a certificate can be renewed."""
    sink, letters = ScriptedSink(ssl.SSLCertVerificationError("expired")), []
    await delivery(sink, letters=letters).deliver([finding("a")])
    assert (letters, len(sink.sent)) == ([], 2)


async def test_attempts_and_age_are_bounded():
    """After the last attempt, or when the next would come too late, the finding is a dead letter."""
    letters = []
    await delivery(ScriptedSink(*[OSError("down")] * 9), letters=letters, attempts_max=3).deliver([finding("a")])
    await delivery(
        ScriptedSink(*[OSError("down")] * 9), letters=letters, age_max_s=10, first_wait_s=4, wait_max_s=4
    ).deliver([finding("b")])
    assert letters == [
        ("a", 1, "given up after 3 attempts: OSError: down"),
        ("b", 1, "given up after 3 attempts: OSError: down"),
    ]


async def test_a_send_that_hangs_is_given_up():
    """No sink can hang its delivery for ever, whatever it forgot to limit."""

    class Hanging(ScriptedSink):
        async def send(self, findings):
            await asyncio.Event().wait()

    letters = []
    await delivery(Hanging(), letters=letters, attempts_max=2, send_timeout_s=0.02).deliver([finding("a")])
    assert letters == [("a", 1, "given up after 2 attempts: TimeoutError")]


async def test_what_was_delivered_is_not_sent_again():
    """Neither the same revision nor an older one, in the same call or a later one."""
    sink = ScriptedSink(batch_max=10)
    made = delivery(sink)
    await made.deliver([finding("a", 1), finding("a", 1), finding("a", 2), finding("b", 2), finding("b", 1)])
    await made.deliver([finding("a", 2), finding("a", 3), finding("b", 1)])
    assert sink.sent == [[("a", 1), ("a", 2), ("b", 2)], [("a", 3)]]
    assert made.totals["skipped"] == 4


async def test_a_dead_letter_may_be_replayed():
    """A refused revision counts as not delivered."""
    sink = ScriptedSink(Refused("bad"))
    made = delivery(sink)
    await made.deliver([finding("a")])
    await made.deliver([finding("a")])
    assert made.totals == {"delivered": 1, "retried": 0, "refused": 1, "skipped": 0, "quiet": 0, "joined": 0}


async def test_memory_is_bounded():
    """The uid longest untouched is forgotten; its finding would be sent again."""
    sink = ScriptedSink()
    made = delivery(sink, remembered_max=2)
    await made.deliver([finding("a"), finding("b"), finding("c"), finding("a"), finding("c")])
    assert sink.sent == [[("a", 1)], [("b", 1)], [("c", 1)], [("a", 1)]]


async def test_a_dead_letter_that_can_not_be_written_stops_the_delivery():
    """So that nothing is committed that is nowhere."""

    async def broken(found, reason):
        raise ConnectionError("no broker")

    made = Delivery(ScriptedSink(Refused("bad")), DeliveryConfig(), broken)
    with pytest.raises(ConnectionError, match="no broker"):
        await made.deliver([finding("a")])


async def test_cancelling_sends_nothing_more():
    """A stop during the back-off ends the delivery at once; the finding is neither delivered nor a dead letter."""
    sink, letters = ScriptedSink(*[OSError("down")] * 9), []
    made = delivery(sink, letters=letters)
    made._sleep = asyncio.sleep
    task = asyncio.create_task(made.deliver([finding("a")]))
    await asyncio.sleep(0.02)
    assert made.why == "OSError: down"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (letters, made.totals["delivered"], made.levels["waiting_s"]) == ([], 0, 0.0)


async def test_levels_tell_lag():
    """The age of the last finding when it was delivered."""
    made = delivery(ScriptedSink())
    await made.deliver([finding("a")])
    assert made.levels == {"lag_s": 2.0, "waiting_s": 0.0}


async def test_what_a_command_holds_back_is_for_sinks_that_ask_for_it():
    """Passed over and counted; a sink in `quiet_sinks` gets it."""
    sink, asking = ScriptedSink(), ScriptedSink()
    made = delivery(sink)
    await made.deliver([finding("a", quiet=True), finding("b")])
    assert (sink.sent, made.totals["quiet"]) == ([[("b", 1)]], 1)
    await delivery(asking, quiet_sinks=(asking.name,)).deliver([finding("a", quiet=True)])
    assert asking.sent == [[("a", 1)]]


async def test_a_pager_is_told_once_an_incident():
    """It gets what leads and its close, not what joined."""
    sink = ScriptedSink()
    made = delivery(sink, once_per_incident=(sink.name,))
    joined = finding("b", incident="i")
    await made.deliver(
        [finding("a", incident="i", leads=True), joined, finding("a", 2, incident="i"), finding("a", 3, leads=True)]
    )
    assert (sink.sent, made.totals["joined"]) == ([[("a", 1)], [("a", 3)]], 2)
