"""How every process tells its health: `/healthz`, `/readyz`, `/metrics` on loopback, and a record on iw.status.

A role hands over one function that reads its counters; the pages, the metrics and the record are all made from that
reading, so they agree. No label is ever an entity: a process has one `role` and one `process_id`.

Guarantee: none of this harms the role. While the broker is away records are left out, and the next one says it all.
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Final, Self

import msgspec
import orjson
import structlog
from aiohttp import web
from msgspec import Struct
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from collector.event import from_timestamp_us
from collector.kafka import (
    AIOKafkaProducer,
    BatchRefused,
    BatchWriter,
    BrokerAway,
    KafkaConfig,
    KafkaError,
    make_producer,
    partition_for,
)
from streams.config import StreamsConfig
from streams.metrics import Histogram, Rate

log = structlog.get_logger(__name__)

LOOPBACK: Final = "127.0.0.1"


class Reading(Struct, frozen=True, kw_only=True):
    """What a role knows of itself at one moment."""

    ready: bool = True
    why: str = ""
    """Why it is not ready, or what is wrong though it is: one sentence."""
    lag: int = 0
    """Records appended to its topics and not handled yet."""
    watermark_us: int | None = None
    """Event time up to which all is told; None where the role has none."""
    late: int = 0
    drops: int = 0
    """Records that could not be used: dead letters, refused findings."""
    totals: Mapping[str, int] = {}
    """Counters since the process started."""
    levels: Mapping[str, float] = {}
    """Values that go up and down."""
    histograms: Mapping[str, Histogram] = {}
    """For the metrics page only."""


def process_id(role: str) -> str:
    """`ROLE-HOST-PID`."""
    return f"{role}-{socket.gethostname()}-{os.getpid()}"


class _Readings(Collector):
    """The reading as Prometheus metrics, `inferwatch_NAME` with the label `role`."""

    def __init__(self, role: str, read: Callable[[], Reading], clock_s: Callable[[], float]) -> None:
        self._role, self._read, self._clock_s = role, read, clock_s

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        reading = self._read()
        levels = {"ready": float(reading.ready), "lag_records": float(reading.lag), **reading.levels}
        if reading.watermark_us is not None:
            levels["watermark_seconds"] = reading.watermark_us / 1e6
            levels["watermark_delay_seconds"] = max(self._clock_s() - reading.watermark_us / 1e6, 0.0)
        for name, level in levels.items():
            gauge = GaugeMetricFamily(f"inferwatch_{name}", name.replace("_", " "), labels=["role"])
            gauge.add_metric([self._role], level)
            yield gauge
        for name, total in {"late": reading.late, "drops": reading.drops, **reading.totals}.items():
            counter = CounterMetricFamily(f"inferwatch_{name}", name.replace("_", " "), labels=["role"])
            counter.add_metric([self._role], total)
            yield counter
        for name, histogram in reading.histograms.items():
            family = HistogramMetricFamily(f"inferwatch_{name}", name.replace("_", " "), labels=["role"])
            family.add_metric([self._role], histogram.cumulative(), histogram.sum)
            yield family


class Health:
    """The three pages and the status record of one process. Use as `async with Health(…) as health: health.url`."""

    def __init__(
        self,
        role: str,
        kafka: KafkaConfig,
        streams: StreamsConfig,
        read: Callable[[], Reading],
        *,
        config_digest: str = "",
    ) -> None:
        self.process_id = process_id(role)
        self.url = ""
        self._role, self._kafka, self._streams, self._read = role, kafka, streams, read
        self._config_digest = config_digest
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Readings(role, self._read_with_rate, time.time))
        self._runner: web.AppRunner | None = None
        self._writing: asyncio.Task[None] | None = None
        self._rate = Rate(time.monotonic)
        self._producer: AIOKafkaProducer | None = None

    async def __aenter__(self) -> Self:
        """Binds loopback and starts the records. Raises OSError with one sentence where the port is taken."""
        app = web.Application()
        app.add_routes([web.get(f"/{page}", getattr(self, f"_{page}")) for page in ("healthz", "readyz", "metrics")])
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await self._runner.setup()
        site = web.TCPSite(self._runner, LOOPBACK, self._streams.health_port)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise OSError(
                f"port {self._streams.health_port} of {LOOPBACK} is taken ({error.strerror}): "
                "set streams.health_port, or 0 for any free one"
            ) from None
        self.url = f"http://{LOOPBACK}:{self._runner.addresses[0][1]}"
        self._writing = asyncio.create_task(self._write_records())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Says goodbye on iw.status, within a second, and frees the port."""
        if self._writing is not None:
            self._writing.cancel()
            with suppress(asyncio.CancelledError):
                await self._writing
        with suppress(KafkaError, BrokerAway, BatchRefused, OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self._write_record("stopped")
        await self._forget_producer()
        if self._runner is not None:
            await self._runner.cleanup()

    def _read_with_rate(self) -> Reading:
        reading = self._read()
        records = reading.totals.get("records")
        if records is None:
            return reading
        levels = {**reading.levels, "records_per_second": self._rate.of(records)}
        return msgspec.structs.replace(reading, levels=levels)

    def record(self, state: str = "running") -> dict[str, object]:
        """The status record as it would be written now."""
        reading = self._read_with_rate()
        watermark = reading.watermark_us
        return {
            "process_id": self.process_id,
            "role": self._role,
            "state": state,
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "version": version("inferwatch"),
            "config_digest": self._config_digest,
            "url": self.url,
            "ready": reading.ready,
            "why": reading.why,
            "lag": reading.lag,
            "watermark": None if watermark is None else from_timestamp_us(watermark).isoformat(timespec="milliseconds"),
            "late": reading.late,
            "drops": reading.drops,
            "totals": dict(reading.totals),
            "levels": dict(reading.levels),
        }

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        reading = self._read()
        return web.Response(status=200 if reading.ready else 503, text=f"{reading.why or 'ready'}\n")

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), content_type="text/plain", charset="utf-8")

    async def _write_records(self) -> None:
        told = False
        while True:
            try:
                async with asyncio.timeout(self._streams.status_interval_s + 5):
                    await self._write_record("running")
                told = False
            except (KafkaError, BrokerAway, BatchRefused, OSError, TimeoutError) as error:
                await self._forget_producer()
                if not told:
                    log.warning("status not written", role=self._role, error=type(error).__name__)
                told = True
            await asyncio.sleep(self._streams.status_interval_s)

    async def _write_record(self, state: str) -> None:
        if self._producer is None:
            self._producer = make_producer(self._kafka, client_id="status")
            await self._producer.start()
        writer = BatchWriter(self._producer, self._kafka.topic("status"))
        key = self.process_id.encode()
        await writer.append(key, orjson.dumps(self.record(state)), partition_for(key, self._kafka.count("status")))
        await writer.flush()

    async def _forget_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with suppress(KafkaError, OSError, TimeoutError):
                async with asyncio.timeout(1):
                    await producer.stop()
