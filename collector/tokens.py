"""Who a JSON Web Token (RFC 7519) says is asking, checked against the public keys in a file (JWKS, RFC 7517).

What is taken: a compact JWS with one of the configured public-key algorithms, by a key of the file that is named by
`kid` and made for that algorithm, for our issuer and audience, in its time. Never `none`, never an HMAC: symmetric keys
have no place in the file. Key locations in the token's own header are ignored, critical extensions refused.

PyJWT checks form and signature; time is judged here, so that the clock is an argument. A token that was good is
remembered by its SHA-256 until it ends: verifying costs tens of µs. With another key file all is forgotten.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, Final, Self

import jwt
from jwt import PyJWK

from collector.identity import KeyProblem, NotKnown, Principal
from collector.identity_config import TokensConfig

TOKEN_BYTES_MAX: Final = 8_192
FILE_BYTES_MAX: Final = 1_048_576
KEYS_MAX: Final = 100
NAME_CHARS_MAX: Final = 256

_RSA: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_FITS: Final[Mapping[tuple[str, str], tuple[str, ...]]] = {
    ("RSA", ""): _RSA,
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA",),
}
"""Which algorithms a key of a type and curve is good for (RFC 7518, RFC 8037)."""


class Tokens:
    """The tokens of one provider under the keys of one file. Not thread-safe: for one event loop."""

    def __init__(self, config: TokensConfig, keys: Mapping[tuple[str, str], PyJWK]) -> None:
        """`keys`: by `kid` and algorithm, as `load` reads them."""
        self._config, self._keys = config, dict(keys)
        kids = {kid for kid, _ in keys}
        self._only_kid = next(iter(kids)) if len(kids) == 1 else None
        self._good: OrderedDict[bytes, tuple[Principal, float]] = OrderedDict()
        self._jwt = jwt.PyJWT()

    @classmethod
    def load(cls, config: TokensConfig) -> Self:
        """With the keys in the file. Raises KeyProblem naming the file and what is wrong, never a value in it."""
        return cls(config, _load_keys(config.jwks_file, config.algorithms))

    def __len__(self) -> int:
        """Tokens remembered."""
        return len(self._good)

    def owner(self, token: bytes, now_s: float) -> Principal:
        """Whose token it is, at a moment in seconds since the epoch. Raises `NotKnown`."""
        if len(token) > TOKEN_BYTES_MAX:
            raise NotKnown("token_too_large")
        digest = hashlib.sha256(token).digest()
        known = self._good.get(digest)
        if known is None:
            principal, ends_s = self._verified(token, now_s)
            if self._config.remembered_max:
                while len(self._good) >= self._config.remembered_max:
                    self._good.popitem(last=False)
                self._good[digest] = principal, ends_s
            return principal
        principal, ends_s = known
        if now_s >= ends_s:
            del self._good[digest]
            raise NotKnown("expired_token")
        self._good.move_to_end(digest)
        return principal

    def _verified(self, token: bytes, now_s: float) -> tuple[Principal, float]:
        config = self._config
        try:
            kid, key = self._key(jwt.get_unverified_header(token))
            claims = self._jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                audience=config.audience,
                issuer=config.issuer,
                options={
                    "require": ["exp", "iss", "aud", config.user_claim],
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
        except jwt.InvalidTokenError as error:
            raise NotKnown(_REASONS.get(type(error), "wrong_token")) from None
        except (ValueError, RecursionError):
            raise NotKnown("wrong_token") from None
        ends_s = _end_s(claims, now_s, config)
        return self._principal(kid, claims), ends_s

    def _key(self, header: Mapping[str, Any]) -> tuple[str, PyJWK]:
        """The key that the header names. One without `kid` is taken where the file has one key alone."""
        kid, algorithm = header.get("kid", self._only_kid), header.get("alg")
        key = self._keys.get((kid, algorithm)) if isinstance(kid, str) and isinstance(algorithm, str) else None
        if key is None or "crit" in header or "b64" in header:
            raise NotKnown("wrong_token")
        return str(kid), key

    def _principal(self, kid: str, claims: Mapping[str, Any]) -> Principal:
        config = self._config
        user = _name(claims, config.user_claim)
        tenant = _name(claims, config.tenant_claim) if config.tenant_claim else config.tenants[0]
        if tenant not in config.tenants:
            raise NotKnown("wrong_tenant")
        named = config.session_claim and config.session_claim in claims
        session = _name(claims, config.session_claim) if named else ""
        return Principal(tenant, f"jwt:{kid}", user, session=session, meter=f"{tenant}\n{user}")


_REASONS: Final[Mapping[type[Exception], str]] = {
    jwt.InvalidAudienceError: "wrong_audience",
    jwt.InvalidIssuerError: "wrong_issuer",
    jwt.MissingRequiredClaimError: "claim_missing",
}


def _name(claims: Mapping[str, Any], claim: str) -> str:
    value = claims.get(claim)
    if not isinstance(value, str) or not 0 < len(value) <= NAME_CHARS_MAX:
        raise NotKnown("claim_missing")
    return value


def _end_s(claims: Mapping[str, Any], now_s: float, config: TokensConfig) -> float:
    """When the token ends, leeway included. Raises `NotKnown` outside of its time."""
    expires_s, begins_s, issued_s = (_moment_s(claims, name) for name in ("exp", "nbf", "iat"))
    if expires_s is None:
        raise NotKnown("claim_missing")
    if now_s >= expires_s + config.leeway_s:
        raise NotKnown("expired_token")
    if expires_s > now_s + config.lifetime_max_s + config.leeway_s:
        raise NotKnown("token_too_long")
    if max(begins_s or 0, issued_s or 0) > now_s + config.leeway_s:
        raise NotKnown("early_token")
    return expires_s + config.leeway_s


def _moment_s(claims: Mapping[str, Any], name: str) -> float | None:
    """A NumericDate. JSON as Python reads it knows NaN, Infinity and any number of digits: no token ends then."""
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e12 or not isfinite(value):
        raise NotKnown("wrong_token")
    return float(value)


def _load_keys(path: Path, algorithms: tuple[str, ...]) -> dict[tuple[str, str], PyJWK]:
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
        found = json.loads(raw)["keys"]
    except FileNotFoundError:
        raise KeyProblem(f"{path}: no such file; fetch the provider's JWKS (its `jwks_uri`) into it") from None
    except OSError as error:
        raise KeyProblem(f"{path}: the JWKS file can't be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise KeyProblem(f'{path}: not a JWKS, which is {{"keys": [...]}}') from None
    if len(raw) > FILE_BYTES_MAX or not isinstance(found, list) or not 0 < len(found) <= KEYS_MAX:
        raise KeyProblem(f"{path}: a JWKS has 1 to {KEYS_MAX} keys in at most {FILE_BYTES_MAX} bytes")
    keys: dict[tuple[str, str], PyJWK] = {}
    for place, entry in enumerate(found):
        try:
            _add_key(entry, keys, algorithms)
        except KeyProblem as problem:
            raise KeyProblem(f"{path}: key {place}: {problem}") from None
        except (jwt.PyJWTError, ValueError, TypeError, KeyError):
            raise KeyProblem(f"{path}: key {place}: no public key that can be read") from None
    if not keys:
        raise KeyProblem(f"{path}: no key is for {' or '.join(algorithms)}: look at tokens.algorithms")
    return keys


def _add_key(entry: Any, keys: dict[tuple[str, str], PyJWK], algorithms: tuple[str, ...]) -> None:
    """One key under each algorithm it may be used with; none where it is for something else."""
    if not isinstance(entry, dict):
        raise KeyProblem("not an object")
    if entry.get("kty") == "oct" or "d" in entry or "k" in entry:
        raise KeyProblem("it is a secret or private key: a JWKS for us has public keys only")
    if entry.get("use", "sig") != "sig":
        return
    kid = entry.get("kid", "")
    if not isinstance(kid, str) or len(kid) > NAME_CHARS_MAX - len("jwt:"):
        raise KeyProblem("its kid is no short text")
    fits = _FITS.get((str(entry.get("kty")), str(entry.get("crv", ""))), ())
    for algorithm in algorithms:
        if algorithm in fits and entry.get("alg", algorithm) == algorithm:
            if (kid, algorithm) in keys:
                raise KeyProblem("another key has its kid")
            key = PyJWK(entry, algorithm)
            if algorithm in _RSA and key.key.key_size < 2048:
                raise KeyProblem("an RSA key has at least 2048 bits")
            keys[kid, algorithm] = key
