"""The settings of the store, of the sinks and of delivery. Loads pydantic only: the engine host reads it too.

Secrets are never values here: `…_file` names the file that holds one.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True)


class FaceConfig(_Settings):
    """`[store.face]`: the ClickHouse HTTP protocol for reading, as Grafana's data source speaks it."""

    host: str = Field("127.0.0.1", description="Address to listen on; beyond this machine only with a password.")
    port: int = Field(8123, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    user: str = Field("default", min_length=1, max_length=64, description="The user name that clients give.")
    password_file: Path | None = Field(None, description="Holds the password that clients give; without it, none.")
    query_timeout_s: float = Field(60.0, gt=0, le=3600, description="A query is stopped after this long.")
    memory_max_mb: int = Field(1024, ge=64, le=1_048_576, description="Most memory that one query may take, in MiB.")
    result_max_mb: int = Field(128, ge=1, le=4096, description="A larger answer is refused, in MiB.")
    parallel: int = Field(3, ge=1, le=32, description="Queries that run at once.")
    waiting_max: int = Field(32, ge=0, le=1024, description="Queries that may wait; more are refused with 503.")
    body_max_kb: int = Field(1024, ge=16, le=65536, description="A longer query is refused, in KiB, once unpacked.")


class StoreConfig(_Settings):
    """`[store]`: a ClickHouse server, or chDB in a folder that one process owns."""

    url: str = Field(
        ".inferwatch/store",
        min_length=1,
        description="A folder or `chdb:///PATH` for chDB; `http://USER@HOST:8123/DATABASE` or https for a server.",
    )
    password_file: Path | None = Field(None, description="Holds the server user's password.")
    events_days: int = Field(90, ge=1, le=18250, description="Days that events are kept, by the broker's time.")
    rollup_days: int = Field(400, ge=1, le=18250, description="Days that the minute counters are kept.")
    findings_days: int = Field(400, ge=1, le=18250, description="Days that findings are kept after their last change.")
    status_days: int = Field(2, ge=1, le=365, description="Days that a silent process stays in the status table.")
    memory_max_mb: int = Field(2048, ge=256, le=1_048_576, description="Most memory that chDB may take, in MiB.")
    threads_max: int = Field(2, ge=1, le=256, description="Most threads that one query may use.")
    readers: int = Field(3, ge=1, le=32, description="Queries that run at once; more wait their turn.")
    query_timeout_s: float = Field(30.0, gt=0, le=3600, description="A query is stopped after this long.")
    result_rows_max: int = Field(1_000_000, ge=1, le=100_000_000, description="A larger result is refused.")
    fsync: bool = Field(False, description="Acknowledge inserts only when on the disk, for power loss.")
    face: FaceConfig = Field(FaceConfig(), description="The read-only HTTP face of chDB.")

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        scheme, separator, rest = value.partition("://")
        if separator and scheme not in ("chdb", "http", "https"):
            raise ValueError(f"a store is chdb:///PATH, http:// or https://, not {scheme}://")
        if separator and scheme != "chdb" and ":" in rest.partition("/")[0].rpartition("@")[0]:
            raise ValueError("take the password out of the URL and put it into password_file")
        return value


class DeliveryConfig(_Settings):
    """`[sinks.delivery]`: retries, the same for every sink."""

    first_wait_s: float = Field(0.5, gt=0, le=60, description="The first retry waits a random time up to this.")
    wait_max_s: float = Field(60.0, gt=0, le=3600, description="The random wait doubles up to this.")
    attempts_max: int = Field(0, ge=0, le=1_000_000, description="Attempts before the dead letter; 0 is no limit.")
    age_max_s: float = Field(86_400.0, gt=0, le=864_000, description="Time from the first attempt to the dead letter.")
    retry_after_max_s: float = Field(600.0, gt=0, le=86_400, description="A longer Retry-After is cut to this.")
    send_timeout_s: float = Field(150.0, gt=0, le=3600, description="An attempt that hangs is given up after this.")
    remembered_max: int = Field(100_000, ge=1, le=10_000_000, description="Findings whose last revision is remembered.")
    quiet_sinks: tuple[str, ...] = Field(
        (), description="Sinks that also get what is suppressed, acknowledged or found in a maintenance window."
    )
    once_per_incident: tuple[str, ...] = Field(
        (), description="Sinks that ring a person: they get what leads an incident, and its close."
    )


class FileConfig(_Settings):
    """`[sinks.file]`: JSON lines, each an OCSF Detection Finding."""

    path: Path = Field(description="The file that lines are appended to; its folder is made when missing.")
    fsync: bool = Field(False, description="Acknowledge only what is on the disk.")
    rotate_mb: int = Field(100, ge=1, le=1_048_576, description="Rotated before it grows beyond this, in MiB.")
    keep: int = Field(5, ge=1, le=1000, description="Rotated files kept, PATH.1 the newest.")
    mode: int = Field(0o640, ge=0o400, le=0o666, description="Permissions of a new file, less the umask.")
    tail_mb: int = Field(8, ge=1, le=1024, description="How much of the file's end is searched for lines sent before.")


class WebhookConfig(_Settings):
    """`[sinks.webhook]`: signed as the Standard Webhooks specification says."""

    url: str = Field(description="https://…, or http:// to this machine.")
    secret_files: tuple[Path, ...] = Field(
        min_length=1, max_length=5, description="Each holds a `whsec_…` secret; every message is signed with all."
    )
    timeout_s: float = Field(20.0, gt=0, le=120, description="An attempt is given up after this long.")
    allow_private: bool = Field(False, description="Allow addresses of private networks (never by redirect).")
    ca_file: Path | None = Field(None, description="Certificates to trust instead of the system's.")
    body_max_bytes: int = Field(20_000, ge=2_000, le=20_480, description="The body is cut to this size.")


class SyslogConfig(_Settings):
    """`[sinks.syslog]`: CEF in RFC 5424 over TCP, octet-counted."""

    host: str = Field(min_length=1, max_length=255, description="The receiver's name or address.")
    port: int = Field(6514, ge=1, le=65535, description="6514 by custom with TLS, 601 without.")
    tls: bool = Field(True, description="Speak TLS (RFC 5425).")
    ca_file: Path | None = Field(None, description="Certificates to trust instead of the system's.")
    client_cert_file: Path | None = Field(None, description="Our certificate, for mutual TLS.")
    client_key_file: Path | None = Field(None, description="Its key, where it is not in the same file.")
    timeout_s: float = Field(10.0, gt=0, le=120, description="Connecting or writing is given up after this long.")
    message_max_bytes: int = Field(8_192, ge=2_048, le=1_048_576, description="A longer message is cut.")
    hostname: str = Field("", max_length=255, description="HOSTNAME in the header; empty: this machine's name.")
    facility: int = Field(13, ge=0, le=23, description="13 is `log audit`.")
    enterprise_number: int = Field(
        0, ge=0, le=2**32 - 1, description="Your IANA enterprise number, for structured data `finding@N`; 0: none."
    )

    @model_validator(mode="after")
    def _key_with_certificate(self) -> "SyslogConfig":
        if self.client_key_file is not None and self.client_cert_file is None:
            raise ValueError("client_key_file needs client_cert_file")
        return self


class SinksConfig(_Settings):
    """`[sinks]`: one optional table a sink. The sink NAME lives in `sinks/NAME.py`, which has a `build`."""

    delivery: DeliveryConfig = Field(DeliveryConfig(), description="Retries, the same for every sink.")
    file: FileConfig | None = Field(None, description="JSON lines in OCSF.")
    webhook: WebhookConfig | None = Field(None, description="A signed webhook.")
    syslog: SyslogConfig | None = Field(None, description="CEF over syslog.")

    @field_validator("delivery")
    @classmethod
    def _names_are_sinks(cls, delivery: DeliveryConfig) -> DeliveryConfig:
        known = [name for name in cls.model_fields if name != "delivery"]
        for name in (*delivery.quiet_sinks, *delivery.once_per_incident):
            if name not in known:
                raise ValueError(f"{name} is no sink; the sinks are {', '.join(known)}")
        return delivery

    @property
    def names(self) -> tuple[str, ...]:
        """The sinks that are configured, in the order of the fields."""
        return tuple(n for n in type(self).model_fields if n != "delivery" and getattr(self, n) is not None)
