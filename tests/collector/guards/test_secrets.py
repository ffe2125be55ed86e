"""The secrets guard finds what is a secret, and lets look-alikes pass."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.guards.protocol import Judgement
from collector.guards.secrets import IBAN_LENGTHS, PATTERNS, SecretsConfig, SecretsGuard, is_iban, luhn, readings

CLEAR = Judgement(0.0, "", block=False)
MIXED = "q7Rt2Lx9Zb4Kc8Vn1Pw5Yd3Hs6Jg0Mf7Ta2Ue9"
DIGITS = "1234567890"
FOUND = {
    "aws_key": "AKIA" + "Q7ZX" * 4,
    "github_token": "ghp_" + MIXED[:36],
    "gitlab_token": "glpat-" + MIXED[:20],
    "slack_token": "xoxb-" + "12345678901-" + MIXED[:24],
    "google_key": "AIza" + MIXED[:35],
    "openai_key": "sk-proj-" + MIXED,
    "stripe_key": "sk_live_" + MIXED[:24],
    "npm_token": "npm_" + MIXED[:36],
    "huggingface_token": "hf_" + MIXED[:34],
    "private_key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "jwt": "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0NTY3ODkwIn0." + MIXED,
    "url_password": "postgres://" + "admin:" + "hunter2x@db:5432/x",
    "secret": "api_key = " + f'"{MIXED}"',
    "card": "4111 1111 1111 1111",
    "iban": "GB82 WEST 1234 5698 7654 32",
    "us_ssn": "078-05-1120",
}


@pytest.mark.parametrize("kind", FOUND)
@pytest.mark.parametrize("place", ["{}", "Here it is: {}.", "a\n{}\nb", "({})", "1 2 {} 3"])
def test_a_secret_is_blocked_by_its_kind(kind: str, place: str) -> None:
    """Each kind is found wherever it stands, and the label says the kind alone."""
    assert SecretsGuard().judge(place.format(FOUND[kind]), "output") == Judgement(1.0, kind, block=True)


@pytest.mark.parametrize("kind", FOUND)
@pytest.mark.parametrize("before", ["\n", "x\t", "\r\n", "é\\", "“", "/"])
def test_a_secret_in_the_arguments_of_a_tool_is_found(kind: str, before: str) -> None:
    """They are JSON in a string: a letter of an escape stands where a word's edge is, and quotes have a backslash."""
    for text in (json.dumps({"content": f"{before}{FOUND[kind]}"}), _all_escaped(f" {FOUND[kind]} ")):
        assert SecretsGuard().judge(text, "output") == Judgement(1.0, kind, block=True)


def _all_escaped(text: str) -> str:
    return "".join(f"\\u{ord(char):04X}" for char in text)


def test_escapes_are_undone_once() -> None:
    """As a JSON parser undoes them; a text without a backslash has one reading."""
    text = r"a\nb \\n \" \/ \u00e9\ud83d \x \u12 C:\dir"
    assert list(readings(text)) == [text, 'a\nb \\n " / \u00e9\ud83d \\x \\u12 C:\\dir']
    assert list(readings("no escape")) == ["no escape"]


HARMLESS = (
    "The answer is 42.",
    "Call the function with api_key=YOUR_API_KEY_GOES_HERE_PLEASE",
    "password: correct-horse-battery-staple-again",
    "token = aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa1",
    "4111 1111 1111 1112",
    "order 1234 5678 9012 3456",
    "0000 0000 0000 0000",
    "GB82 WEST 1234 5698 7654 33",
    "ZZ82 WEST 1234 5698 7654 32",
    "AKIAQ7ZX",
    "sk-short",
    "-----BEGIN PUBLIC KEY-----",
    "-----BEGIN CERTIFICATE-----",
    "eyJ is how a token begins",
    "see https://example.org:8080/a@b",
    "2024-05-01T10:45:00Z and 12-34-5678",
    "pi is 3.14159265358979323846264338327950288",
    "3f786850e387550fdab836ed7e6dc881de23001b",
    "123e4567-e89b-12d3-a456-426614174000",
    "my_secret_function(a, b) returns token",
    r"C:\Users\nobody\tokens\u0041 and \\server\share",
)


@pytest.mark.parametrize("text", HARMLESS)
def test_a_look_alike_passes(text: str) -> None:
    """What fails its check digit, is a placeholder or a mere number is no secret."""
    assert SecretsGuard().judge(text, "output") == CLEAR


def test_contacts_are_reported_and_not_blocked() -> None:
    """E-mail addresses and phone numbers get a label; more than contacts_max of them count."""
    text = "Write to a.person@example.org or b@example.com, or call +44 20 7946 0958."
    assert SecretsGuard().judge(text, "output") == Judgement(0.25, "email+phone", block=False)
    assert SecretsGuard(contacts_max=1).judge(text, "output") == Judgement(0.25, "email", block=False)
    assert SecretsGuard(contacts_max=2).judge(text, "output") == CLEAR


def test_actions_are_the_operators_choice() -> None:
    """A kind can block, be reported or be ignored."""
    text = f"{FOUND['card']} and a.person@example.org"
    built = SecretsConfig(actions={"card": "ignore", "email": "block"}).build()
    assert built.judge(text, "output") == Judgement(1.0, "email", block=True)
    assert SecretsConfig(actions={"card": "report", "email": "ignore"}).build().judge(text, "output") == Judgement(
        0.25, "card", block=False
    )


def test_the_version_tells_the_settings() -> None:
    """Other actions, other version."""
    assert SecretsGuard().version != SecretsGuard(actions={"card": "ignore"}).version


@given(body=st.text(alphabet=DIGITS, min_size=1, max_size=18))
def test_luhn_knows_every_single_typo(body: str) -> None:
    """Exactly one last digit makes a number right."""
    assert sum(luhn(body + last) for last in DIGITS) == 1


@given(
    country=st.sampled_from(sorted(IBAN_LENGTHS)),
    seed=st.text(alphabet=DIGITS + "ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=34, max_size=34),
    check=st.integers(2, 98),
)
def test_iban_takes_one_check_number_only(country: str, seed: str, check: int) -> None:
    """Of all check numbers one is right for an account."""
    account = seed[: IBAN_LENGTHS[country] - 4]
    turned = "".join(str(int(char, 36)) for char in f"{account}{country}00")
    right = 98 - int(turned) % 97
    assert is_iban(f"{country}{right:02}{account}")
    assert is_iban(f"{country}{check:02}{account}") is (check == right)


HOSTILE = (
    "a", "AKIA", "eyJ", "eyJaaaaaaaa.", "1 ", "1", "4111 ", "secret=", "secret_", "secret = '", "AB12 ", "a@", "a.a@a.",
    "+1 ", "a://b:", "A", "12-", "é", "-----BEGIN ", "GB82WEST", "(123) ", "sk-", "4", "4-", "password" + " ", "://", "://a:",
    "\\", "\\n", "\\u0041",
)  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_time_grows_with_the_text_only(piece: str) -> None:
    """Ten times the text takes at most about ten times as long: no pattern backtracks."""

    def best_s(length: int) -> float:
        text = piece * (length // len(piece))
        times_s = []
        for _ in range(2):
            start_s = time.thread_time()
            SecretsGuard().judge(text, "output")
            times_s.append(time.thread_time() - start_s)
        return min(times_s)

    small_s, large_s = best_s(30_000), best_s(300_000)
    assert large_s < 40 * small_s + 0.05, f"{small_s:.4f} s for 30 kB, {large_s:.4f} s for 300 kB"


def test_a_megabyte_is_quick() -> None:
    """A megabyte of the costliest trap takes seconds, not minutes."""
    start_s = time.thread_time()
    assert SecretsGuard().judge("4111 " * 200_000, "output") == CLEAR
    assert time.thread_time() - start_s < 10


def test_every_pattern_has_a_sample() -> None:
    """The samples above cover the whole table."""
    assert {pattern.kind for pattern in PATTERNS} == set(FOUND)
