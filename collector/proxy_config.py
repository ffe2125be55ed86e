"""What `[collector.proxy]` says: which server the proxy stands before, where it listens, and within which bounds."""

from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from collector.proxy_routes import MANAGEMENT

Kind = Literal["openai", "ollama"]


class ProxyConfig(BaseModel):
    """`[collector.proxy]`: the gate before a server that can't be wrapped from within."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    upstream: str = Field(
        "", max_length=512, description="The server behind: http://HOST:PORT or https://HOST:PORT, no path"
    )
    kind: Kind = Field(
        "openai", description="openai: llama.cpp, SGLang, TGI, vLLM …; ollama: its native API and its OpenAI one"
    )
    host: str = Field("127.0.0.1", description="Address the proxy listens on")
    port: int = Field(8080, ge=0, le=65_535, description="Port the proxy listens on; 0 takes a free one")
    tls_cert_file: Path | None = Field(None, description="Certificate chain, PEM: with it the proxy speaks TLS only")
    tls_key_file: Path | None = Field(None, description="Its private key, PEM")
    upstream_key_file: Path | None = Field(None, description="File with the upstream's API key, sent as a bearer token")
    upstream_ca_file: Path | None = Field(None, description="CA certificates for an https upstream; else the system's")
    connect_timeout_s: float = Field(5, gt=0, le=60, description="Time for the upstream to accept a connection")
    silence_timeout_s: float = Field(
        300, gt=0, le=3_600, description="Longest silence of the upstream before or within an answer; then 504"
    )
    answer_timeout_s: float = Field(1_800, gt=0, le=86_400, description="Longest time for one whole answer; then 504")
    answer_bytes_max: int = Field(
        33_554_432, ge=65_536, description="Largest answer, streams too; beyond it 502, or the stream ends"
    )
    connections_max: int = Field(
        512, ge=1, le=65_536, description="Connections to the upstream, and clients at once; then 503"
    )
    ask_usage: bool = Field(
        True, description="Ask streams of the OpenAI API for their token counts; clients that did not ask don't see it"
    )
    open_management: tuple[str, ...] = Field(
        (), max_length=8, description='Management routes of Ollama to open, such as "POST /api/pull"; each use is told'
    )
    allow_load: bool = Field(False, description="Ollama: let clients load and unload models by an empty prompt")
    allow_remote_models: bool = Field(
        False, description="Ollama: let clients use models that it serves from elsewhere: prompts then leave this host"
    )

    @field_validator("upstream")
    @classmethod
    def _check_upstream(cls, value: str) -> str:
        if not value:
            return value
        try:
            parts = urlsplit(value)
            good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        except ValueError:
            good = False
        if not good or parts.username is not None or parts.path.strip("/") or parts.query or parts.fragment:
            raise ValueError("an upstream is http://HOST:PORT or https://HOST:PORT and nothing more")
        return f"{parts.scheme}://{parts.netloc}"

    @field_validator("open_management")
    @classmethod
    def _check_open(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for row in value:
            if row not in MANAGEMENT:
                raise ValueError(f"{row!r} can't be opened: only {', '.join(MANAGEMENT)} can")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file go together")
        if self.open_management and self.kind != "ollama":
            raise ValueError("open_management is for kind ollama")
        return self
