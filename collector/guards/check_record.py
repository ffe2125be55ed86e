"""The dated, signed record of a check: figures, digests and versions, never a text. `inferwatch doctor` reads it.

The signature (Ed25519, the key of `collector.evidence.signing_key_file`) is over a heading and the record's own JSON
with an empty signature. Whoever can replace the key and the file can replace the record; pin the public key elsewhere.
"""

import os
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from collector.guards.assessment import Assessment
from collector.guards.check import Plan
from collector.signing import Signer, key_id_of, signed_by

FORMAT: Final = 1
FOLDER: Final = "guards"
"""Below the data folder of the configuration."""
AGE_MAX: Final = timedelta(days=90)
_SLACK: Final = timedelta(minutes=10)
"""How far the clocks of the checking host and this one may differ."""
_HEADING: Final = b"inferwatch guards check 1\n"


class CheckRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One check."""

    format: int
    at: datetime
    """UTC."""
    inferwatch: str
    """Version of this package."""
    plan: Plan
    attacks: int
    harmless: int
    fpr: float
    """What the thresholds are proposed for."""
    seen_in_training: bool
    """The texts are those that the classifier was trained on (no data set was given): the figures flatter it."""
    assessment: Assessment
    public_key: str = ""
    signature: str = ""


class Remark(NamedTuple):
    """What a look at the records says."""

    level: str
    """`good`, `warning`, or `bad` where somebody may have tampered."""
    text: str


def signed(record: CheckRecord, signer: Signer | None) -> CheckRecord:
    """The record with the key's signature; without a key, unsigned."""
    if signer is None:
        return record
    named = msgspec.structs.replace(record, public_key=signer.public_key)
    return msgspec.structs.replace(named, signature=signer.sign(_said(named)))


def write(record: CheckRecord, folder: Path) -> Path:
    """The record as a new file of the folder, readable by its owner alone, on disk when this returns."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = folder / _name(record)
    beside = file.with_suffix(".new")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        out.write(_content(record))
        out.flush()
        os.fsync(out.fileno())
    beside.replace(file)
    return file


def look(
    folder: Path, *, now: datetime, versions: Mapping[str, str], policy: str, trusted: Mapping[str, str]
) -> list[Remark]:
    """What the newest record in the folder is worth for guards of these versions. `trusted`: key id to public key."""
    files = sorted(folder.glob("check-*.json"), reverse=True)
    if not files:
        return [Remark("warning", "the guards were never checked here: run `inferwatch guards check` on data of yours")]
    remarks: list[Remark] = []
    for file in files:
        if (record := _read(file)) is not None:
            break
        remarks.append(Remark("bad", f"{file} is no record of a check, or damaged, or not the one of its name"))
    else:
        return remarks
    remarks.append(_signature(file, record, trusted))
    if record.at > now + _SLACK:
        remarks.append(Remark("bad", f"{file} is dated in the future ({record.at:%Y-%m-%d})"))
    elif now - record.at > AGE_MAX:
        days = (now - record.at).days
        remarks.append(Remark("warning", f"the guards were last checked {days} days ago: check them again"))
    if dict(versions) != record.plan.versions:
        changed = sorted(
            name
            for name in versions.keys() | record.plan.versions
            if versions.get(name) != record.plan.versions.get(name)
        )
        remarks.append(Remark("warning", f"the check was of other versions of {', '.join(changed)}: check again"))
    elif policy != record.plan.policy:
        remarks.append(Remark("warning", "thresholds or modes of the guards have changed since the check: check again"))
    if record.seen_in_training:
        remarks.append(Remark("warning", "the check was on texts of the training itself: run it on data of yours"))
    return remarks


def _name(record: CheckRecord) -> str:
    """The record's file: the names stand in the order of the moments."""
    return f"check-{record.at:%Y%m%dT%H%M%S%fZ}.json"


def _content(record: CheckRecord) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def _read(file: Path) -> CheckRecord | None:
    """The record, where the file is byte for byte what is written of it, under the name of its moment in UTC."""
    try:
        content = file.read_bytes()
        record = msgspec.json.decode(content, type=CheckRecord)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    whole = record.at.utcoffset() == timedelta(0) and file.name == _name(record) and content == _content(record)
    return record if whole else None


def _signature(file: Path, record: CheckRecord, trusted: Mapping[str, str]) -> Remark:
    if not record.signature:
        return Remark("warning", f"{file} is not signed: set collector.evidence.signing_key_file and check again")
    said = _said(msgspec.structs.replace(record, signature=""))
    if not signed_by(record.public_key, record.signature, said):
        return Remark("bad", f"{file} was changed after it was signed")
    key_id = key_id_of(record.public_key)
    if key_id not in trusted:
        return Remark("bad", f"{file} is signed by {key_id}, which is not among evidence.signing_keys")
    return Remark("good", f"{file.name}: signed by {key_id}, of {record.at:%Y-%m-%d}")


def _said(record: CheckRecord) -> bytes:
    return _HEADING + msgspec.json.encode(record)
