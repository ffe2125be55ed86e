"""CEF: escapes by the letter of the standard, and nothing that a value may forge."""

import re

import pytest

from sinks.formats import cef
from tests.sinks.samples import GOLDEN, HOSTILE, finding, hostile

PAIR = re.compile(r"(?:^| )([A-Za-z0-9]+)=")


def encode(found, bytes_max=8192):
    return cef.encode(found, product_version="0.1.0", bytes_max=bytes_max).decode()


def parse(message: str) -> tuple[list[str], dict[str, str]]:
    """Header fields and extension, read as the standard says: an unescaped pipe ends a field, ` key=` a value."""
    header, field, position = [], "", 0
    while len(header) < 7:
        char = message[position]
        if char == "\\":
            field += message[position + 1]
            position += 2
            continue
        position += 1
        if char == "|":
            header.append(field)
            field = ""
        else:
            field += char
    extension = message[position:]
    keys = [match for match in PAIR.finditer(extension) if not extension[: match.end() - 1].endswith("\\")]
    values = {}
    for match, after in zip(keys, [*keys[1:], None], strict=True):
        raw = extension[match.end() : after.start() if after else None]
        values[match[1]] = re.sub(r"\\(.)", lambda m: {"n": "\n", "r": "\r"}.get(m[1], m[1]), raw, flags=re.DOTALL)
    return header, values


@pytest.mark.parametrize(
    ("value", "header", "extension"),
    [
        ("a|b", "a\\|b", "a|b"),
        ("a=b", "a=b", "a\\=b"),
        ("a\\b", "a\\\\b", "a\\\\b"),
        ("a\\|=b", "a\\\\\\|=b", "a\\\\|\\=b"),
        ("a\nb\r\nc", "a b c", "a\\nb\\r\\nc"),
        ("a\x00b\x1bc", "a b c", "a b c"),
        ("\ufeff🜁", "\ufeff🜁", "\ufeff🜁"),
        ("", "", ""),
    ],
)
def test_escapes_follow_the_standard(value, header, extension):
    """The header escapes backslash and pipe, the extension backslash, equals sign and line ends."""
    assert (cef.escape_header(value), cef.escape_extension(value)) == (header, extension)


def test_a_finding_is_one_known_message():
    """The whole message of a plain finding, byte for byte."""
    assert encode(finding()) == (GOLDEN / "finding.cef").read_text(encoding="utf-8").rstrip("\n")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_stay_values(name):
    """Whatever a value holds, there are seven header fields, our keys and no others, and the text comes back."""
    value = HOSTILE[name]
    message = encode(hostile(value))
    header, extension = parse(message)
    plain_keys = set(parse(encode(finding(incident="i", suppressed_by="c")))[1])
    assert header[:3] == ["CEF:0", "inferwatch", "inferwatch"]
    assert header[6] == "8"
    assert set(extension) <= plain_keys
    assert extension["externalId"] == "f" * 32
    assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f]", message)
    if name not in ("controls", "surrogates", "megabyte", "empty", "newlines"):
        assert extension["msg"] == value
        assert extension["cs3"] == value
    if name == "newlines":
        assert extension["msg"] == value


def test_a_lone_surrogate_becomes_the_replacement_character():
    """No encoder takes half a pair; the rest of the text is kept."""
    assert parse(encode(finding(summary="a\ud800b")))[1]["msg"] == "a\ufffdb"


@pytest.mark.parametrize("bytes_max", [1248, 2048, 8192])
@pytest.mark.parametrize("name", ["megabyte", "astral", "backslash", "surrogates"])
def test_a_message_fits_and_is_cut_between_escapes(name, bytes_max):
    """However long the values, the message has at most `bytes_max` bytes and still parses."""
    message = encode(hostile((HOSTILE[name] * (50_000 // len(HOSTILE[name]) + 1))[:50_000]), bytes_max)
    assert len(message.encode()) <= bytes_max
    assert parse(message)[1]["externalId"] == "f" * 32


@pytest.mark.parametrize(
    ("severity", "number"), [("info", "1"), ("low", "3"), ("medium", "5"), ("high", "8"), ("critical", "10")]
)
def test_severity_is_a_number_up_to_ten(severity, number):
    """CEF knows 0 to 10."""
    assert parse(encode(finding(severity=severity)))[0][6] == number


def test_what_people_said_and_the_incident_are_told():
    """In `reason` and `flexString1`."""
    found = finding(suppressed_by="c1", handled_by="alice", handled_why="a=b|c", incident="i1")
    message = cef.encode(found, product_version="0.1.0", bytes_max=8192).decode()
    assert message.endswith(
        " reason=Held back by alice (a\\=b|c), command c1. flexString1=i1 flexString1Label=incident"
    )
