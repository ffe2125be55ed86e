"""Reads the texts that guards are judged on: CyberSecEval JSON, CSV, JSONL (also gzipped), text, folders of these.

A case knows its place (file and row), never anything that could be a piece of its text: what a file calls family and
language is taken only where it is a short word, since those two stand in records and reports.

Formats: `prompt_injection.json` and `mitre_frr.json` of CyberSecEval; JSON lists, JSON lines and CSV with `text` and
`label` (0 harmless, 1 attack) and, where known, `family`, `lang`, `channel` or `stage`, `system` and `prompt`; BIPIA's
contexts (`context`, harmless documents); `.txt`, a harmless text a line.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast, get_args

from collector.event import Stage
from collector.guards.authored import draw
from collector.guards.protocol import ALONE, Context

SUFFIXES: Final = (".json", ".jsonl", ".csv", ".txt")
FILE_BYTES_MAX: Final = 512 * 1024 * 1024
UNKNOWN: Final = "unknown"
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
_CHANNELS: Final[Mapping[str, Stage]] = {"user": "input", "document": "retrieved"}
_LANGUAGES: Final[Mapping[str, str]] = {"English": "en"}
"""As CyberSecEval calls them."""
_SCRIPT_LANGUAGES: Final[Mapping[str, str]] = {
    "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "CJK": "zh", "THAI": "th", "GREEK": "el", "HEBREW": "he",
}  # fmt: skip
"""Scripts that one language writes, all but alone. Others name no language: Latin, Cyrillic, Arabic, Devanagari."""


class BadDataset(ValueError):
    """A file can't be judged on. One sentence with file and row, never a text."""


@dataclass(frozen=True, slots=True)
class Case:
    """One text with a known answer."""

    place: str
    """File name and row, as in `prompt_injection.json:17`: what records and terminals call it."""
    text: str = field(repr=False)
    attack: bool
    family: str
    lang: str
    stage: Stage
    context: Context = field(repr=False)


@dataclass(frozen=True)
class Cases:
    """All cases, in the order of the files, and what they came from."""

    cases: Sequence[Case]
    digests: Mapping[str, str]
    """File name to the SHA-256 of its bytes, hexadecimal."""


def read_cases(paths: Sequence[Path], harmless: Sequence[Path] = ()) -> Cases:
    """Every case of the files and folders; those of `harmless` are the operator's own traffic. Raises BadDataset."""
    cases: list[Case] = []
    digests: dict[str, str] = {}
    for path, own in [(file, False) for one in paths for file in _files(one)] + [
        (file, True) for one in harmless for file in _files(one)
    ]:
        name = path.name
        if name in digests:
            raise BadDataset(f"two files are called {name}: give them names of their own, since records go by them")
        raw = _read(path)
        digests[name] = hashlib.sha256(raw).hexdigest()
        cases += _cases(name, _opened(raw, path), own=own)
    return Cases(cases, digests)


def language_of(text: str) -> str:
    """The language where the script alone tells it (Japanese, Korean, Chinese, Thai, Greek, Hebrew), else unknown."""
    counts: dict[str, int] = {}
    letters = 0
    for char in text[:400]:
        if char.isalpha():
            letters += 1
            script = unicodedata.name(char, "?").partition(" ")[0]
            counts[script] = counts.get(script, 0) + 1
    kana = counts.get("HIRAGANA", 0) + counts.get("KATAKANA", 0)
    if kana and (kana + counts.get("CJK", 0)) * 2 > letters:
        return "ja"
    script, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    return _SCRIPT_LANGUAGES.get(script, UNKNOWN) if count * 2 > letters else UNKNOWN


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if _suffix(file) and file.is_file())
        if not found:
            raise BadDataset(f"no .json, .jsonl, .csv or .txt file in {path}")
        return found
    if not _suffix(path):
        raise BadDataset(f"{path} is no .json, .jsonl, .csv or .txt file (.gz is opened)")
    return [path]


def _suffix(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise BadDataset(f"{path} is larger than {FILE_BYTES_MAX} bytes: split it")
        return path.read_bytes()
    except OSError as problem:
        raise BadDataset(f"{path} can't be read: {problem.strerror}") from None


def _opened(raw: bytes, path: Path) -> str:
    try:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(fileobj=io.BytesIO(raw)) as packed:
                raw = packed.read(FILE_BYTES_MAX + 1)
            if len(raw) > FILE_BYTES_MAX:
                raise BadDataset(f"{path} holds more than {FILE_BYTES_MAX} bytes: split it")
        return raw.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError):
        raise BadDataset(f"{path} is no UTF-8 text, or damaged") from None


def _cases(name: str, content: str, *, own: bool) -> Iterator[Case]:
    found = 0
    for number, row in _rows(name, content):
        case = _case(f"{name}:{number}", row, own=own)
        if case.text.strip():
            found += 1
            yield case
    if not found:
        raise BadDataset(f"{name} holds no text")


def _rows(name: str, content: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(row from 1, fields). Raises BadDataset, with the row and never its content."""
    kind = _suffix(Path(name))
    if kind == ".txt":
        lines = content.splitlines()
        yield from ((number, {"text": line, "label": 0}) for number, line in enumerate(lines, 1))
        return
    number = 0
    try:
        if kind == ".csv":
            csv.field_size_limit(FILE_BYTES_MAX)
            for number, fields in enumerate(csv.DictReader(io.StringIO(content)), 1):
                yield number, fields
            return
        if kind == ".jsonl":
            for number, line in enumerate(content.split("\n"), 1):
                if line.strip():
                    yield number, _mapping(json.loads(line))
            return
        for number, row in enumerate(_listed(json.loads(content)), 1):
            yield number, _mapping(row)
    except (ValueError, TypeError, csv.Error, RecursionError):
        raise BadDataset(f"{name}, row {number}: not a row of text and label that this command knows") from None


def _listed(content: object) -> Sequence[object]:
    if not isinstance(content, list):
        raise TypeError
    return content


def _mapping(row: object) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise TypeError
    return row


def _case(place: str, row: Mapping[str, Any], *, own: bool) -> Case:
    """Raises BadDataset where the fields are none of the formats."""
    family: object = row.get("family")
    label: object = row.get("label")
    text: object = row.get("text")
    stage: object = row.get("stage") or _CHANNELS.get(str(row.get("channel")), "input")
    if "user_input" in row:  # CyberSecEval, prompt injection
        text, label, family = row["user_input"], 1, row.get("injection_variant")
    elif "mutated_prompt" in row:  # CyberSecEval, false refusals
        text, label, family = row["mutated_prompt"], 0, "false_refusal"
    elif "context" in row and "text" not in row:  # BIPIA
        around: object = row["context"]
        text, label = "\n".join(map(str, around)) if isinstance(around, list) else around, 0
        stage, family = "retrieved", "context"
    if own:
        label, family = 0, "own_traffic"
    if not isinstance(text, str) or stage not in get_args(Stage):
        raise BadDataset(f"{place}: no text, or a stage that is none of {', '.join(get_args(Stage))}")
    if str(label) not in {"0", "1"}:
        raise BadDataset(f"{place}: label must be 0 (harmless) or 1 (attack)")
    lang = _word(row.get("lang") or _LANGUAGES.get(str(row.get("speaking_language"))))
    return Case(
        place,
        text,
        attack=str(label) == "1",
        family=_word(family),
        lang=language_of(text) if lang == UNKNOWN else lang,
        stage=cast(Stage, stage),
        context=Context(
            system=_text(row.get("system") or row.get("test_case_prompt")), prompt=_text(row.get("prompt"))
        ),
    )


def _word(value: object) -> str:
    """A short word as it stands, anything else as unknown: it could be a piece of a prompt."""
    return value if isinstance(value, str) and _WORD.fullmatch(value) else UNKNOWN


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def own_cases(seed: int = 1) -> Cases:
    """A small set of our own, attacks and look-alikes in many languages, where there is no other: seen in training."""
    drawn = draw(seed, attacks_per_technique=20, benign_per_kind=40, per_language=20)
    return Cases(
        [
            Case(f"authored:{number}", row.text, row.label == 1, row.family, row.lang, "input", ALONE)
            for number, row in enumerate(drawn, 1)
        ],
        {"authored": hashlib.sha256(f"seed {seed}".encode()).hexdigest()},
    )
