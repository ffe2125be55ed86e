"""The PII guard: national identity numbers, passports and dates of birth, by format and check digit.

`[collector.guards.pii]`, off by default. It stands beside the secrets guard, which knows keys, cards, accounts, US
social security numbers, e-mail addresses and phone numbers. A number alone cries wolf, so each has its country's check
where there is one, and where the check is weak a telling word must stand before it. Every pattern takes time linear in
the text. What was found is never returned, only which kinds. Names and addresses have no pattern: see docs/guards.md.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from typing import Final, Literal, NamedTuple, get_args

from pydantic import Field

from collector.event import Stage
from collector.guards.protocol import ALONE, Context, Guard, GuardPolicy, Judgement, Probe
from collector.guards.secrets import Action, luhn, readings

Kind = Literal[
    "de_tax_id", "es_dni", "fr_nir", "it_codice_fiscale", "uk_nino", "uk_nhs", "nl_bsn", "pl_pesel",
    "se_personnummer", "fi_hetu", "br_cpf", "in_aadhaar", "cn_id", "kr_rrn", "passport_mrz", "date_of_birth",
]  # fmt: skip
DEFAULT_ACTIONS: Final[Mapping[Kind, Action]] = {"date_of_birth": "report"}
"""Every other kind blocks."""
_OUTPUT: Final[frozenset[Stage]] = frozenset({"output"})
_REPORT_SCORE: Final = 0.25
_BESIDE_CHARS: Final = 48
"""How far before a number its telling word may stand."""


class PiiConfig(GuardPolicy):
    """`[collector.guards.pii]`: looks at answers by default."""

    able = frozenset({"input", "retrieved", "tool", "output"})
    quick = True
    stages: frozenset[Stage] | None = Field(_OUTPUT, min_length=1, description="Judge only these stages.")
    actions: dict[Kind, Action] = Field(
        default_factory=dict,
        description="By kind of personal data: block, report (a label, no block) or ignore. Unset: report for "
        "date_of_birth, block for the rest.",
    )

    def build(self) -> Guard:
        return PiiGuard(actions=self.actions)


class Format(NamedTuple):
    """One kind: `regex`, then `check` on what it found without blanks; of the words `beside` one must stand before."""

    kind: Kind
    regex: re.Pattern[str]
    check: Callable[[str], bool] = lambda _: True
    beside: tuple[str, ...] = ()


def is_date(year: int, month: int, day: int) -> bool:
    """Whether there is such a day."""
    try:
        date(year, month, day)
    except ValueError:
        return False
    return True


def weighed(digits: str, weights: Sequence[int]) -> int:
    """The sum of the digits, each times its weight."""
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=False))


def is_de_tax_id(found: str) -> bool:
    """ISO 7064 mod 11,10; among the first ten digits one stands twice or three times."""
    product = 10
    for digit in found[:10]:
        total = (int(digit) + product) % 10 or 10
        product = total * 2 % 11
    return found[0] != "0" and len(set(found[:10])) in (8, 9) and (11 - product) % 10 == int(found[10])


def is_es_dni(found: str) -> bool:
    """The letter is the number's remainder by 23; a foreigner's first letter counts as a digit."""
    number = found[:-1].upper().translate(str.maketrans("XYZ", "012"))
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == found[-1].upper()


def is_fr_nir(found: str) -> bool:
    """The key is 97 less the number's remainder; Corsica's departments count as 19 and 18."""
    number = found[:13].upper().replace("2A", "19").replace("2B", "18")
    return number.isdigit() and 97 - int(number) % 97 == int(found[13:])


_ODD: Final = dict(
    zip("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16,
         10, 22, 25, 24, 23), strict=True)
)  # fmt: skip
"""What a character counts at an odd place of a codice fiscale (decree of 23 December 1976)."""


def is_it_codice_fiscale(found: str) -> bool:
    """The last letter is the sum of the others by place, modulo 26."""
    code = found.upper()
    total = sum(
        _ODD[char] if place % 2 == 0 else int(char) if char.isdigit() else ord(char) - 65
        for place, char in enumerate(code[:15])
    )
    return chr(65 + total % 26) == code[15]


def is_uk_nhs(found: str) -> bool:
    """Modulo 11, weights 10 to 2."""
    check = 11 - weighed(found, range(10, 1, -1)) % 11
    return check != 10 and check % 11 == int(found[9])


def is_nl_bsn(found: str) -> bool:
    """The test by eleven, the last digit counting less one."""
    return found != "0" * 9 and weighed(found, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0


def is_pl_pesel(found: str) -> bool:
    """Weights 1, 3, 7, 9 over eleven digits; the month tells the century too."""
    century, month = divmod(int(found[2:4]), 20)
    year = (1900, 2000, 2100, 2200, 1800)[century] + int(found[:2])
    return is_date(year, month, int(found[4:6])) and weighed(found, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1)) % 10 == 0


def is_se_personnummer(found: str) -> bool:
    """A day (a coordination number adds 60 to it), then Luhn over the last ten digits."""
    digits = re.sub("[-+]", "", found)[-10:]
    day = int(digits[4:6])
    return is_date(2000 + int(digits[:2]), int(digits[2:4]), day - 60 * (day > 60)) and luhn(digits)


def is_fi_hetu(found: str) -> bool:
    """The sign is the remainder by 31 of date and number."""
    century = {"+": 1800, "-": 1900, "A": 2000}[found[6].upper()]
    digits = found[:6] + found[7:10]
    return (
        is_date(century + int(found[4:6]), int(found[2:4]), int(found[:2]))
        and "0123456789ABCDEFHJKLMNPRSTUVWXY"[int(digits) % 31] == found[10].upper()
    )


def is_br_cpf(found: str) -> bool:
    """Two check digits modulo 11."""
    digits = re.sub("[.-]", "", found)
    first = weighed(digits, range(10, 1, -1)) * 10 % 11 % 10
    second = weighed(digits, range(11, 1, -1)) * 10 % 11 % 10
    return len(set(digits)) > 1 and digits[9:] == f"{first}{second}"


_DIHEDRAL: Final = (
    "0123456789", "1234067895", "2340178956", "3401289567", "4012395678",
    "5987604321", "6598710432", "7659821043", "8765932104", "9876543210",
)  # fmt: skip
_PERMUTED: Final = (
    "0123456789", "1576283094", "5803796142", "8916043527", "9453126870", "4286573901", "2793806415", "7046913258",
)  # fmt: skip


def is_in_aadhaar(found: str) -> bool:
    """Verhoeff's check (1969), in the dihedral group of order ten."""
    state = "0"
    for place, digit in enumerate(reversed(found)):
        state = _DIHEDRAL[int(state)][int(_PERMUTED[place % 8][int(digit)])]
    return state == "0"


def is_cn_id(found: str) -> bool:
    """GB 11643: a day, then ISO 7064 mod 11-2."""
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    born = is_date(int(found[6:10]), int(found[10:12]), int(found[12:14]))
    return born and "10X98765432"[weighed(found, weights) % 11] == found[17].upper()


def is_kr_rrn(found: str) -> bool:
    """A day; numbers given since 2020 have no check digit."""
    return is_date((1900 if found[7] in "12" else 2000) + int(found[:2]), int(found[2:4]), int(found[4:6]))


def is_passport_mrz(found: str) -> bool:
    """The second line of a passport: three fields with check digits (ICAO 9303, weights 7, 3, 1)."""

    def fits(field: str, check: str) -> bool:
        values = [0 if char == "<" else int(char, 36) for char in field]
        return str(sum(value * (7, 3, 1)[place % 3] for place, value in enumerate(values)) % 10) == check

    return fits(found[:9], found[9]) and fits(found[13:19], found[19]) and fits(found[21:27], found[27])


def _digits(count_groups: str) -> re.Pattern[str]:
    """Digits in groups, blanks or hyphens between them, at edges where no digit follows."""
    groups = "[ -]?".join(f"[0-9]{{{size}}}" for size in count_groups.split())
    return re.compile(rf"(?<![0-9.-]){groups}(?![0-9])")


_DAY: Final = r"(?:[0-9]{1,2}[./ -][0-9]{1,2}[./ -](?:19|20)[0-9]{2}|(?:19|20)[0-9]{2}[./-][0-9]{1,2}[./-][0-9]{1,2})"
FORMATS: Final[tuple[Format, ...]] = (
    Format("de_tax_id", _digits("2 3 3 3"), is_de_tax_id, ("steuer", "idnr", "tax id", "tin", "id-nr")),
    Format(
        "es_dni", re.compile(r"(?<![A-Za-z0-9])[0-9XYZxyz][0-9]{7}[ -]?[A-Za-z](?![A-Za-z0-9])"), is_es_dni,
        ("dni", "nie", "nif", "identidad", "spanish id"),
    ),
    Format(
        "fr_nir",
        re.compile(r"(?<![0-9])[12] ?[0-9]{2} ?[0-9]{2} ?(?:[0-9]{2}|2[ABab]) ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}(?![0-9])"),
        is_fr_nir,
    ),
    Format(
        "it_codice_fiscale",
        re.compile(
            r"(?<![A-Za-z0-9])[A-Za-z]{6}[0-9]{2}[A-EHLMPRSTa-ehlmprst][0-9]{2}[A-Za-z][0-9]{3}[A-Za-z](?![A-Za-z0-9])"
        ),
        is_it_codice_fiscale,
    ),
    Format(
        "uk_nino",
        re.compile(
            r"(?<![A-Za-z0-9])(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?[0-9]{2} ?[0-9]{2} ?[0-9]{2}"
            r" ?[A-D](?![A-Za-z0-9])"
        ),
    ),
    Format("uk_nhs", _digits("3 3 4"), is_uk_nhs, ("nhs",)),
    Format("nl_bsn", _digits("4 2 3"), is_nl_bsn, ("bsn", "burgerservice", "sofi")),
    Format("pl_pesel", _digits("11"), is_pl_pesel, ("pesel",)),
    Format(
        "se_personnummer", re.compile(r"(?<![0-9-])(?:19|20)?[0-9]{6}[-+][0-9]{4}(?![0-9-])"), is_se_personnummer,
    ),
    Format("fi_hetu", re.compile(r"(?<![A-Za-z0-9-])[0-9]{6}[-+Aa][0-9]{3}[0-9A-Ya-y](?![A-Za-z0-9])"), is_fi_hetu),
    Format("br_cpf", re.compile(r"(?<![0-9.])[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}(?![0-9])"), is_br_cpf),
    Format("in_aadhaar", _digits("4 4 4"), is_in_aadhaar, ("aadhaar", "aadhar", "uidai")),
    Format("cn_id", re.compile(r"(?<![A-Za-z0-9])[1-8][0-9]{16}[0-9Xx](?![A-Za-z0-9])"), is_cn_id),
    Format("kr_rrn", re.compile(r"(?<![0-9-])[0-9]{6}-[1-4][0-9]{6}(?![0-9-])"), is_kr_rrn),
    Format("passport_mrz", re.compile(r"(?<![A-Z0-9<])[A-Z0-9<]{9}[0-9][A-Z<]{3}[0-9]{7}[MFX<][0-9]{7}[A-Z0-9<]{16}"),
           is_passport_mrz),
    Format(
        "date_of_birth", re.compile(rf"(?<![0-9.]){_DAY}(?![0-9])"),
        beside=("born", "birth", "dob", "geboren", "geburt", "né le", "née le", "naissance", "nacimiento", "nascimento",
                "nato il", "nata il", "geboorte", "生年月日", "出生"),
    ),
)  # fmt: skip
_WORDS: Final[Mapping[str, re.Pattern[str]]] = {
    each.kind: re.compile("|".join(rf"(?<![^\W_]){re.escape(word)}" for word in each.beside))
    for each in FORMATS
    if each.beside
}


class PiiGuard:
    """Finds personal numbers. Keeps nothing; `python -m tests.bench.guards` tells its cost."""

    name = "pii"
    stages = PiiConfig.able
    reads: frozenset[str] = frozenset()
    window_chars = 384
    """A telling word may stand 48 characters before, and each of those may be an escape of six (`secrets.readings`)."""
    labels: frozenset[str] = frozenset(get_args(Kind))

    def __init__(self, *, actions: Mapping[Kind, Action] | None = None) -> None:
        chosen: dict[Kind, Action] = {**DEFAULT_ACTIONS, **(actions or {})}
        self._actions: Mapping[str, Action] = {str(kind): action for kind, action in chosen.items()}
        parts = [(each.kind, each.regex.pattern, each.beside) for each in FORMATS]
        self.version = f"2+{hashlib.sha256(repr((parts, sorted(self._actions.items()))).encode()).hexdigest()[:12]}"

    @property
    def probes(self) -> Sequence[Probe]:
        """The passport line that ICAO 9303 prints as its example, or a number that blocks; and a harmless sentence."""
        return (
            Probe("L898902C36UTO7408122F1204159ZE184226B<<<<<10", "output", self._blocks("passport_mrz")),
            Probe("Your tax number stands on the letter of the tax office; never send it by e-mail.", "output", False),
            *(
                ()
                if self._blocks("passport_mrz")
                else (Probe(text, "output", True) for kind, text in _OTHER_PROBES if self._blocks(kind))
            ),
        )

    def judge(self, text: str, stage: Stage, context: Context = ALONE) -> Judgement:  # noqa: ARG002 - patterns only
        actions = {
            kind: self._actions.get(kind, "block") for reading in readings(text) for kind in self._kinds(reading)
        }
        told = sorted(kind for kind, action in actions.items() if action != "ignore")
        block = "block" in actions.values()
        return Judgement(1.0 if block else _REPORT_SCORE if told else 0.0, "+".join(told), block)

    def _blocks(self, kind: Kind) -> bool:
        return self._actions.get(kind, "block") == "block"

    def _kinds(self, text: str) -> Iterator[str]:
        regions = list(_regions(text))
        for each in FORMATS:
            if any(_holds(each, found, text) for span in regions for found in each.regex.finditer(text, *span)):
                yield each.kind


_TWO_DIGITS: Final = re.compile("[0-9]{2}")
_REACH: Final = 64
"""Longer than any format."""
_OTHER_PROBES: Final[tuple[tuple[Kind, str], ...]] = (
    ("fi_hetu", "131052-308T"),
    ("cn_id", "11010519491231002X"),
    ("br_cpf", "529.982.247-25"),
)


def _regions(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of the stretches around two digits in a row, which every format has: prose is passed by quickly."""
    start, end = 0, -1
    for found in _TWO_DIGITS.finditer(text):
        if found.start() - _REACH > end:
            if end >= 0:
                yield start, end
            start = max(0, found.start() - _REACH)
        end = found.end() + _REACH
    if end >= 0:
        yield start, end


def _holds(each: Format, found: re.Match[str], text: str) -> bool:
    """Whether the check fits and a telling word stands before, where one must."""
    if each.beside:
        before = text[max(0, found.start() - _BESIDE_CHARS) : found.start()].lower()
        if not _WORDS[each.kind].search(before):
            return False
    compact = found[0].replace(" ", "")
    return each.check(compact if each.kind in _HYPHENED else compact.replace("-", ""))


_HYPHENED: Final = frozenset({"se_personnummer", "fi_hetu", "br_cpf", "kr_rrn", "date_of_birth"})
