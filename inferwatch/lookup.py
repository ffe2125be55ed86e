"""`inferwatch lookup`: was this text, or one like it, seen? Runs where the tenants' keys are; the text stays here.

What leaves this host: digests and MinHashes under the tenant's keys, to the store, and a signed record of the question
(who, why, which digest, how many events) to `iw.commands`. A plain SHA-256 goes to the store only where events have
such. Guarantee: there is no answer without that record.
"""

import unicodedata
from pathlib import Path
from typing import BinaryIO, Final

from msgspec import Struct

from collector.epochs import epochs
from collector.identity import Pseudonyms, load_key, plain_digest
from detectors.commands import Lookup
from inferwatch.commands import BadWords, Operator, make, send
from inferwatch.config import Config
from sinks.clickhouse import lookup
from sinks.clickhouse.asking import Ask, asking
from sinks.clickhouse.lookup import Sightings, Similar

TEXT_BYTES_MAX: Final = 4 * 1024 * 1024


class InEpoch(Struct, frozen=True, omit_defaults=True):
    """What was found under one key."""

    epoch: str
    exact: Sightings | None
    similar: list[Similar]


class Found(Struct, frozen=True):
    """The answer. `command` is the record of the question."""

    command: str
    tenant: str
    exact: int
    """Events of this very text."""
    similar: int
    """Events of texts like it."""
    epochs: list[InEpoch]


async def look_up(
    config: Config, operator: Operator, text: str, *, tenant: str, reason: str, at_least: float, limit: int
) -> Found:
    """Ask under every key that is left, write down that it was asked, and only then answer.

    Raises KeyProblem, NotAnswered, BadWords, BrokerAway or NotWritten; none holds the text.
    """
    names = keys_of(config, tenant)
    ask = asking(config.store)
    found = [_in_epoch(ask, each, tenant, text, at_least=at_least, limit=limit) for each in names]
    exact = sum(each.exact.events for each in found if each.exact)
    alike = sum(each.similar[0].events_in_all for each in found if each.similar)
    told = [each.epoch for each in found][-1_000:]
    digest = names[-1].digest(_forms(text)[0])
    command = make(Lookup, operator, tenant, reason, digest=digest, epochs=told, exact=exact, similar=alike)
    await send(config, operator, command)
    return Found(command.id, tenant, exact, alike, found)


def keys_of(config: Config, tenant: str) -> list[Pseudonyms]:
    """The pseudonyms of each epoch whose key is left, oldest first. Raises KeyProblem."""
    identity = config.collector.identity
    return [
        Pseudonyms(load_key(each.path), minhash_chars_max=identity.minhash_chars_max)
        for each in epochs(identity.key_dir, tenant)
    ]


def _in_epoch(ask: Ask, names: Pseudonyms, tenant: str, text: str, *, at_least: float, limit: int) -> InEpoch:
    forms = _forms(text)
    digests = [names.digest(form) for form in forms]
    if lookup.hashed_plainly(ask, tenant, names.epoch):
        digests += [plain_digest(form.encode()) for form in forms]
    seen = lookup.exact(ask, tenant, names.epoch, digests)
    alike = lookup.similar(ask, tenant, names.epoch, digests, names.minhash(forms[0]), at_least=at_least, limit=limit)
    return InEpoch(names.epoch, seen, alike)


def _forms(text: str) -> list[str]:
    """The text as it may have been hashed: NFC, as a new text is, or as it stands; with and without a last line end."""
    cut = text.removesuffix("\n").removesuffix("\r")
    return list(dict.fromkeys([unicodedata.normalize("NFC", cut), unicodedata.normalize("NFC", text), cut, text]))


def read_text(file: Path | None, stdin: BinaryIO) -> str:
    """The text in a file, or from standard input. Raises BadWords: empty, too long, no UTF-8."""
    if file is None:
        raw = stdin.read(TEXT_BYTES_MAX + 1)
    else:
        with file.open("rb") as opened:
            raw = opened.read(TEXT_BYTES_MAX + 1)
    if len(raw) > TEXT_BYTES_MAX:
        raise BadWords(f"a text to look up has at most {TEXT_BYTES_MAX} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise BadWords("the text to look up is not UTF-8") from None
    if not text.strip("\r\n"):
        raise BadWords("there is no text to look up: give it by --file, or on standard input")
    return text
