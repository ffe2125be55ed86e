"""The long-running roles of the analysis side, each handed its part of the configuration.

Here the rooms meet: the store process is ingest (streams), the read-only face (sinks) and the HTML view (dashboards).
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, closing
from datetime import UTC, datetime

import orjson
import structlog
from rich.console import Console
from rich.table import Table

from collector.event import timestamp_us
from collector.kafka import BrokerAway, ensure_topics, wait_for_broker
from dashboards.view import make_view, serve_view
from detectors.finding import Finding, encode
from inferwatch.config import Config
from inferwatch.processes import write_run_file
from sinks.clickhouse.clients import clients_of, folder_of
from sinks.clickhouse.face import Face
from sinks.clickhouse.store import Store, open_store
from streams.backtest import backtest, commands_of
from streams.backtest_store import backtest_store
from streams.deliver import run_deliver as deliver_findings
from streams.health import Health
from streams.ingest import Ingest
from streams.process import run_until_stopped
from streams.stage1 import run_stage1
from streams.stage2 import run_stage2
from streams.status import read_status

log = structlog.get_logger(__name__)


def _announce(config: Config, role: str) -> Callable[[str], None]:
    """Writes the run file once the health pages are up."""

    def serving(url: str) -> None:
        write_run_file(config.data_dir, role, url)

    return serving


def run_detect(config: Config, stage: int) -> None:
    """One worker of stage 1 or 2, until SIGTERM."""
    run = {1: run_stage1, 2: run_stage2}[stage]
    run(
        config.kafka,
        config.detect,
        config.streams,
        data_dir=config.data_dir / f"detect-{stage}",
        config_digest=config.digest(),
        on_serving=_announce(config, f"detect-{stage}"),
    )


def run_deliver(config: Config) -> None:
    """Delivery to all configured sinks, until SIGTERM. Raises ValueError where none is configured."""
    if not config.sinks.names:
        raise ValueError("no sink is configured: add [sinks.file], [sinks.webhook] or [sinks.syslog]")
    deliver_findings(
        config.kafka,
        config.streams,
        config.sinks,
        config_digest=config.digest(),
        on_serving=_announce(config, "deliver"),
    )


def run_store(config: Config) -> None:
    """The process that owns the store, until SIGTERM: ingest, the read-only face for Grafana, the HTML view.

    A server needs no face: Grafana reads it directly.
    """
    store = open_store(config.store)
    try:
        run_until_stopped(lambda stop: _serve_store(config, store, stop))
    finally:
        store.close()


async def _serve_store(config: Config, store: Store, stop: asyncio.Event) -> None:
    await wait_for_broker(config.kafka, config.streams.broker_timeout_s)
    ingest = Ingest(config.kafka, config.streams, config.detect.time, store, data_dir=config.data_dir / "ingest")
    async with AsyncExitStack() as stack:
        health = Health("store", config.kafka, config.streams, ingest.reading, config_digest=config.digest())
        await stack.enter_async_context(health)
        if folder_of(config.store) is not None:
            face = await stack.enter_async_context(Face(config.store))
            log.info("the store answers queries", url=face.url)
        runner, view_url = await serve_view(make_view(store.query, config.dashboards), config.dashboards)
        stack.push_async_callback(runner.cleanup)
        log.info("the view is up", url=view_url)
        write_run_file(config.data_dir, "store", health.url)
        running, stopping = asyncio.create_task(ingest.run()), asyncio.create_task(stop.wait())
        await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        ingest.stop()
        await running


async def print_backtest(
    config: Config, *, source: str, detector: str, tenant: str, begin: datetime | None, end: datetime | None
) -> None:
    """The revisions that match, as the stages wrote them: byte for byte, one a line."""
    begin_us = timestamp_us(begin.replace(tzinfo=UTC)) if begin else 0
    end_us = timestamp_us(end.replace(tzinfo=UTC)) if end else None
    if source == "store":
        again = _from_store(config, end_us)
    else:
        again = backtest(config.kafka, config.detect, timeout_s=config.streams.broker_timeout_s)
    async for finding in again:
        asked = detector in ("", finding.detector) and tenant in ("", finding.tenant)
        if asked and begin_us <= finding.updated_us and (end_us is None or finding.updated_us <= end_us):
            sys.stdout.buffer.write(encode(finding) + b"\n")
    sys.stdout.buffer.flush()


async def _from_store(config: Config, end_us: int | None) -> AsyncIterator[Finding]:
    """The store's events, and the commands of people where a broker answers that has them.

    Raises `StoreInUse` where chDB's own process runs: it allows no other.
    """
    topic, partitions = config.kafka.topic("events"), config.kafka.count("events")
    try:
        await wait_for_broker(config.kafka, config.streams.broker_timeout_s)
        partitions = (await ensure_topics(config.kafka))[topic]
        commands = await commands_of(config.kafka)
    except BrokerAway as away:
        log.warning("judged without the commands of people", why=str(away))
        commands = []
    with closing(Store(config.store, clients_of(config.store))) as store:
        for finding in backtest_store(
            store.query, config.detect, topic=topic, partitions=partitions, commands=commands, end_us=end_us
        ):
            yield finding


def _drift(told: object) -> str:
    """Which guard's scores are farthest from what they were, at which stage, and how far; empty where none moved."""
    if not isinstance(told, dict) or not told:
        return ""
    where, worst = max(told.items(), key=lambda each: float(each[1]))
    return f"{where} {worst:.2f}"


async def print_status(config: Config, *, as_json: bool) -> int:
    """The newest health record of every process; exit status 1 when one is silent, not ready, or there is none."""
    records = await read_status(config.kafka)
    if as_json:
        print(orjson.dumps(records).decode())
    else:
        columns = ("lag", "watermark", "late", "drops", "guard drift", "version", "config", "last seen")
        table = Table("role", "state", *columns, box=None)
        for record in records:
            state = "silent" if record["silent"] else str(record.get("why") or "ready")
            watermark = str(record.get("watermark") or "–").partition("T")[2].partition("+")[0] or "–"
            lag, late, drops, release, digest = (
                str(record.get(key, "")) for key in ("lag", "late", "drops", "version", "config_digest")
            )
            told = (lag, watermark, late, drops, _drift(record.get("guard_drift")), release, digest)
            table.add_row(str(record["role"]), state, *told, f"{record['age_s']} s ago")
        Console().print(table if records else "No process has written its health yet.")
    return 0 if records and all(record.get("ready") and not record["silent"] for record in records) else 1
