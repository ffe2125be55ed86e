"""The engine's own count on its way out: in heartbeats, at once where it grows, and at the end."""

import time

from collector.event import Heartbeat
from collector.reconcile import Tally
from tests.collector.publishing import Maker, read


def test_growth_of_unaudited_inference_is_told_at_once_and_the_last_of_it_at_the_stop(make: Maker) -> None:
    """Long before any lane is silent, on lane 0 alone; what comes right before the stop is told before the goodbye."""
    publisher = make(heartbeat_ms=5_000)
    publisher.start()
    tally = publisher.counters.tally = Tally()
    tally.begin("known")
    tally.finish("known")
    tally.finish("around")
    time.sleep(1.6)  # beats are looked for five times a period
    tally.finish("around again")
    publisher.stop()
    beats = [(one.partition, one.record) for one in read(make.kafka) if isinstance(one.record, Heartbeat)]
    assert [(lane, beat.engine_finished, beat.unaudited) for lane, beat in beats] == [(0, 2, 1), (0, 3, 2)]
