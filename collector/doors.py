"""The doors of one server process: who comes in by an API key, a token or a trusted proxy, under which tenant's key.

Each door reads a file, and a thread looks every `reload_s` whether one has changed: keys are added, revoked and rotated
without a restart. A file that has become bad keeps what was read before, and is told once, in the log and as a
`change` event; so is every change that takes effect.
"""

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

import structlog

from collector.identity import KeyProblem, KeyRing, NotKnown, Principal, Pseudonyms, load_tenant_key
from collector.identity_config import IdentityConfig, LimitsConfig
from collector.limits import Lease, Limits
from collector.overlap import Overlap
from collector.tokens import Tokens
from collector.trusted import TrustedProxy

log = structlog.get_logger(__name__)

T = TypeVar("T")


class Tell(Protocol):
    """Makes a `change` event."""

    def __call__(self, *, subject: str, before: str, after: str, tenant: str) -> object:
        """May fail; then it is logged."""


class Watched(Generic[T]):
    """What was read from a file, and read again when the file has changed. One thread looks, any may use `value`."""

    def __init__(self, subject: str, path: Path, load: Callable[[], T], *, tenant: str = "") -> None:
        """`load` raises KeyProblem; then there is no door."""
        self.subject, self.tenant = subject, tenant
        self._path, self._load = path, load
        self._seen = self._refused = _signature(path)
        self.value = load()
        self.named = _named(path, self.value)

    def look(self) -> tuple[str, str] | None:
        """Read the file where it has changed: (before, after) where that is told, each a name of a state.

        A file that can't be used keeps the value; `after` is then `refused`, once. It is tried again at each look: what
        was missing may be another file, and a revocation must not be lost to a passing failure.
        """
        seen = _signature(self._path)
        if seen == self._seen:
            return None
        before = self.named
        try:
            value, named = self._load(), ""
            named = _named(self._path, value)
        except Exception as problem:  # noqa: BLE001 - whatever is in the file, the other files are still looked at
            if seen == self._refused:
                return None
            self._refused = seen
            _tell("a changed file can't be used, what was read before stays in force", problem)
            return before, "refused"
        if _signature(self._path) != seen:
            return None  # it is being written: the next look reads it
        self._seen, self.value, self.named = seen, value, named
        return (before, named) if named != before else None


def _tell(what: str, error: Exception) -> None:
    """Log a failure in its own words where they are ours, which hold no secret; else by its class."""
    log.error(what, problem=str(error) if isinstance(error, KeyProblem) else type(error).__name__)


def _signature(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _named(path: Path, value: object) -> str:
    """A name for what was read: a key epoch; eight digits of the file's digest; any eight where it is a secret."""
    if isinstance(value, Pseudonyms):
        return value.epoch
    return (
        secrets.token_hex(4) if isinstance(value, TrustedProxy) else hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    )


class Identity:
    """All doors, and the limits behind them. `principal` and `admit` for one event loop, the rest for any thread."""

    def __init__(
        self,
        *,
        keys: Watched[KeyRing] | KeyRing | None = None,
        tokens: Watched[Tokens] | None = None,
        proxy: Watched[TrustedProxy] | None = None,
        pseudonyms: Mapping[str, Watched[Pseudonyms] | Pseudonyms],
        limits: LimitsConfig | None = None,
        epoch_idle_s: float = 0,
        epoch_overlap_s: float = 0,
        clock_s: Callable[[], float] = time.time,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys, self._tokens, self._proxy = keys, tokens, proxy
        self._pseudonyms = pseudonyms  # shared: a new tenant's API key brings its key
        self._limits = Limits(limits or LimitsConfig())
        self._clock_s, self.monotonic_s = clock_s, monotonic_s
        self._epoch_idle_s, self._epoch_overlap_s = epoch_idle_s, epoch_overlap_s
        self._overlaps: dict[str, Overlap] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def tenants(self) -> frozenset[str]:
        """The tenants that have a key for pseudonyms."""
        return frozenset(self._pseudonyms)

    def names(self, tenant: str, user: str = "") -> Pseudonyms:
        """The pseudonyms of a tenant for a request of `user`. Take them once a request: a key may change between."""
        found = self._pseudonyms[tenant]
        now = found.value if isinstance(found, Watched) else found
        overlap = self._overlaps.get(tenant) if self._overlaps else None
        if overlap is None:
            return now
        moment_s = self.monotonic_s()
        if overlap.over(moment_s):
            self._overlaps.pop(tenant, None)
        return overlap.names(user, now, moment_s)

    @property
    def headers(self) -> frozenset[bytes]:
        """Headers that a request may have once, because a door reads them."""
        return frozenset() if self._proxy is None else self._proxy.value.names

    def principal(self, headers: Mapping[bytes, bytes], secret: bytes, scope: Mapping[str, Any]) -> Principal:
        """Who a request is from. `headers`: those of interest; `secret`: the one API key or token in it, or empty.

        Raises `NotKnown`.
        """
        if self._proxy is not None and self._proxy.value.speaks(headers):
            named = self._proxy.value.owner(headers, scope)
            if secret:
                raise NotKnown("two_identities")
            return named
        if not secret:
            raise NotKnown("no_key")
        now_s = self._clock_s()
        ring = self._keys.value if isinstance(self._keys, Watched) else self._keys
        found = ring.owner(secret, now_s) if ring is not None else None
        if found is not None:
            return found
        if self._tokens is not None and secret.count(b".") == _DOTS and b"x-api-key" not in headers:
            return self._tokens.value.owner(secret, now_s)
        raise NotKnown("wrong_key")

    def admit(self, principal: Principal) -> Lease:
        """Count one request. Raises `LimitReached`."""
        return self._limits.admit(principal.meter, principal.limit, self.monotonic_s())

    def look(self, tell: Tell) -> None:
        """Read again what has changed on disk; `tell` of each change."""
        for each in [self._keys, self._tokens, self._proxy, *list(self._pseudonyms.values())]:
            was = each.value if isinstance(each, Watched) else None
            changed = each.look() if isinstance(each, Watched) else None
            if isinstance(each, Watched) and changed is not None:
                before, after = changed
                if isinstance(was, Pseudonyms) and each.value is not was:
                    spans = {"idle_s": self._epoch_idle_s, "overlap_s": self._epoch_overlap_s}
                    self._overlaps[each.tenant] = Overlap(was, self.monotonic_s(), **spans)
                log.warning("identity changed", subject=each.subject, tenant=each.tenant, before=before, after=after)
                try:
                    tell(subject=each.subject, before=before, after=after, tenant=each.tenant)
                except Exception as error:  # noqa: BLE001 - it is in force, and a full journal must not end the watch
                    _tell("a change could not be told", error)

    def watch(self, tell: Tell, every_s: float) -> None:
        """Start looking, in a thread, until `stop`."""

        def run() -> None:
            while not self._stop.wait(every_s):
                try:
                    self.look(tell)
                except Exception as error:  # noqa: BLE001 - a revocation tomorrow must still be seen
                    _tell("the watch over key files failed, trying on", error)

        self._thread = threading.Thread(target=run, name="inferwatch-identity", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop looking. Once."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)


_DOTS: Final = 2
"""In a token: header, claims, signature."""


def open_identity(config: IdentityConfig, gate_tenant: str) -> Identity:
    """The doors that are configured, each file read. Raises KeyProblem, one sentence."""
    keys_file, tokens, proxy = config.api_keys_file, config.tokens, config.proxy
    if keys_file is None and tokens is None and proxy is None:
        raise KeyProblem("there are no API keys: name their file as api_keys_file in [collector.identity]")
    pseudonyms: dict[str, Watched[Pseudonyms]] = {}

    def make(tenant: str) -> Pseudonyms:
        key = load_tenant_key(config.key_dir, tenant)
        made = Pseudonyms(key, prompt_hash=config.prompt_hash, minhash_chars_max=config.minhash_chars_max)
        for other, known in pseudonyms.items():
            if other != tenant and known.value.epoch == made.epoch:
                path = config.key_dir / f"{tenant}.key"
                raise KeyProblem(f"{path}: this is the key of tenant {other}: make one of its own")
        return made

    def need(tenants: Iterable[str]) -> None:
        for tenant in sorted({*tenants} - pseudonyms.keys()):
            path = config.key_dir / f"{tenant}.key"
            pseudonyms[tenant] = Watched("key_epoch", path, partial(make, tenant), tenant=tenant)

    def ring(path: Path) -> KeyRing:
        loaded = KeyRing.load(path)
        need(loaded.tenants)
        return loaded

    need([gate_tenant, *(tokens.tenants if tokens else ()), *(proxy.tenants if proxy else ())])
    return Identity(
        keys=Watched("api_keys", keys_file, partial(ring, keys_file)) if keys_file else None,
        tokens=Watched("token_keys", tokens.jwks_file, partial(Tokens.load, tokens)) if tokens else None,
        proxy=Watched("proxy_secret", proxy.secret_file, partial(TrustedProxy.load, proxy)) if proxy else None,
        pseudonyms=pseudonyms,
        limits=config.limits,
        epoch_idle_s=config.epoch_idle_s,
        epoch_overlap_s=config.epoch_overlap_s,
    )
