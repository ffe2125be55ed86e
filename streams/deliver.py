"""Delivery: iw.findings to the sinks, one consumer group a sink, so that a dead or slow one holds up itself alone.

Guarantee: at least once, in order per finding; offsets are committed after delivery, so a crash sends again what went
out since the last commit. How a failure is tried again, and when a finding is given up, is `sinks.delivery`'s to say;
what is given up, or is no finding, becomes a dead letter.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from collector.kafka import (
    AIOKafkaConsumer,
    ConsumerRecord,
    KafkaConfig,
    TopicPartition,
    ensure_topics,
    make_consumer,
    wait_for_broker,
)
from detectors.finding import Finding
from sinks.config import DeliveryConfig, SinksConfig
from sinks.delivery import Delivery, Sink, describe
from sinks.registry import build_sinks
from streams.config import StreamsConfig
from streams.deadletter import DeadLetters, Unusable
from streams.health import Health, Reading
from streams.process import run_until_stopped
from streams.storing import commit, finding_of, lag_of

log = structlog.get_logger(__name__)

ROLE: Final = "deliver"
RESTART_DELAY_S: Final = 5.0
NEVER_MS: Final = 2**31 - 1


class Outlet:
    """One sink and its consumer."""

    def __init__(
        self, kafka: KafkaConfig, streams: StreamsConfig, sink: Sink, config: DeliveryConfig, letters: DeadLetters
    ) -> None:
        self.name = sink.name
        self.delivery = Delivery(sink, config, self._give_up)
        self._kafka, self._streams, self._letters = kafka, streams, letters
        self._consumer: AIOKafkaConsumer | None = None
        self._done: dict[TopicPartition, int] = {}
        self._fetched = False
        self._sources: dict[tuple[str, int], ConsumerRecord] = {}
        """Where the findings being delivered came from."""

    async def run(self) -> None:
        """Delivers until cancelled. Whatever goes wrong, it starts again from the last commit."""
        while True:
            try:
                await self._deliver_all()
            except Exception as error:  # noqa: BLE001  # one sink's trouble must not end the others
                log.warning("delivery starts again", sink=self.name, error=describe(error))
                await asyncio.sleep(RESTART_DELAY_S)

    async def _deliver_all(self) -> None:
        consumer = make_consumer(
            self._kafka,
            self._kafka.topic("findings"),
            group_id=f"{self._kafka.topic_prefix}-deliver-{self.name}",
            session_timeout_ms=int(self._streams.session_timeout_s * 1000),
            heartbeat_interval_ms=int(self._streams.session_timeout_s * 1000) // 6,
            rebalance_timeout_ms=30_000,
            # A sink that is away for hours must not cost the membership: heartbeats go on meanwhile.
            max_poll_interval_ms=NEVER_MS,
        )
        try:
            await consumer.start()
            self._consumer, self._done, self._fetched = consumer, {}, False
            while True:
                fetched = await consumer.getmany(timeout_ms=1000, max_records=self._streams.deliver_records_max)
                self._fetched = True
                for tp in consumer.assignment() - self._done.keys():
                    self._done[tp] = await consumer.committed(tp) or 0
                for tp, records in fetched.items():
                    await self._deliver(records)
                    self._done[tp] = records[-1].offset + 1
                    await commit(consumer, tp, records[-1].offset + 1)
        finally:
            self._consumer = None
            await consumer.stop()

    async def _deliver(self, records: Sequence[ConsumerRecord]) -> None:
        found: list[Finding] = []
        unusable = []
        for record in records:
            try:
                finding = finding_of(record.value or b"")
            except Unusable as error:
                unusable.append((record, str(error)))
                continue
            found.append(finding)
            self._sources[finding.uid, finding.revision] = record
        await self._letters.put(unusable)
        await self.delivery.deliver(found)
        self._sources.clear()

    async def _give_up(self, finding: Finding, reason: str) -> None:
        source = self._sources[finding.uid, finding.revision]
        await self._letters.put([(source, f"sink {self.name}: {reason}")])

    def lag(self) -> int:
        """Findings on the topic and not delivered yet, of the partitions fetched from so far."""
        return lag_of(self._consumer, self._done)

    def started(self) -> bool:
        """Whether the group was joined and a fetch came back."""
        return self._consumer is not None and self._fetched


class Deliver:
    """All sinks of one process. `run` in an event loop until `stop`."""

    def __init__(
        self, kafka: KafkaConfig, streams: StreamsConfig, sinks: Sequence[Sink], config: DeliveryConfig
    ) -> None:
        self._kafka, self._streams = kafka, streams
        self._letters = DeadLetters(kafka, ROLE)
        self._outlets = [Outlet(kafka, streams, sink, config, self._letters) for sink in sinks]
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Delivers until `stop`. Raises BrokerAway or TopicMismatch with one sentence."""
        await ensure_topics(self._kafka)
        tasks = [asyncio.create_task(job) for job in (self._stop.wait(), *(outlet.run() for outlet in self._outlets))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for outlet in self._outlets:
                await outlet.delivery.close()
            await self._letters.close()

    def stop(self) -> None:
        """Ends `run` soon. What is under way may be sent again at the next start."""
        self._stop.set()

    def reading(self) -> Reading:
        """The health of delivery: a sink's trouble is told, and does not make the process unready."""
        totals = {"dead_letters": self._letters.count}
        levels: dict[str, float] = {}
        troubles = []
        started = all(outlet.started() for outlet in self._outlets)
        for outlet in self._outlets:
            lag = outlet.lag()
            totals |= {f"{outlet.name}_{name}": total for name, total in outlet.delivery.totals.items()}
            levels |= {f"{outlet.name}_{name}": level for name, level in outlet.delivery.levels.items()}
            levels[f"{outlet.name}_behind"] = float(lag)
            if outlet.delivery.why:
                troubles.append(f"{outlet.name}: {outlet.delivery.why}")
            elif lag >= self._streams.lag_records_slow:
                troubles.append(f"{outlet.name} is slow: {lag} findings behind")
        return Reading(
            ready=started,
            why="; ".join(troubles) or ("" if started else "starting"),
            lag=sum(outlet.lag() for outlet in self._outlets),
            drops=self._letters.count,
            totals=totals,
            levels=levels,
        )


def run_deliver(
    kafka: KafkaConfig,
    streams: StreamsConfig,
    sinks: SinksConfig,
    *,
    config_digest: str = "",
    on_serving: Callable[[str], None] | None = None,
) -> None:
    """Runs delivery to all configured sinks until SIGTERM or SIGINT; `on_serving` is given the health address.

    Raises BrokerAway, TopicMismatch, SinkSetupError or OSError, each with one sentence.
    """

    async def main(stop: asyncio.Event) -> None:
        built = build_sinks(sinks)
        await wait_for_broker(kafka, streams.broker_timeout_s)
        deliver = Deliver(kafka, streams, built, sinks.delivery)
        async with Health(ROLE, kafka, streams, deliver.reading, config_digest=config_digest) as health:
            if on_serving is not None:
                on_serving(health.url)
            running = asyncio.create_task(deliver.run())
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            deliver.stop()
            await running

    run_until_stopped(main)
