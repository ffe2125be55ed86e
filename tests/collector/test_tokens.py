"""Tokens: only what the provider signed for us, in its time, by a key of the file and in the way that key is for."""

import base64
import contextlib
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collector.identity import KeyProblem, NotKnown, Principal
from collector.identity_config import TokensConfig
from collector.tokens import Tokens
from tests.collector.doors import (
    KEYS,
    ask,
    claims,
    jwk,
    make_site,
    port_of,
    send_raw,
    serving,
    token,
    tokens,
    write_jwks,
)

CANARY = "canary-8e12"


def made(folder: Path, *keys: dict[str, Any], **more: Any) -> Tokens:
    """Tokens by a file with these keys."""
    return Tokens.load(TokensConfig(**tokens(folder, *keys, **more)))


def segment(value: Any) -> str:
    """One part of a token."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def unsigned(header: dict[str, Any], **more: Any) -> str:
    """A token without a signature."""
    return f"{segment(header)}.{segment(claims(**more))}."


def confused(kid: str, secret: bytes) -> str:
    """A token that is signed by HMAC with what everybody knows: the public key."""
    text = f"{segment({'alg': 'HS256', 'typ': 'JWT', 'kid': kid})}.{segment(claims())}"
    signature = base64.urlsafe_b64encode(hmac.digest(secret, text.encode(), hashlib.sha256)).rstrip(b"=").decode()
    return f"{text}.{signature}"


def public_pem(name: str) -> bytes:
    """The public key as people have it in files."""
    return bytes(
        KEYS[name]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def bent(good: str, place: int) -> str:
    """The same token with one character of a part changed."""
    parts = good.split(".")
    first = parts[place][5]
    parts[place] = parts[place][:5] + ("A" if first != "A" else "B") + parts[place][6:]
    return ".".join(parts)


ATTACKS: dict[str, Any] = {
    "none": lambda: unsigned({"alg": "none", "kid": "rsa"}),
    "None": lambda: unsigned({"alg": "None", "kid": "rsa"}),
    "no algorithm": lambda: unsigned({"kid": "rsa"}),
    "list of algorithms": lambda: unsigned({"alg": ["RS256"], "kid": "rsa"}),
    "no signature": lambda: token().rpartition(".")[0] + ".",
    "HMAC with the public key": lambda: confused("rsa", public_pem("rsa")),
    "HMAC with the JWK": lambda: confused("rsa", json.dumps(jwk("rsa")).encode()),
    "HMAC with nothing": lambda: confused("rsa", b""),
    "another's key under our kid": lambda: token("other", {"kid": "rsa"}),
    "our key under another kind's kid": lambda: token("rsa", {"kid": "ec"}),
    "unknown kid": lambda: token("other"),
    "kid as a path": lambda: token("rsa", {"kid": "../../dev/null"}),
    "key in the header": lambda: token("other", {"kid": "other", "jwk": jwk("other")}),
    "key location in the header": lambda: token(
        "other", {"jku": "http://127.0.0.1:1/keys", "x5u": "http://127.0.0.1:1"}
    ),
    "critical extension": lambda: token("rsa", {"crit": ["exp"], "exp": 1}),
    "unencoded payload": lambda: token("rsa", {"b64": False, "crit": ["b64"]}),
    "another algorithm of the same key": lambda: jwt.encode(claims(), KEYS["rsa"], "PS256", headers={"kid": "rsa"}),
    "claims changed": lambda: bent(token(), 1),
    "header changed": lambda: bent(token(), 0),
    "signature changed": lambda: bent(token(), 2),
    "no JSON": lambda: "a.b.c",
    "three dots": lambda: token() + ".x",
    "no token": lambda: "..",
    "claims are a list": lambda: jwt.PyJWS().encode(b"[1]", KEYS["rsa"], "RS256", headers={"kid": "rsa"}),
    "nested claims": lambda: jwt.PyJWS().encode(b"[" * 3000, KEYS["rsa"], "RS256", headers={"kid": "rsa"}),
    "huge": lambda: token(x="y" * 9000),
    "wrong issuer": lambda: token(iss="https://issuer.example.evil"),
    "issuer in another case": lambda: token(iss="HTTPS://issuer.example"),
    "no issuer": lambda: token(iss=None),
    "wrong audience": lambda: token(aud="inferwatch-admin"),
    "no audience": lambda: token(aud=None),
    "expired": lambda: token(exp=int(time.time()) - 31),
    "no end": lambda: token(exp=None),
    "ends never": lambda: jwt.PyJWS().encode(
        json.dumps(claims(exp=float("inf"))).encode(), KEYS["rsa"], "RS256", headers={"kid": "rsa"}
    ),
    "end is no number": lambda: jwt.PyJWS().encode(
        json.dumps(claims(exp=float("nan"))).encode(), KEYS["rsa"], "RS256", headers={"kid": "rsa"}
    ),
    "end is true": lambda: token(exp=True),
    "end has hundreds of digits": lambda: token(exp=10**400),
    "ends in a year": lambda: token(exp=int(time.time()) + 31_536_000),
    "not yet": lambda: token(nbf=int(time.time()) + 60),
    "issued in the future": lambda: token(iat=int(time.time()) + 60),
    "no user": lambda: token(sub=None),
    "empty user": lambda: token(sub=""),
    "user is a number": lambda: token(sub=7),
    "long user": lambda: token(sub="u" * 257),
}


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_a_token_that_is_not_right_lets_nobody_in(tmp_path: Path, name: str) -> None:
    """Each with a fixed word as its reason, and nothing is remembered."""
    doors = made(tmp_path)
    with pytest.raises(NotKnown) as caught:
        doors.owner(ATTACKS[name]().encode(), time.time())
    assert caught.value.reason in {
        "wrong_token", "token_too_large", "wrong_issuer", "wrong_audience", "claim_missing", "expired_token",
        "token_too_long", "early_token",
    }  # fmt: skip
    assert len(doors) == 0


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_NAMES = st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jwk", "exp", "iss", "aud", "sub", "nbf", "iat"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(_NAMES, _JSON),
    odd=st.dictionaries(_NAMES, _JSON, min_size=1),
    raw=st.binary(max_size=60),
    signed=st.booleans(),
)
def test_no_token_however_odd_breaks_the_door(
    tmp_path: Path, header: dict[str, Any], odd: dict[str, Any], raw: bytes, signed: bool
) -> None:
    """Any header, any claims though rightly signed, any bytes: its owner or `NotKnown`, never another error."""
    doors = made(tmp_path, jwk("ed"), remembered_max=0)
    text = jwt.PyJWS().encode(json.dumps({**claims(), **odd}).encode(), KEYS["ed"], "EdDSA", headers={"kid": "ed"})
    parts = text.encode().split(b".")
    if not signed:
        parts[0] = segment({"alg": "EdDSA", "kid": "ed", **header}).encode()
    cut = b".".join([parts[0], raw, parts[2]])
    for each in (b".".join(parts), raw, base64.urlsafe_b64encode(raw) + b".." + raw, cut):
        with contextlib.suppress(NotKnown):
            assert doors.owner(each, time.time()).user


@pytest.mark.parametrize("name", ["rsa", "ec", "ed"])
def test_a_good_token_of_each_kind_is_its_user(tmp_path: Path, name: str) -> None:
    """The key is named in the event; the user counts against one meter whichever key signed."""
    owner = made(tmp_path).owner(token(name, aud=["other", "inferwatch"]).encode(), time.time())
    assert owner == Principal("default", f"jwt:{name}", "carol", meter="default\ncarol")


def test_a_token_without_kid_is_taken_where_there_is_one_key(tmp_path: Path) -> None:
    """With two keys nobody guesses."""
    bare = jwt.encode(claims(), KEYS["rsa"], "RS256").encode()
    assert made(tmp_path, jwk("rsa")).owner(bare, time.time()).key_id == "jwt:rsa"
    with pytest.raises(NotKnown):
        made(tmp_path, jwk("rsa"), jwk("other")).owner(bare, time.time())


def test_claims_name_user_tenant_and_session_as_configured(tmp_path: Path) -> None:
    """A tenant outside of the list is refused, so a provider can't speak for another's."""
    doors = made(
        tmp_path,
        user_claim="email", tenant_claim="org", session_claim="sid", tenants=("default", "acme"),
    )  # fmt: skip
    owner = doors.owner(token(email="c@example.com", org="acme", sid="s1").encode(), time.time())
    assert owner == Principal("acme", "jwt:rsa", "c@example.com", session="s1", meter="acme\nc@example.com")
    for org in ("evil", "", "../acme", ["acme"], None):
        with pytest.raises(NotKnown):
            doors.owner(token(email="c@example.com", org=org).encode(), time.time())


def test_a_good_token_is_verified_once_and_ends_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remembered until it ends, leeway included; the memory is bounded, the oldest go first."""
    doors = made(tmp_path, remembered_max=2)
    verified: list[str] = []
    real = Tokens._verified
    monkeypatch.setattr(Tokens, "_verified", lambda self, *args: (verified.append("x"), real(self, *args))[1])
    now = int(time.time())
    raws = [token(sub=f"u{n}", exp=now + 300).encode() for n in range(3)]
    for raw in (raws[0], raws[0], raws[1], raws[0], raws[2]):
        doors.owner(raw, now)
    assert (len(verified), len(doors)) == (3, 2)
    doors.owner(raws[0], now + 329)
    assert len(verified) == 3
    doors.owner(raws[1], now)
    assert len(verified) == 4
    with pytest.raises(NotKnown, match="expired_token"):
        doors.owner(raws[1], now + 330)
    with pytest.raises(NotKnown, match="expired_token"):
        doors.owner(raws[1], now + 330)


def test_the_clock_may_differ_by_the_leeway(tmp_path: Path) -> None:
    """In both directions, and not a second more."""
    now = int(time.time())
    for more, at, good in [
        ({"exp": now}, now + 29, True),
        ({"exp": now}, now + 30, False),
        ({"nbf": now + 30}, now, True),
        ({"nbf": now + 31}, now, False),
    ]:
        doors = made(tmp_path)
        if good:
            assert doors.owner(token(**more).encode(), at).user == "carol"
        else:
            with pytest.raises(NotKnown):
                doors.owner(token(**more).encode(), at)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ([{"kty": "oct", "k": "AAAA", "kid": "x"}], "secret or private key"),
        ([json.loads(jwt.get_algorithm_by_name("RS256").to_jwk(KEYS["rsa"]))], "secret or private key"),
        ([jwk("rsa"), jwk("other", kid="rsa")], "another key has its kid"),
        ([jwk("rsa", n="AQAB")], "at least 2048 bits|no public key"),
        ([jwk("ec", x="AA")], "no public key"),
        ([jwk("rsa", use="enc")], "no key is for RS256"),
        ([jwk("rsa", alg="RS512")], "no key is for RS256"),
        ([jwk("rsa", kid=7)], "its kid is no short text"),
        ([7], "not an object"),
        ([], "has 1 to 100 keys"),
        ([jwk("rsa", kid=str(n)) for n in range(101)], "has 1 to 100 keys"),
    ],
)
def test_a_bad_file_of_keys_is_named_with_what_is_wrong(tmp_path: Path, keys: list[Any], told: str) -> None:
    """One sentence; a private key in it is an accident that is told, not used."""
    with pytest.raises(KeyProblem, match=told) as caught:
        Tokens.load(TokensConfig(**tokens(tmp_path) | {"jwks_file": write_jwks(tmp_path / "bad.json", *keys)}))
    assert str(tmp_path / "bad.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"keys": 7}', "\xff", "[" * 100_000, f"-----{CANARY}-----"])
def test_a_file_that_is_no_jwks_is_named(tmp_path: Path, text: str) -> None:
    """Nothing of what is in it is shown."""
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(KeyProblem) as caught:
        Tokens.load(TokensConfig(**tokens(tmp_path) | {"jwks_file": path}))
    assert CANARY not in str(caught.value)


def test_weak_keys_and_wrong_curves_are_not_used(tmp_path: Path) -> None:
    """1024 bits, and a curve for another algorithm than the configured one."""
    short = rsa.generate_private_key(65537, 1024)  # noqa: S505  # it is to be refused
    weak = json.loads(jwt.get_algorithm_by_name("RS256").to_jwk(short.public_key()))
    with pytest.raises(KeyProblem, match="2048"):
        made(tmp_path, {**weak, "kid": "weak"})
    large = ec.generate_private_key(ec.SECP384R1())
    key = json.loads(jwt.get_algorithm_by_name("ES384").to_jwk(large.public_key()))
    with pytest.raises(KeyProblem, match="no key is for"):
        made(tmp_path, {**key, "kid": "large"})


@pytest.mark.parametrize("algorithm", ["none", "HS256", "HS512", "ES256K"])
def test_an_algorithm_with_a_shared_secret_can_not_be_configured(tmp_path: Path, algorithm: str) -> None:
    """So there is no public key that could be taken for a secret."""
    with pytest.raises(ValueError, match="algorithms"):
        TokensConfig(**tokens(tmp_path, algorithms=(algorithm,)))


async def test_tokens_and_api_keys_come_through_the_same_gate(tmp_path: Path) -> None:
    """A token as bearer is its user with pseudonyms of its tenant; sent as x-api-key it is no key."""
    site = make_site(tmp_path, tokens=tokens(tmp_path))
    good = token()
    async with serving(site) as server:
        port = port_of(server)
        assert await send_raw(port, f"Authorization: Bearer {good}".encode()) == 200
        assert await send_raw(port, f"X-Api-Key: {site.api_key}".encode()) == 200
        for line in (f"X-Api-Key: {good}", f"Authorization: Bearer {bent(good, 2)}", f"Authorization: bearer {good}."):
            assert await send_raw(port, line.encode()) == 401
    callers = [at_hand.caller for at_hand in site.app.exchanges]
    names = site.identity.names("default")
    assert [caller.user_id for caller in callers] == [names.user("carol"), names.user("alice")]
    assert [caller.key_id for caller in callers] == ["jwt:rsa", site.key_id]
    assert site.refused == [("wrong_key", 401), ("wrong_token", 401), ("wrong_key", 401)]


async def test_a_key_taken_out_of_the_file_is_good_no_more(tmp_path: Path) -> None:
    """Remembered tokens too, without a restart; a broken file changes nothing."""
    site = make_site(tmp_path, tokens=tokens(tmp_path))
    header = ("authorization", f"Bearer {token()}")
    assert (await ask(site, header)).status_code == 200
    (tmp_path / "jwks.json").write_text("{")
    assert [(each["subject"], each["after"]) for each in site.look()] == [("token_keys", "refused")]
    assert (await ask(site, header)).status_code == 200
    write_jwks(tmp_path / "jwks.json", jwk("ec"))
    assert [each["subject"] for each in site.look()] == ["token_keys"]
    assert (await ask(site, header)).status_code == 401
    assert (await ask(site, ("authorization", f"Bearer {token('ec')}"))).status_code == 200


async def test_no_token_is_in_any_event_answer_or_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither a good one nor a bad one, nor a name in it."""
    site = make_site(tmp_path, tokens=tokens(tmp_path))
    sent = [token(sub=CANARY), token(sub=CANARY, exp=1), token("other", sub=CANARY)]
    answers = [await ask(site, ("authorization", f"Bearer {each}")) for each in sent]
    assert [answer.status_code for answer in answers] == [200, 401, 401]
    written = "".join(map(repr, (*site.publisher.rejections, *site.app.exchanges))) + "".join(capfd.readouterr())
    for secret in (CANARY, *(part for each in sent for part in each.split(".")[1:])):
        assert secret not in written
