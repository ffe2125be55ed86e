"""Personal numbers are found by their checks, and numbers that only look alike are not."""

import json
import random
import string

import pytest

from collector.guards.pii import FORMATS, Kind, PiiGuard
from collector.guards.protocol import Judgement
from collector.guards.secrets import SecretsGuard

KNOWN: dict[Kind, tuple[str, str]] = {
    # Published examples of each format, and the same with one character changed.
    "de_tax_id": ("Steuer-ID: 86 095 742 719", "Steuer-ID: 86 095 742 718"),
    "es_dni": ("DNI 12345678Z", "DNI 12345678A"),
    "fr_nir": ("2 55 08 14 168 025 38", "2 55 08 14 168 025 39"),
    "it_codice_fiscale": ("RSSMRA85T10A562S", "RSSMRA85T10A562T"),
    "uk_nino": ("QQ 12 34 56 C".replace("QQ", "AB"), "QQ 12 34 56 C"),
    "uk_nhs": ("NHS number 943 476 5919", "NHS number 943 476 5918"),
    "nl_bsn": ("BSN 111222333", "BSN 111222334"),
    "pl_pesel": ("PESEL 44051401359", "PESEL 44051401358"),
    "se_personnummer": ("811218-9876", "811218-9875"),
    "fi_hetu": ("131052-308T", "131052-308U"),
    "br_cpf": ("529.982.247-25", "529.982.247-26"),
    "in_aadhaar": ("Aadhaar 2341 2341 2346", "Aadhaar 2341 2341 2347"),
    "cn_id": ("11010519491231002X", "110105194912310021"),
    "kr_rrn": ("820701-2409184", "821301-2409184"),
    "passport_mrz": (
        "L898902C36UTO7408122F1204159ZE184226B<<<<<10",
        "L898902C37UTO7408122F1204159ZE184226B<<<<<10",
    ),
    "date_of_birth": ("date of birth: 12.03.1984", "date of delivery: 12.03.1984"),
}


@pytest.mark.parametrize("kind", [each.kind for each in FORMATS])
def test_a_published_example_is_found_and_its_miscopy_is_not(kind: Kind) -> None:
    """Each kind by an example of its own format; with one character changed it is another's, or nobody's."""
    guard, (good, bad) = PiiGuard(), KNOWN[kind]
    block = kind != "date_of_birth"
    assert guard.judge(f"It is {good}, as filed.", "output") == Judgement(1.0 if block else 0.25, kind, block)
    assert kind not in guard.judge(f"It is {bad}, as filed.", "output").label


@pytest.mark.parametrize("kind", [each.kind for each in FORMATS])
def test_an_example_in_the_arguments_of_a_tool_is_found(kind: Kind) -> None:
    """They are JSON in a string, with escapes."""
    text = json.dumps({"content": f"1\n{KNOWN[kind][0]}\tas filed"}).replace(" ", "\\u0020")
    assert kind in PiiGuard().judge(text, "output").label


@pytest.mark.parametrize("kind", ["de_tax_id", "es_dni", "uk_nhs", "nl_bsn", "pl_pesel", "in_aadhaar"])
def test_a_weak_check_needs_a_telling_word(kind: Kind) -> None:
    """A number whose check one in ten passes by chance counts only after its name."""
    number = KNOWN[kind][0].lstrip(string.ascii_letters + " -:")
    assert PiiGuard().judge(f"Order {number} has been sent.", "output") == Judgement(0.0, "", False)
    assert PiiGuard().judge(f"finished, see {number}", "output") == Judgement(0.0, "", False)


def test_actions_are_by_kind() -> None:
    """A kind can be reported or ignored; the probes follow, so that such a guard still starts."""
    guard = PiiGuard(actions={"passport_mrz": "report", "fi_hetu": "ignore"})
    assert guard.judge(KNOWN["passport_mrz"][0], "output") == Judgement(0.25, "passport_mrz", False)
    assert guard.judge(KNOWN["fi_hetu"][0], "output") == Judgement(0.0, "", False)
    assert {probe.block for probe in guard.probes} == {True, False}
    assert [guard.judge(probe.text, "output").block for probe in guard.probes] == [
        probe.block for probe in guard.probes
    ]


def test_random_numbers_are_left_alone() -> None:
    """Of 4,000 random numbers, hashes and dates (seed 7) fewer than one in 200 is taken for a person's."""
    chance = random.Random(7)  # noqa: S311 - a reproducible draw
    guard = PiiGuard()
    texts = []
    for _ in range(1_000):
        texts.append(f"Invoice {chance.randrange(10**9, 10**12)} of {chance.randrange(10**7)} EUR")
        texts.append(f"build {chance.randbytes(20).hex()}")
        texts.append(f"{chance.randrange(10**5, 10**6)}-{chance.randrange(10**3, 10**4)} in stock")
        texts.append(f"on {chance.randrange(1, 29)}.{chance.randrange(1, 13)}.2024 we shipped {chance.random()}")
    flagged = [text for text in texts if guard.judge(text, "output").block]
    assert len(flagged) < len(texts) / 200, flagged[:5]


def test_no_kind_is_the_secrets_guards() -> None:
    """The two guards share the checks, not the kinds: no label means two things."""
    assert not PiiGuard.labels & SecretsGuard.labels
