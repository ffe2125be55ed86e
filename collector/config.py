"""What `[collector]` says: who we are, whose keys we use, where the journal lies, how the lanes are fed."""

import os
import socket
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from collector.guards.config import GuardsConfig
from collector.identity_config import IdentityConfig
from collector.proxy_config import ProxyConfig
from collector.routes import GateConfig

MIB = 1024 * 1024


class JournalConfig(BaseModel):
    """`[collector.journal]`: the disk behind the promise that nothing begun is lost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dir: Path = Field(Path(".inferwatch/journal"), description="Folder of the journals, one sub-folder a process")
    segment_bytes: int = Field(8 * MIB, ge=4096, le=1024 * MIB, description="A segment is closed at this size")
    bytes_max: int = Field(1024 * MIB, ge=65_536, description="Bound of one process's journal")
    when_full: Literal["refuse", "drop-oldest"] = Field(
        "refuse", description="At the bound: refuse requests, or drop the oldest records, counted and told"
    )
    fsync_ms: int = Field(0, ge=0, le=60_000, description="fsync this often against loss of power; 0: never")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.bytes_max < 4 * self.segment_bytes:
            raise ValueError("bytes_max must be at least four times segment_bytes")
        return self


class PublisherConfig(BaseModel):
    """`[collector.publisher]`: how the journal reaches Kafka."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heartbeat_ms: int = Field(250, ge=20, le=5000, description="A lane silent this long gets a heartbeat")
    linger_ms: int = Field(
        200,
        ge=0,
        le=1000,
        description="Least time between two batches, at most heartbeat_ms: a record that comes alone goes at once",
    )
    batch_bytes: int = Field(192 * 1024, ge=4096, le=256 * 1024, description="Largest batch, before compression")
    clock_offset_max_ms: int = Field(5000, ge=1, description="Largest difference from the broker's clock at start")
    clock_offset_allowed: bool = Field(False, description="Start in spite of a larger difference")
    start_timeout_ms: int = Field(30_000, ge=100, description="For the broker to answer and the lanes to open")
    broker_silence_ms: int = Field(5000, ge=100, description="Unacknowledged for this long: the broker counts as away")
    status_ms: int = Field(10_000, ge=100, description="How often the health record is written to the status topic")


class EvidenceConfig(BaseModel):
    """`[collector.evidence]`: how the chain of events is signed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    signing_key_file: Path | None = Field(
        None, description="Key that signs checkpoints, made by `inferwatch keys signing`; none: chained, not signed"
    )
    checkpoint_ms: int = Field(10_000, ge=100, le=60_000, description="A checkpoint at least this often")
    checkpoint_records: int = Field(
        4096, ge=16, le=16_384, description="A checkpoint when a lane has so many records without one"
    )


class TrustConfig(BaseModel):
    """`[evidence]`: whose signatures are trusted where a log is verified."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    signing_keys: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = Field(
        (), description="Public keys of collectors, hexadecimal, as `inferwatch keys signing` prints them"
    )
    revoked: dict[str, AwareDatetime] = Field(
        {}, description="Key id, and from when on its signatures count for nothing"
    )


def _host() -> str:
    return os.environ.get("HOSTNAME") or socket.gethostname() or "collector"


class CollectorConfig(BaseModel):
    """`[collector]`: the collector in the inference server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    collector_id: str = Field(
        default_factory=_host, min_length=1, max_length=128, description="Name of this collector; the host's by default"
    )
    identity: IdentityConfig = Field(IdentityConfig(), description="Keys, API keys and pseudonyms")
    journal: JournalConfig = Field(JournalConfig(), description="The journal on disk")
    publisher: PublisherConfig = Field(PublisherConfig(), description="Feeding Kafka from the journal")
    evidence: EvidenceConfig = Field(EvidenceConfig(), description="Signing the chain of events")
    guards: GuardsConfig = Field(GuardsConfig(), description="Which guards judge, and how")
    gate: GateConfig = Field(GateConfig(), description="What passes the gate, and what becomes of blocked answers")
    proxy: ProxyConfig = Field(ProxyConfig(), description="The gate before a server that can't be wrapped from within")
