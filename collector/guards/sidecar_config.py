"""`[collector.guards.sidecar]`: where the sidecar listens, and within which bounds. Both ends read it."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from collector.guards.protocol import GuardRefused

_TOKEN_CHARS_MIN = 32


class SidecarConfig(BaseModel):
    """Guards with `where = "sidecar"` run in the process that `inferwatch guards serve` starts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    socket: Path = Field(
        Path(".inferwatch/guards.sock"),
        description="Unix socket of the sidecar, made with mode 0600: its own user and root may connect.",
    )
    host: Literal["", "127.0.0.1", "::1"] = Field(
        "", description="Listen on this loopback address instead of the socket; needs token_file."
    )
    port: int = Field(8377, ge=0, le=65535, description="Port on that address.")
    token_file: Path | None = Field(
        None,
        description="Holds a secret of 32 characters or more, mode 0600. Both sides prove to each other that they know "
        "it; it is never sent.",
    )
    connect_timeout_ms: float = Field(
        2_000,
        gt=0,
        le=60_000,
        description="Time to connect and to prove the token, at both ends; a server waits so long at its start.",
    )
    workers: int = Field(1, ge=1, le=64, description="Processes of the sidecar that judge, one text at a time each.")
    batch_max: int = Field(32, ge=1, le=1_024, description="Texts that a worker is given at once.")
    queue_max: int = Field(
        256, ge=1, le=65_536, description="Texts that wait for a worker; beyond it the verdict is error Overloaded."
    )
    queue_bytes_max: int = Field(
        134_217_728, ge=1_048_576, description="Bytes of all waiting texts; beyond it error Overloaded."
    )
    frame_bytes_max: int = Field(
        33_554_432, ge=65_536, le=1_073_741_824, description="Largest question, context included; beyond: TextTooLong."
    )
    connections_max: int = Field(64, ge=1, le=4_096, description="Clients that have proved the token, at a time.")

    @model_validator(mode="after")
    def _loopback_needs_a_token(self) -> Self:
        if self.host and self.token_file is None:
            raise ValueError("host needs token_file: whoever is on this machine can connect to a port")
        return self

    @property
    def place(self) -> str:
        """Where it listens, for messages."""
        return f"{self.host}:{self.port}" if self.host else str(self.socket)

    def token(self) -> bytes:
        """The secret; empty without a file. Raises GuardRefused: not there, readable by others, or too short."""
        path = self.token_file
        if path is None:
            return b""
        try:
            shared = path.stat().st_mode & 0o077
            token = path.read_bytes().strip()
        except OSError as problem:
            raise GuardRefused(f"{path}: the sidecar's token can't be read ({problem.strerror})") from None
        if shared:
            raise GuardRefused(f"{path}: other users can read the sidecar's token; run chmod 600 {path}")
        if len(token) < _TOKEN_CHARS_MIN:
            raise GuardRefused(f"{path}: the sidecar's token is shorter than {_TOKEN_CHARS_MIN} characters")
        return token
