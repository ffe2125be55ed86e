"""Who asked, and the keyed digests that stand for people and texts in events.

Three parts: `Pseudonyms` turns names and texts into digests under one tenant's key; key files hold those keys; the
`KeyRing` knows the API keys. API keys are 256 random bits, so a plain SHA-256 of them can't be guessed; names and short
prompts can, so they get HMAC-SHA-256. Keys, names and texts appear in no repr, exception or log.
"""

import hashlib
import hmac
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Mapping
from datetime import datetime
from math import inf
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, Self

import msgspec
from msgspec import Struct

from collector.limits import Limit
from collector.minhash import MinHash

KEY_BYTES: Final = 32
API_KEYS_MAX: Final = 10_000
RECENT_MAX: Final = 4_096
PROXY: Final = "proxy"
"""What events have in place of a key's name where the trusted proxy names the caller."""
_KEY_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_TENANT: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\Z")


class KeyProblem(ValueError):
    """A key file can't be used: the message names the file and what to do, never what is in it."""


# -- key files


def create_key_file(path: Path) -> None:
    """Write a new tenant key, 64 hex digits, mode 0600. Raises KeyProblem where the file exists."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise KeyProblem(f"{path} exists: a new key would break the link to all earlier events") from None
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(KEY_BYTES) + "\n")
        file.flush()
        os.fsync(handle)


def load_key(path: Path) -> bytes:
    """The 32 bytes of a tenant's key. Raises KeyProblem: missing, readable by others, or not 64 hex digits."""
    raw = read_private(path, "`inferwatch keys create` makes one")
    if not re.fullmatch(rb"[0-9a-fA-F]{64,1024}", raw) or len(raw) % 2:
        raise KeyProblem(f"{path}: a key file holds at least 64 hex digits and nothing else; make a new one")
    return bytes.fromhex(raw.decode("ascii"))


def read_private(path: Path, how: str) -> bytes:
    """What a key file holds, without blanks at its ends. Raises KeyProblem; `how` says how one is made."""
    try:
        # Links are followed, since mounted secrets are links; a pipe must not make us wait.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise KeyProblem(f"{path}: no such key file; {how}") from None
    except OSError as error:
        raise KeyProblem(f"{path}: this key file can't be opened ({error.strerror})") from None
    try:
        _refuse_shared(path, os.fstat(handle))
        return os.read(handle, 4096).strip()
    finally:
        os.close(handle)


def _refuse_shared(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise KeyProblem(f"{path}: a key must be a regular file")
    if status.st_mode & 0o077:
        raise KeyProblem(f"{path}: other users can read this key file; run chmod 600 {path}")


def load_tenant_key(key_dir: Path, tenant: str) -> bytes:
    """The key of a tenant, `KEY_DIR/TENANT.key`. Raises KeyProblem."""
    check_tenant(tenant)
    return load_key(key_dir / f"{tenant}.key")


def check_tenant(tenant: str) -> None:
    """Raises KeyProblem where the name can't be a tenant's: it names files."""
    if not _TENANT.match(tenant):
        raise KeyProblem("a tenant's name is 1 to 63 of a-z, 0-9, - and _, and starts with a letter or digit")


def epoch_of(tenant_key: bytes) -> str:
    """The name of a key in events: a fingerprint, from which nothing of the key can be told."""
    return "e_" + _derive(tenant_key, "epoch")[:4].hex()


# -- pseudonyms and digests


class _Keyed:
    """HMAC-SHA-256 under one key (RFC 2104), with its two padded keys hashed once: for a short text the library's
    takes twice as long."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes) -> None:
        """`key`: at most the 64 bytes of a block."""
        block = key.ljust(64, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def hexdigest(self, raw: bytes) -> str:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(raw)
        outer.update(inner.digest())
        return outer.hexdigest()


class Pseudonyms:
    """One tenant's digests under one key. Pure and thread-safe; the same input always gives the same digest."""

    __slots__ = ("_digest", "_minhash", "_names", "_recent", "epoch", "prompt_hash")

    def __init__(
        self,
        tenant_key: bytes,
        epoch: str = "",
        *,
        prompt_hash: Literal["hmac", "sha256"] = "hmac",
        minhash_chars_max: int = 8192,
    ) -> None:
        """`epoch` names the key in events; by default a fingerprint of it. Raises KeyProblem where the key is short."""
        if len(tenant_key) < KEY_BYTES:
            raise KeyProblem(f"a tenant's key has at least {KEY_BYTES} bytes")
        self.epoch = epoch or epoch_of(tenant_key)
        self.prompt_hash = prompt_hash
        # A key of its own for each purpose, so that no digest of one kind says anything about another kind.
        self._names = {kind: _Keyed(_derive(tenant_key, kind)) for kind in "uska"}
        self._recent: dict[str, str] = {}
        """Kind and name to pseudonym, of users, keys and addresses; never of sessions, which may hold text."""
        self._digest = _Keyed(_derive(tenant_key, "text"))
        self._minhash = MinHash(_derive(tenant_key, "minhash"), chars_max=minhash_chars_max)

    def user(self, name: str) -> str:
        """`u_` and 32 hex digits; empty for no name."""
        return self._name("u", name)

    def session(self, name: str) -> str:
        """`s_` and 32 hex digits; empty for no name. Clients choose session names, so they may hold text."""
        return self._name("s", name)

    def api_key(self, key_id: str) -> str:
        """`k_` and 32 hex digits; empty for no key."""
        return self._name("k", key_id)

    def address(self, address: str) -> str:
        """`a_` and 32 hex digits; empty for no address."""
        return self._name("a", address)

    def _name(self, kind: str, name: str) -> str:
        if not name:
            return ""
        known = self._recent.get(kind + name)
        if known is not None:
            return known
        made = f"{kind}_{self._names[kind].hexdigest(name.encode('utf-8', 'surrogatepass'))[:32]}"
        if kind != "s":
            if len(self._recent) >= RECENT_MAX:
                self._recent.clear()
            self._recent[kind + name] = made
        return made

    def digest(self, text: str | bytes) -> str:
        """`hmac:HEX` of a text, or `sha256:HEX` where the setting says so; empty for an empty text.

        A str is taken as it is, in UTF-8: whoever wants NFC normalises before.
        """
        if not text:
            return ""
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        if self.prompt_hash == "sha256":
            return plain_digest(raw)
        return "hmac:" + self._digest.hexdigest(raw)

    def minhash(self, text: str) -> str:
        """The keyed MinHash of a text, base64 of 64 little-endian uint32; empty for an empty text."""
        return self._minhash.encode(text)


def plain_digest(raw: bytes) -> str:
    """`sha256:HEX`: under no key, so that whoever has it can try texts."""
    return "sha256:" + hashlib.sha256(raw).hexdigest()


def _derive(key: bytes, purpose: str) -> bytes:
    return hmac.digest(key, b"inferwatch/" + purpose.encode(), "sha256")


# -- API keys


class Principal(Struct, frozen=True):
    """Who a request is from, as an API key, a token or a trusted proxy says."""

    tenant: str
    key_id: str
    """The API key's id; `jwt:KID` for a token, `proxy` for trusted headers."""
    user: str
    """The name behind the user's pseudonym."""
    on_behalf: bool = False
    """It may speak for users that a header or the body names."""
    session: str = ""
    """The session that a token or the proxy names; empty: the client names it."""
    address: str = ""
    """The client's address as the proxy saw it."""
    limit: Limit | None = None
    meter: str = ""
    """What the use of is counted together: the API key, or the tenant's user."""

    def __repr__(self) -> str:
        return f"Principal(tenant={self.tenant!r}, key_id={self.key_id!r}, on_behalf={self.on_behalf})"


class NotKnown(Exception):
    """Credentials that let nobody in. `reason` is a fixed word for the event."""

    def __init__(self, reason: str, principal: Principal | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.principal = principal
        """Whose they were, where that is certain: a key that has expired or was revoked."""


class KeyTable(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One API key in the file. Moments are TOML's, with an offset or Z."""

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    tenant: Annotated[str, msgspec.Meta(pattern="^[a-z0-9][a-z0-9_-]{0,62}$")] = "default"
    user: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    on_behalf: bool = False
    not_before: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    revoked: bool = False
    """Refused like a key that is not there, but its use is told by name."""
    limits: Limit | None = None


class _Known(NamedTuple):
    blinded: bytes
    principal: Principal
    not_before_s: float
    expires_s: float
    revoked: bool


class KeyRing:
    """The API keys that are known, by their SHA-256. Immutable and thread-safe.

    A look-up compares digests under a key of this process, so that its time says nothing about the hashes stored.
    """

    __slots__ = ("_blind", "_known")

    def __init__(self, tables: Mapping[str, object]) -> None:
        """`tables`: key id to its table, as `new_api_key` makes them. Raises KeyProblem."""
        if len(tables) > API_KEYS_MAX:
            raise KeyProblem(f"{len(tables)} API keys are more than the {API_KEYS_MAX} that one file may hold")
        self._blind = secrets.token_bytes(KEY_BYTES)
        self._known: dict[bytes, _Known] = {}
        for key_id, raw in tables.items():
            if not _KEY_ID.match(key_id):
                raise KeyProblem("an API key's table is named by 1 to 64 letters, digits, - and _")
            try:
                table = msgspec.convert(raw, KeyTable)
            except msgspec.ValidationError as error:
                raise KeyProblem(f"API key [{key_id}]: {_without_values(error)}") from None
            blinded = self._blinded(bytes.fromhex(table.sha256))
            if blinded in self._known:
                raise KeyProblem(f"API keys [{self._known[blinded].principal.key_id}] and [{key_id}] are the same key")
            self._known[blinded] = _known(key_id, table, blinded)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The keys in a TOML file, one table for each key id. Raises KeyProblem naming the file and what to do."""
        tables = read_key_tables(path)
        try:
            return cls(tables)
        except KeyProblem as error:
            raise KeyProblem(f"{path}: {error}") from None

    def owner(self, secret: str | bytes, now_s: float) -> Principal | None:
        """Whose key this is at a moment (seconds since the epoch); None for a key that is not known.

        Raises `NotKnown` with its owner for one that was revoked, has expired or is not valid yet.
        """
        raw = secret.encode("utf-8", "surrogatepass") if isinstance(secret, str) else secret
        blinded = self._blinded(hashlib.sha256(raw).digest())
        known = self._known.get(blinded)
        if known is None or not hmac.compare_digest(known.blinded, blinded):
            return None
        if known.revoked:
            raise NotKnown("revoked_key", known.principal)
        if not known.not_before_s <= now_s < known.expires_s:
            raise NotKnown("expired_key" if now_s >= known.expires_s else "early_key", known.principal)
        return known.principal

    def _blinded(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, digest_size=32, key=self._blind).digest()

    @property
    def tenants(self) -> frozenset[str]:
        """The tenants that have a key."""
        return frozenset(known.principal.tenant for known in self._known.values())

    def __len__(self) -> int:
        return len(self._known)


def _known(key_id: str, table: KeyTable, blinded: bytes) -> _Known:
    if key_id == PROXY:
        raise KeyProblem(f"API key [{key_id}]: events call the trusted proxy so; give the key another name")
    begins_s = table.not_before.timestamp() if table.not_before else -inf
    ends_s = table.expires.timestamp() if table.expires else inf
    if begins_s >= ends_s:
        raise KeyProblem(f"API key [{key_id}]: it expires before it begins")
    principal = Principal(table.tenant, key_id, table.user, table.on_behalf, limit=table.limits, meter=key_id)
    return _Known(blinded, principal, begins_s, ends_s, table.revoked)


def read_key_tables(path: Path) -> dict[str, object]:
    """The tables in the file of API keys, unchecked. Raises KeyProblem naming the file and what to do."""
    try:
        shared = path.stat().st_mode & 0o022
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KeyProblem(f"{path}: no such file of API keys; `inferwatch keys api` makes one") from None
    except OSError as error:
        raise KeyProblem(f"{path}: the file of API keys can't be read ({error.strerror})") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError):
        raise KeyProblem(f"{path}: the file of API keys is not valid TOML") from None
    if shared:
        raise KeyProblem(f"{path}: other users can write to this file of API keys; run chmod go-w {path}")
    return tables


def new_api_key(
    *, user: str, tenant: str = "default", on_behalf: bool = False
) -> tuple[str, str, dict[str, str | bool]]:
    """A new API key: (secret, key id, table). The secret is shown once; the table goes into the file of API keys."""
    secret = "iw-" + secrets.token_urlsafe(32)
    table: dict[str, str | bool] = {
        "sha256": hashlib.sha256(secret.encode()).hexdigest(),
        "tenant": tenant,
        "user": user,
        "on_behalf": on_behalf,
    }
    return secret, f"key_{secrets.token_hex(6)}", table


def _without_values(error: msgspec.ValidationError) -> str:
    """What is wrong and where; a bad value may be the key itself, so a wrong pattern is only named."""
    told = str(error)
    where = told.rpartition(" - at ")[2].strip("`$.") if " - at " in told else ""
    if "regex" in told:
        return f"{where} is not of the form it must have (sha256: 64 hex digits; tenant: a-z, 0-9, -, _)"
    return told
