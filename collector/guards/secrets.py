"""The secrets guard: keys, cards, account numbers and personal data, by pattern and check digit.

`[collector.guards.secrets]`. A pattern alone cries wolf, so what has a check is checked: cards by Luhn (ISO/IEC 7812)
and issuer range, IBAN by its country's length and mod 97 (ISO 13616), nameless secrets by entropy beside a word such as
`password`. Every pattern takes time linear in the text: each starts at a boundary, and its parts are possessive or
bounded. What was found is never returned, only which kinds. The arguments of tools are JSON in a string, so a text with
backslashes is judged a second time with its escapes undone.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, Literal, NamedTuple, get_args

from pydantic import Field

from collector.event import Stage
from collector.guards.protocol import ALONE, Context, Guard, GuardPolicy, Judgement, Probe

Action = Literal["block", "report", "ignore"]
Kind = Literal[
    "aws_key", "github_token", "gitlab_token", "slack_token", "google_key", "openai_key", "stripe_key", "npm_token",
    "huggingface_token", "private_key", "jwt", "url_password", "secret", "card", "iban", "us_ssn", "email", "phone",
]  # fmt: skip
DEFAULT_ACTIONS: Final[Mapping[Kind, Action]] = {"email": "report", "phone": "report"}
"""Every other kind blocks."""
_OUTPUT: Final[frozenset[Stage]] = frozenset({"output"})
_REPORT_SCORE: Final = 0.25
_CARD_DIGITS_MIN: Final = 13
_CARD_DIGITS_MAX: Final = 19
ENTROPY_BITS_MIN: Final = 3.3
"""Shannon entropy per character from which a value beside a telling name counts: words and placeholders lie below."""


class SecretsConfig(GuardPolicy):
    """`[collector.guards.secrets]`: looks at answers by default."""

    able = frozenset({"input", "retrieved", "tool", "output"})
    quick = True
    stages: frozenset[Stage] | None = Field(_OUTPUT, min_length=1, description="Judge only these stages.")
    actions: dict[Kind, Action] = Field(
        default_factory=dict,
        description="By kind of secret: block, report (a label, no block) or ignore. Unset: report for email and "
        "phone, block for the rest.",
    )
    contacts_max: int = Field(
        0, ge=0, le=10_000, description="E-mail addresses, or phone numbers, up to which a text is no matter."
    )

    def build(self) -> Guard:
        return SecretsGuard(actions=self.actions, contacts_max=self.contacts_max)


class Pattern(NamedTuple):
    """One kind of secret: any of `needles` must occur (a fast look), then `regex`, then `check` on what it found."""

    kind: Kind
    needles: tuple[str, ...]
    regex: re.Pattern[str]
    check: Callable[[str], bool] = lambda _: True


def luhn(digits: str) -> bool:
    """Whether the check digit fits (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def is_card(digits: str) -> bool:
    """Whether the digits are a payment card's: issuer range, length of that range, Luhn."""
    length, head = len(digits), int(digits[:4])
    ranges = (
        (length in (13, 16, 19) and 4000 <= head <= 4999)
        or (length == 16 and (5100 <= head <= 5599 or 2221 <= head <= 2720))
        or (length == 15 and head // 100 in (34, 37))
        or (length == 16 and (head == 6011 or 6440 <= head <= 6599 or 3528 <= head <= 3589))
        or (length == 14 and (head // 100 in (36, 38, 39) or 3000 <= head <= 3059))
    )
    return ranges and len(set(digits)) > 1 and luhn(digits)


def has_card(run: str) -> bool:
    """Whether a run of digit groups, parted by blanks or hyphens, holds a card number made of whole groups.

    Groups of one digit count only where the whole run is the number: nobody writes cards so, but lists of numbers are.
    """
    groups = re.split("[ -]", run)
    whole = "".join(groups) if len(groups) <= _CARD_DIGITS_MAX else ""
    if _CARD_DIGITS_MIN <= len(whole) <= _CARD_DIGITS_MAX and is_card(whole):
        return True
    for first in range(len(groups)):
        digits = ""
        for group in groups[first : first + _CARD_DIGITS_MAX // 2 + 1]:
            digits += group
            if len(group) < 2 or len(digits) > _CARD_DIGITS_MAX:
                break
            if len(digits) >= _CARD_DIGITS_MIN and is_card(digits):
                return True
    return False


IBAN_LENGTHS: Final[Mapping[str, int]] = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24,
    "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24,
    "XK": 20,
}  # fmt: skip
"""Characters of an IBAN by country (the ISO 13616 registry)."""


def is_iban(found: str) -> bool:
    """Whether an account number of its country's length, check digits right, begins here."""
    compact = found.replace(" ", "")
    length = IBAN_LENGTHS.get(compact[:2], 0)
    if not length or len(compact) < length:
        return False
    turned = compact[4:length] + compact[:4]
    return int("".join(str(int(char, 36)) for char in turned)) % 97 == 1


def entropy_bits(value: str) -> float:
    """Shannon entropy of the characters, in bits per character."""
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())


def is_random(found: str) -> bool:
    """Whether the value after a telling name looks drawn at random: letters and digits mixed, high entropy."""
    value = re.split("[:=]", found, maxsplit=1)[1].strip(" \t\"'`")
    return (
        any(char.isdigit() for char in value)
        and any(char.isalpha() for char in value)
        and entropy_bits(value) >= ENTROPY_BITS_MIN
    )


_ESCAPE: Final = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|([\"\\/bfnrt]))")
_UNESCAPED: Final = dict(zip('"\\/bfnrt', '"\\/\b\f\n\r\t', strict=True))


def readings(text: str) -> Iterator[str]:
    """The text, and what it says where JSON's escapes (RFC 8259, section 7) stand in it, undone once. Linear."""
    yield text
    if "\\" in text:
        yield _ESCAPE.sub(lambda found: _UNESCAPED[found[2]] if found[2] else chr(int(found[1], 16)), text)


def _token(kind: Kind, *heads: str, body: str) -> Pattern:
    """A key that starts with one of `heads` at a word's edge and goes on as `body`."""
    joined = "|".join(re.escape(head) for head in heads)
    return Pattern(kind, heads, re.compile(rf"(?<![A-Za-z0-9_-])(?:{joined}){body}(?![A-Za-z0-9])"))


_NAMES: Final = ("secret", "token", "password", "passwd", "pwd", "api_key", "apikey", "api-key", "access_key")
PATTERNS: Final[tuple[Pattern, ...]] = (
    _token("aws_key", "AKIA", "ASIA", body="[A-Z2-7]{16}"),
    _token("github_token", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", body="[A-Za-z0-9]{36}"),
    _token("github_token", "github_pat_", body="[A-Za-z0-9_]{59,255}+"),
    _token("gitlab_token", "glpat-", body="[A-Za-z0-9_-]{20,255}+"),
    _token("slack_token", "xoxb-", "xoxa-", "xoxp-", "xoxr-", "xoxs-", "xapp-", body="[A-Za-z0-9-]{20,255}+"),
    Pattern(
        "slack_token", ("hooks.slack.com/services/",), re.compile("hooks[.]slack[.]com/services/T[A-Za-z0-9/]{20}")
    ),
    _token("google_key", "AIza", body="[A-Za-z0-9_-]{35}"),
    _token("google_key", "GOCSPX-", body="[A-Za-z0-9_-]{28}"),
    _token("openai_key", "sk-", body="(?:proj-|svcacct-|ant-)?[A-Za-z0-9_-]{32,255}+"),
    _token("stripe_key", "sk_live_", "rk_live_", body="[A-Za-z0-9]{24,255}+"),
    _token("npm_token", "npm_", body="[A-Za-z0-9]{36}"),
    _token("huggingface_token", "hf_", body="[A-Za-z0-9]{34}"),
    Pattern(
        "private_key", ("-----BEGIN",), re.compile("-----BEGIN (?:[A-Z0-9]{2,12} ){0,2}PRIVATE KEY(?: BLOCK)?-----")
    ),
    _token("jwt", "eyJ", body=r"[A-Za-z0-9_-]{8,8192}+\.eyJ[A-Za-z0-9_-]{8,8192}+\.[A-Za-z0-9_-]{16,8192}+"),
    Pattern(
        "url_password",
        ("://",),
        re.compile(r"(?<![a-z0-9+.-])[a-z][a-z0-9+.-]{1,15}+://[^\s/:@]{1,64}+:[^\s/:@]{3,128}+@"),
    ),
    Pattern(
        "secret",
        _NAMES,
        re.compile(
            rf"(?i:{'|'.join(_NAMES)})[a-z_]{{0,12}}+"
            r"[\"'`]?[ 	]{0,3}+[:=][ 	]{0,3}+[\"'`]?[A-Za-z0-9+/_=.~-]{20,200}"
        ),
        is_random,
    ),
    Pattern("card", (), re.compile(r"(?<![0-9.])(?=[2-6])[0-9]++(?:[ -][0-9]++)*+"), has_card),
    Pattern("iban", (), re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}[ ]?[A-Z0-9](?:[ ]?[A-Z0-9]){10,29}+"), is_iban),
    Pattern("us_ssn", (), re.compile(r"(?<![0-9-])(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![0-9-])")),
)
_EMAIL: Final = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}+@[A-Za-z0-9-]{1,63}+(?:\.[A-Za-z0-9-]{1,63}+){1,8}+"
)
_PHONE: Final = re.compile(
    r"(?<![\w.+-])(?:\+[1-9][0-9 ().-]{7,18}[0-9]|\(?[0-9]{3}\)?[ .-][0-9]{3}[ .-][0-9]{4})(?![\w-])"
)


class SecretsGuard:
    """Finds secrets and personal data. Keeps nothing; about 30 µs per KB."""

    name = "secrets"
    stages = SecretsConfig.able
    labels: frozenset[str] = frozenset(get_args(Kind))
    reads: frozenset[str] = frozenset()
    window_chars = 256
    """Of what holds blanks, an assignment of a secret is the longest; everything else is one run. Enough where each
    character is an escape of six, too: escapes hold no blank, and before its last run an assignment has 31 characters.
    """

    def __init__(self, *, actions: Mapping[Kind, Action] | None = None, contacts_max: int = 0) -> None:
        chosen: dict[Kind, Action] = {**DEFAULT_ACTIONS, **(actions or {})}
        self._actions: Mapping[str, Action] = {str(kind): action for kind, action in chosen.items()}
        self._contacts_max = contacts_max
        parts = [(pattern.kind, pattern.regex.pattern) for pattern in PATTERNS]
        told = repr(
            (parts, _ESCAPE.pattern, _EMAIL.pattern, _PHONE.pattern, sorted(self._actions.items()), contacts_max)
        )
        self.version = f"1+{hashlib.sha256(told.encode()).hexdigest()[:12]}"

    @property
    def probes(self) -> Sequence[Probe]:
        """A made-up private key header, unless private keys may pass, and a sentence about keys without one."""
        header = "-----BEGIN " + "RSA PRIVATE KEY-----\nMIIE"
        return (
            Probe(header, "output", self._actions.get("private_key", "block") == "block"),
            Probe("Store the API key in an environment variable, never in the code.", "output", False),
        )

    def judge(self, text: str, stage: Stage, context: Context = ALONE) -> Judgement:  # noqa: ARG002 - patterns only
        actions = {
            kind: self._actions.get(kind, "block") for reading in readings(text) for kind in self._kinds(reading)
        }
        told = sorted(kind for kind, action in actions.items() if action != "ignore")
        block = "block" in actions.values()
        return Judgement(1.0 if block else _REPORT_SCORE if told else 0.0, "+".join(told), block)

    def _kinds(self, text: str) -> Iterator[str]:
        lower = text.lower()
        for pattern in PATTERNS:
            haystack = lower if pattern.kind == "secret" else text
            if pattern.needles and not any(needle in haystack for needle in pattern.needles):
                continue
            if any(pattern.check(found[0]) for found in pattern.regex.finditer(text)):
                yield pattern.kind
        if "@" in text and _more_than(self._contacts_max, _EMAIL, text):
            yield "email"
        if _more_than(self._contacts_max, _PHONE, text):
            yield "phone"


def _more_than(count_max: int, regex: re.Pattern[str], text: str) -> bool:
    return any(number >= count_max for number, _ in enumerate(regex.finditer(text)))
