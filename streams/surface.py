"""Which road from Kafka to a stage is taken, and what of Faust the quick one uses that is not public.

`streams/transport.py` rests on names that Faust may change. They are listed here, with the versions they were tested
in; another version, or a missing name, leads to `streams/plain.py` and a warning, never to a wrong answer.
"""

import importlib
import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, Protocol

import structlog

from collector.kafka import KafkaConfig
from streams.config import StreamsConfig
from streams.plain import PlainApp

log = structlog.get_logger(__name__)

PUBLIC_PATH_VARIABLE: Final = "INFERWATCH_PUBLIC_PATH"
"""Set in the environment: take the public path whatever is installed."""
TESTED: Final = {"faust-streaming": "0.15", "mode-streaming": "0.7", "aiokafka": "0.14"}
PRIVATE_SURFACE: Final = (
    ("aiokafka.consumer.fetcher", "FetchResult"),
    ("aiokafka.consumer.fetcher", "READ_COMMITTED"),
    ("aiokafka.consumer.fetcher:FetchResult", "getall"),
    ("aiokafka.consumer.fetcher:FetchResult", "has_more"),
    ("aiokafka.consumer.fetcher:FetchResult", "check_assignment"),
    ("aiokafka.consumer.fetcher:FetchResult", "_update_position"),
    ("aiokafka.consumer.fetcher:PartitionRecords", "_unpack_records"),
    ("faust.transport.drivers", "TRANSPORTS"),
    ("faust.transport.drivers.aiokafka:AIOKafkaConsumerThread", "_create_worker_consumer"),
    ("faust.transport.drivers.aiokafka:AIOKafkaConsumerThread", "_commit"),
    ("faust.transport.drivers.aiokafka:AIOKafkaConsumerThread", "_ensure_consumer"),
    ("faust.transport.drivers.aiokafka:Consumer", "_new_consumer_thread"),
    ("faust.transport.drivers.aiokafka:Producer", "_new_producer"),
    ("faust.transport.consumer:Consumer", "_read_offset"),
    ("faust.transport.consumer:Consumer", "_filter_committable_offsets"),
    ("faust.transport.consumer:Consumer", "_should_commit"),
    ("faust.tables.manager:TableManager", "recovery"),
    ("faust.tables.recovery:Recovery", "active_offsets"),
    ("faust.tables.recovery:Recovery", "active_remaining"),
    ("faust.tables.recovery:Recovery", "active_remaining_total"),
)


class UnknownVersion(RuntimeError):
    """An installed library is not of a version that the batch transport was tested with."""


class SourceConsumer(Protocol):
    """What a stage asks of whoever reads its source topic."""

    def batch_partitions(self) -> set[int]:
        """The partitions of the source that this worker owns now."""

    async def rewind(self, partition: int, offset: int) -> None:
        """Read the partition from `offset` on. Does nothing where it was just lost to another worker."""

    async def bounds(self, partitions: Iterable[int]) -> dict[int, tuple[int, int]]:
        """Partition → (earliest offset there, offset of the next record to come). Raises KafkaError."""

    def end_offset(self, partition: int) -> int | None:
        """Offset of the next record to come, as the last fetch said; None before any."""

    def recovery_misses(self) -> int:
        """How many changelog records the recovery under way still misses."""

    async def mend_recovery(self) -> int:
        """Reads changelogs again from where a recovery without progress stands; how many."""


def make_app(role: str, kafka: KafkaConfig, streams: StreamsConfig, topic: str, **options: Any) -> Any:
    """The app that feeds a stage: Faust's where it is as tested, else the plain one, which needs public names only.

    Both give the same findings: where a partition goes on, and what counts as read, is the stage's to say.
    """
    try:
        check_versions()
        from streams.transport import BatchApp  # noqa: PLC0415  # an unknown Faust may fail to import
    except (UnknownVersion, ImportError, AttributeError, TypeError) as error:
        log.warning("going by the public path, without Faust", role=role, reason=str(error))
        return PlainApp(role, kafka, streams, topic)
    return BatchApp(role, kafka, streams, topic, **options)


def check_versions() -> None:
    """Raise UnknownVersion, saying what to install, unless the libraries are as tested and still have what is used."""
    if os.environ.get(PUBLIC_PATH_VARIABLE):
        raise UnknownVersion(f"{PUBLIC_PATH_VARIABLE} is set")
    for package, tested in TESTED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            raise UnknownVersion(f"{package} is not installed: install '{package}=={tested}.*'") from None
        if not found.startswith(tested + "."):
            raise UnknownVersion(
                f"{package} {found} is installed, but the batch transport was tested with {tested}.x only: "
                f"install '{package}=={tested}.*'"
            )
    for where, name in PRIVATE_SURFACE:
        module, _, owner = where.partition(":")
        try:
            target: Any = importlib.import_module(module)
        except ImportError:
            target = None
        target = getattr(target, owner, None) if owner else target
        if not hasattr(target, name) and name not in getattr(target, "__annotations__", {}):
            raise UnknownVersion(f"{where} has no {name}: install the pinned versions of requirements/soc.txt")
