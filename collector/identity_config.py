"""`[collector.identity]`: the doors of the gate, what a key may use, and whose keys make pseudonyms."""

import ipaddress
import re
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_HEADER: Final = re.compile(r"[a-z0-9-]{1,64}\Z")
_NOT_OURS: Final = frozenset({"authorization", "x-api-key", "host", "content-type", "content-length", "x-user-id"})

Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


class LimitsConfig(BaseModel):
    """`[collector.identity.limits]`: what a key may use that has no limits of its own; 0 is no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: int = Field(0, ge=0, le=2**53, description="Requests a key and minute; 0: no limit")
    tokens_per_minute: int = Field(0, ge=0, le=2**53, description="Prompt and answer tokens a key and minute; 0: none")
    concurrent: int = Field(0, ge=0, le=2**53, description="Requests of a key at a time; 0: no limit")
    body_bytes_max: int = Field(0, ge=0, le=2**53, description="Largest body of a key; 0: that of [collector.gate]")
    keys_max: int = Field(100_000, ge=1, le=10_000_000, description="Keys counted at a time; more are answered 503")


class TokensConfig(BaseModel):
    """`[collector.identity.tokens]`: JSON Web Tokens of an identity provider (OIDC), as `Authorization: Bearer`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    jwks_file: Path = Field(description="The provider's public keys (JWKS), fetched by you; watched for changes")
    issuer: str = Field(min_length=1, max_length=1_024, description="What `iss` must be, exactly")
    audience: str = Field(min_length=1, max_length=1_024, description="What `aud` must hold: this service's name")
    algorithms: tuple[Algorithm, ...] = Field(("RS256",), min_length=1, description="Signature algorithms taken")
    leeway_s: int = Field(30, ge=0, le=300, description="How far the provider's clock may differ")
    lifetime_max_s: int = Field(86_400, ge=60, description="A token that is good for longer from now is refused")
    user_claim: str = Field("sub", min_length=1, description="The claim that names the user; needed in every token")
    tenant_claim: str = Field("", description="The claim that names the tenant; empty: the first of `tenants`")
    session_claim: str = Field("", description="The claim that names the session; empty: the client names it")
    tenants: tuple[str, ...] = Field(("default",), min_length=1, description="Tenants that tokens may be of")
    remembered_max: int = Field(10_000, ge=0, le=1_000_000, description="Good tokens remembered until they end")

    @model_validator(mode="after")
    def _check_tenants(self) -> Self:
        if self.tenant_claim == "" and len(self.tenants) > 1:
            raise ValueError("tenants has several: name the claim that tells them apart as tenant_claim")
        return self


class ProxyConfig(BaseModel):
    """`[collector.identity.proxy]`: a proxy before us that authenticates clients and names them by headers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    peers: tuple[str, ...] = Field(
        ("127.0.0.0/8", "::1/128"), min_length=1, description="Networks it connects from; `unix` for a Unix socket"
    )
    secret_file: Path = Field(description="Holds the secret that it sends, 32 bytes or more; mode 0600, watched")
    secret_header: str = Field("x-inferwatch-proxy", description="The header that the secret is in")
    user_header: str = Field("x-inferwatch-user", description="The header that names the user; always needed")
    tenant_header: str = Field("x-inferwatch-tenant", description="Names the tenant; left out: the first of `tenants`")
    session_header: str = Field("x-inferwatch-session", description="Names the session")
    address_header: str = Field("x-inferwatch-address", description="The client's address as the proxy saw it")
    tenants: tuple[str, ...] = Field(("default",), min_length=1, description="Tenants it may speak for")

    @field_validator("peers")
    @classmethod
    def _check_peers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for peer in value:
            if peer != "unix":
                ipaddress.ip_network(peer)
        return value

    @model_validator(mode="after")
    def _check_headers(self) -> Self:
        names = self.headers
        for name in names:
            if not _HEADER.match(name) or name in _NOT_OURS:
                raise ValueError(
                    f"{name!r} can't be one of its headers: lower case letters, digits and -, and not taken"
                )
        if len(set(names)) != len(names):
            raise ValueError("each of its headers needs a name of its own")
        return self

    @property
    def headers(self) -> tuple[str, ...]:
        """The names of all its headers."""
        return self.secret_header, self.user_header, self.tenant_header, self.session_header, self.address_header


class IdentityConfig(BaseModel):
    """`[collector.identity]`: who may ask, and under whose keys names and texts become digests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key_dir: Path = Field(Path(".inferwatch/keys"), description="Folder of the tenants' keys, TENANT.key, mode 0600")
    api_keys_file: Path | None = Field(None, description="TOML: one table for each API key, its SHA-256 and owner")
    prompt_hash: Literal["hmac", "sha256"] = Field(
        "hmac", description="hmac: under the tenant's key. sha256: plain, so that short prompts can be guessed"
    )
    minhash_chars_max: int = Field(8192, ge=64, le=1_000_000, description="Text beyond this is left out of the MinHash")
    epoch_days_min: int = Field(
        90, ge=0, le=36_500, description="A key epoch lasts at least this long: the longest window that looks back"
    )
    epoch_idle_s: float = Field(
        1_800, ge=0, le=86_400, description="After a rotation a user keeps the old pseudonym until a pause this long"
    )
    epoch_overlap_s: float = Field(86_400, ge=0, le=2_592_000, description="And at the longest for this long")
    reload_s: float = Field(2.0, ge=0.1, le=3_600, description="How often it is looked whether a file of keys changed")
    limits: LimitsConfig = Field(LimitsConfig(), description="What a key may use that has no limits of its own")
    tokens: TokensConfig | None = Field(None, description="JSON Web Tokens of an identity provider")
    proxy: ProxyConfig | None = Field(None, description="A proxy before us that authenticates clients")
