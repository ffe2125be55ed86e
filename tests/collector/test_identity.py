"""Pseudonyms, digests, MinHash, key files and API keys: stable, keyed, and silent about what they hold."""

import hashlib
import hmac
import os
import random
import stat
import tomllib
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.identity import (
    RECENT_MAX,
    KeyProblem,
    KeyRing,
    Principal,
    Pseudonyms,
    create_key_file,
    load_key,
    load_tenant_key,
    new_api_key,
)
from collector.minhash import MinHash, similarity

KEY = bytes(range(32))
OTHER = bytes(range(1, 33))
CANARY = "canary-7f3a91"


def test_digests_are_these_for_this_key() -> None:
    """The digests of a fixed key never change: events of last year must still meet those of today."""
    names = Pseudonyms(KEY)
    given = (names.epoch, names.user("alice"), names.session("alice"), names.api_key("alice"), names.address("::1"))
    assert given == (
        "e_79336975",
        "u_0647b6cd58d60abfe8c53f46a065ba25",
        "s_93c510957a285c7af108f61be35f7634",
        "k_babf2b7b57b80baa3e8999df64aca6ad",
        "a_3b3794c7f3bef327953f5febdffcb49e",
    )
    derived = hmac.digest(KEY, b"inferwatch/u", "sha256")
    assert given[1] == "u_" + hmac.digest(derived, b"alice", "sha256").hex()[:32]
    signature = hashlib.sha256(names.minhash("hello, world").encode()).hexdigest()[:16]
    assert signature == "7add25a9b3b9a501"


def test_kinds_tenants_and_keys_never_meet() -> None:
    """The same name gives another digest for each kind and each key, and nothing for no name."""
    one, other = Pseudonyms(KEY), Pseudonyms(OTHER)
    digests = [
        digest(CANARY)
        for names in (one, other)
        for digest in (names.user, names.session, names.api_key, names.address, names.digest)
    ]
    assert len({digest.partition("_")[2] or digest for digest in digests}) == len(digests)
    assert [d[:2] for d in digests[:4]] == ["u_", "s_", "k_", "a_"]
    assert {len(d) for d in digests[:4]} == {34}
    assert (one.user(""), one.digest(""), one.minhash("")) == ("", "", "")
    assert one.epoch != other.epoch


def test_a_plain_sha256_is_given_only_where_asked_for() -> None:
    """`sha256:` is the well-known digest; `hmac:` is not."""
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert Pseudonyms(KEY, prompt_hash="sha256").digest("abc") == f"sha256:{known}"
    assert Pseudonyms(KEY).digest("abc").startswith("hmac:")
    assert known not in Pseudonyms(KEY).digest("abc")


@given(st.text(min_size=1, max_size=300))
def test_a_digest_is_the_hmac_of_the_standard_library(text: str) -> None:
    """Under a key of its own, which is derived from the tenant's."""
    raw, key = text.encode("utf-8", "surrogatepass"), hmac.digest(KEY, b"inferwatch/text", "sha256")
    assert Pseudonyms(KEY).digest(text) == "hmac:" + hmac.digest(key, raw, "sha256").hex()


@given(st.text(st.characters(exclude_categories=[]), max_size=200))
def test_any_text_has_a_digest(text: str) -> None:
    """Lone surrogates and all; text and its UTF-8 bytes are the same."""
    names = Pseudonyms(KEY)
    assert names.digest(text) == names.digest(text.encode("utf-8", "surrogatepass"))
    assert (names.minhash(text) == "") == (text == "")


def test_recent_names_are_remembered_within_a_bound_and_sessions_never() -> None:
    """Whatever comes and comes again, a pseudonym is that of its key; what clients write is not kept."""
    names = Pseudonyms(KEY)
    once = [names.user(f"u{n}") for n in range(10_000)]
    assert [names.user(f"u{n}") for n in range(10_000)] == once
    assert len(names._recent) <= RECENT_MAX
    fresh = Pseudonyms(KEY)
    assert (fresh.session(CANARY), fresh._recent) == (names.session(CANARY), {})
    assert (fresh.user("x"), fresh.api_key("x"), fresh.user("x")) == (
        fresh.user("x"),
        names.api_key("x"),
        names.user("x"),
    )


# -- MinHash


def _shingles(text: str) -> set[str]:
    return {text[i : i + 5] for i in range(len(text) - 4)}


def test_minhash_estimates_jaccard_as_well_as_theory_says() -> None:
    """Over 300 random pairs of texts the error has the size that 64 independent places give, and no bias."""
    seed = random.randrange(10**6)  # noqa: S311  # no secret
    print("seed", seed)
    rng = random.Random(seed)  # noqa: S311  # no secret
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(3000)]
    signer = MinHash(KEY)
    errors, variances = [], []
    for _ in range(300):
        text = rng.choices(words, k=rng.choice([10, 60, 500]))
        share = rng.choice([0.05, 0.3, 0.7])
        near = " ".join(rng.choice(words) if rng.random() < share else word for word in text)
        a, b = _shingles(" ".join(text)), _shingles(near)
        truth = len(a & b) / len(a | b)
        errors.append(similarity(signer.encode(" ".join(text)), signer.encode(near)) - truth)
        variances.append(truth * (1 - truth) / 64)
    assert sum(e * e for e in errors) < 1.5 * sum(variances)
    assert abs(sum(errors) / len(errors)) < 0.015


def test_minhash_is_keyed_and_of_the_normal_form() -> None:
    """Another key gives an unrelated signature; composed and decomposed letters give the same one."""
    text = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich"
    decomposed = text.replace("ö", "o\u0308").replace("ä", "a\u0308").replace("ü", "u\u0308")
    assert decomposed != text
    assert MinHash(KEY).encode(decomposed) == MinHash(KEY).encode(text)
    assert similarity(MinHash(KEY).encode(text), MinHash(OTHER).encode(text)) < 0.1
    assert len(MinHash(KEY).encode(text)) == 344


@pytest.mark.parametrize("size", [1, 4, 5, 6, 403, 404, 405, 1027, 1028, 1029, 2053, 9000])
def test_every_way_to_compute_a_signature_gives_the_plain_definition(size: int) -> None:
    """Short and long texts are computed otherwise, long ones block by block."""
    text = "".join(random.Random(size).choices("abcdefghiä😀 ", k=size))  # noqa: S311  # no secret
    signer, wrap = MinHash(KEY, chars_max=8192), 2**64
    codes = [ord(character) for character in text[:8192].ljust(5, "\0")]
    powers = [int(power) for power in signer._powers]
    expected = [2**32] * 64
    for start in range(len(codes) - 4):
        mixed = sum(code * power for code, power in zip(codes[start : start + 5], powers, strict=True)) % wrap
        mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 % wrap
        low = (mixed ^ mixed >> 32) % 2**32
        expected = [min(least, low * int(m) % 2**32) for least, m in zip(expected, signer._multipliers, strict=True)]
    assert [int(place) for place in signer.signature(text)] == expected


def test_text_beyond_the_bound_is_left_out() -> None:
    """The work for one text is bounded."""
    signer = MinHash(KEY, chars_max=100)
    assert signer.encode("ab" * 50 + CANARY) == signer.encode("ab" * 50)


# -- key files


def test_a_key_file_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    """Mode 0600 whatever the umask; a second make is refused, the key stays."""
    path = tmp_path / "keys" / "default.key"
    before = os.umask(0)
    try:
        create_key_file(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    key = load_tenant_key(tmp_path / "keys", "default")
    assert len(key) == 32
    with pytest.raises(KeyProblem, match="exists: a new key would break"):
        create_key_file(path)
    assert load_key(path) == key


def _bad_keys(folder: Path) -> dict[str, Path]:
    cases = {name: folder / f"{name}.key" for name in ("missing", "short", "text", "shared", "folder", "pipe")}
    cases["short"].write_text("ab" * 31)
    cases["text"].write_text(CANARY * 20)
    cases["shared"].write_text("ab" * 32)
    cases["folder"].mkdir(mode=0o700)
    os.mkfifo(cases["pipe"], 0o600)
    for name in ("short", "text"):
        cases[name].chmod(0o600)
    cases["shared"].chmod(0o640)
    return cases


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("missing", "no such key file; `inferwatch keys create` makes one"),
        ("short", "at least 64 hex digits"),
        ("text", "at least 64 hex digits"),
        ("shared", "run chmod 600"),
        ("folder", "must be a regular file"),
        ("pipe", "must be a regular file"),
    ],
)
def test_a_bad_key_file_is_named_with_what_to_do(tmp_path: Path, name: str, told: str) -> None:
    """One sentence with the path and the remedy; nothing of what is in the file."""
    path = _bad_keys(tmp_path)[name]
    with pytest.raises(KeyProblem) as caught:
        load_key(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)
    assert CANARY not in "".join(traceback.format_exception(caught.value))


def test_a_link_to_a_key_file_is_followed(tmp_path: Path) -> None:
    """Mounted secrets are links; what counts is the mode of the file behind."""
    create_key_file(tmp_path / "real.key")
    (tmp_path / "default.key").symlink_to("real.key")
    assert load_tenant_key(tmp_path, "default") == load_key(tmp_path / "real.key")
    (tmp_path / "real.key").chmod(0o644)
    with pytest.raises(KeyProblem, match="run chmod 600"):
        load_tenant_key(tmp_path, "default")


@pytest.mark.parametrize("tenant", ["", "../etc", "A", "a/b", "a" * 64, "x\n"])
def test_a_tenant_is_no_path(tmp_path: Path, tenant: str) -> None:
    """Tenants name files, so their names are plain."""
    with pytest.raises(KeyProblem, match="a tenant's name"):
        load_tenant_key(tmp_path, tenant)


def test_keys_and_names_are_in_no_repr() -> None:
    """What a log or a traceback could show holds no key, no secret, no user's name."""
    secret, key_id, table = new_api_key(user=CANARY)
    ring = KeyRing({key_id: table})
    owner = ring.owner(secret, 0)
    shown = repr((Pseudonyms(KEY), ring, owner, MinHash(KEY)))
    assert CANARY not in shown
    assert secret not in shown
    assert KEY.hex() not in shown


# -- API keys


def _write(path: Path, *keys: tuple[str, dict[str, str | bool]]) -> Path:
    lines = []
    for key_id, table in keys:
        lines.append(f"[{key_id}]")
        lines += [f"{name} = {str(v).lower() if isinstance(v, bool) else repr(v)}" for name, v in table.items()]
    path.write_text("\n".join(lines))
    return path


def test_a_key_ring_knows_its_keys_and_no_others(tmp_path: Path) -> None:
    """Each secret finds its owner; a changed, cut, empty or odd one finds nobody; the file holds no secret."""
    made = [new_api_key(user="alice"), new_api_key(user="gateway", tenant="acme", on_behalf=True)]
    path = _write(tmp_path / "keys.toml", *((key_id, table) for _, key_id, table in made))
    ring = KeyRing.load(path)
    assert [ring.owner(secret, 0) for secret, _, _ in made] == [
        Principal("default", made[0][1], "alice", False, meter=made[0][1]),
        Principal("acme", made[1][1], "gateway", True, meter=made[1][1]),
    ]
    assert ring.tenants == {"default", "acme"}
    assert len(ring) == 2
    secret = made[0][0]
    for wrong in (secret[:-1], secret + "x", secret.upper(), "", "\ud800", b"\xff", made[0][2]["sha256"]):
        assert ring.owner(str(wrong) if not isinstance(wrong, bytes) else wrong, 0) is None
    assert all(secret not in path.read_text() for secret, _, _ in made)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"[k]\nsha256 = '{CANARY}'\nuser = 'a'\n", r"API key \[k\]: sha256 is not of the form"),
        ("[k]\nuser = 'a'\n", "missing required field `sha256`"),
        (f"[k]\nsha256 = '{'a' * 64}'\n", "missing required field `user`"),
        (f"[k]\nsha256 = '{'a' * 64}'\nuser = 'a'\nadmin = true\n", "unknown field `admin`"),
        (f"[k]\nsha256 = '{'a' * 64}'\nuser = 'a'\ntenant = '../x'\n", "tenant is not of the form"),
        (f"k = '{CANARY}'\n", r"API key \[k\]"),
        ("[k\n", "not valid TOML"),
        (f"[k]\nsha256='{'a' * 64}'\nuser='a'\n[l]\nsha256='{'a' * 64}'\nuser='b'\n", r"\[k\] and \[l\] are the same"),
        (f"['{CANARY} {CANARY}']\nuser='a'\n", "named by 1 to 64 letters"),
        (f"[proxy]\nsha256='{'a' * 64}'\nuser='a'\n", "events call the trusted proxy so"),
    ],
)
def test_a_bad_file_of_api_keys_is_named_with_what_is_wrong(tmp_path: Path, text: str, told: str) -> None:
    """One sentence with the file and the place; a value that may be a key is not shown."""
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(KeyProblem, match=told) as caught:
        KeyRing.load(path)
    assert str(path) in str(caught.value)
    assert CANARY not in str(caught.value)


def test_a_file_of_api_keys_must_be_there_and_ours(tmp_path: Path) -> None:
    """A missing file, and one that others can write to, are refused."""
    path = tmp_path / "keys.toml"
    with pytest.raises(KeyProblem, match="no such file of API keys"):
        KeyRing.load(path)
    path.touch()
    path.chmod(0o666)
    with pytest.raises(KeyProblem, match="run chmod go-w"):
        KeyRing.load(path)


def test_new_keys_are_long_and_different() -> None:
    """256 random bits each; the table is what a key ring reads."""
    secrets = {new_api_key(user="a")[0] for _ in range(100)}
    assert len(secrets) == 100
    assert {len(secret) for secret in secrets} == {46}
    assert tomllib.loads("on_behalf = true") == {"on_behalf": new_api_key(user="a", on_behalf=True)[2]["on_behalf"]}
