"""`inferwatch verify`, `journal check` and `keys signing`, as a person calls them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from collector.config import JournalConfig
from collector.event import AuditEvent, decode
from collector.signing import Signer
from inferwatch.cli import app
from tests.collector.booking import KNOWN, Clock, open_book
from tests.collector.signed_log import SIGNER, Log, write_log

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(name="config")
def _config(tmp_path: Path) -> Path:
    file = tmp_path / "inferwatch.toml"
    file.write_text(
        f'[evidence]\nsigning_keys = ["{SIGNER.public_key}"]\n[collector.journal]\ndir = "{tmp_path}/journal"\n'
        f'[collector.evidence]\nsigning_key_file = "{tmp_path}/signing.key"\n'
    )
    return file


def export(log: Log, folder: Path) -> list[Path]:
    folder.mkdir()
    for partition, records in log.items():
        (folder / f"events-{partition}.jsonl").write_bytes(b"\n".join(records) + b"\n")
    return sorted(folder.iterdir())


def test_files_are_verified_and_the_first_bad_line_is_named(tmp_path: Path, config: Path) -> None:
    """Status 0 for a sound log; 1 with the line for a changed one; 3 where no key is trusted."""
    log = write_log(tmp_path, 11)
    sound = run("verify", *export(log, tmp_path / "a"), "--config", config, "--json")
    assert (sound.exit_code, json.loads(sound.stdout)["verdict"]) == (0, "sound")
    at = next(i for i, raw in enumerate(log[1]) if i > 20 and raw[9:12] == b"inf")
    log[1][at] = log[1][at].replace(b'"status":"ok"', b'"status":"error"')
    broken = run("verify", *export(log, tmp_path / "b"), "--config", config)
    assert (broken.exit_code, f"changed: partition 1 at {at}" in broken.stdout) == (1, True), broken.stdout
    (tmp_path / "no.toml").write_text("")
    unproven = run("verify", *sorted((tmp_path / "a").iterdir()), "--config", tmp_path / "no.toml")
    assert unproven.exit_code == 3
    assert "not trusted here" in unproven.stdout
    assert run("verify", tmp_path / "no.toml", "--config", config).exit_code == 1


def test_files_from_the_store_are_verified_as_such(tmp_path: Path, config: Path) -> None:
    """It keeps no heartbeats; without being told so their absence is a fault."""
    log = {p: [raw for raw in records if raw[9:12] != b"hea"] for p, records in write_log(tmp_path, 6).items()}
    files = export(log, tmp_path / "log")
    told = [run("verify", *files, *source, "--config", config) for source in ((), ("--source", "store"))]
    assert [each.exit_code for each in told] == [1, 0]


def test_the_documented_check_accepts_a_proof_and_no_other(tmp_path: Path, config: Path) -> None:
    """The program in docs/evidence.md, as it stands there, on what `--event` prints, for every kind of place."""
    program = re.search(r"```python\n(.*?)```", (ROOT / "docs/evidence.md").read_text(), re.DOTALL)
    assert program is not None
    (tmp_path / "check.py").write_text(program[1])
    log = write_log(tmp_path, 12)
    files = export(log, tmp_path / "log")
    events = [decode(raw).event_id for raw in log[0] if raw[9:12] == b"inf"]
    for event in (events[0], events[len(events) // 2], events[-1]):
        told = run("verify", *files, "--event", event, "--config", config)
        assert told.exit_code == 0
        for text, status in ((told.stdout, 0), (told.stdout.replace("default", "other"), 1)):
            (tmp_path / "proof.json").write_text(text)
            command = [sys.executable, str(tmp_path / "check.py"), str(tmp_path / "proof.json"), SIGNER.public_key]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert (done.returncode, event in done.stdout) == (status, status == 0), done.stderr


def test_a_signing_key_is_made_once_and_rotated(tmp_path: Path, config: Path) -> None:
    """It is never overwritten but by a rotation, and only its public half is shown."""
    made = run("keys", "signing", "--config", config)
    signer = Signer.load(tmp_path / "signing.key")
    assert (made.exit_code, signer.public_key in made.stdout) == (0, True)
    assert run("keys", "signing", "--config", config).exit_code == 1
    rotated = run("keys", "signing", "--rotate", "--config", config)
    successor = Signer.load(tmp_path / "signing.key")
    assert (rotated.exit_code, successor.public_key in rotated.stdout, successor.before) == (0, True, signer.key_id)
    private = (tmp_path / "signing.key").read_text().split()[0]
    assert private not in made.output + rotated.output
    assert (tmp_path / "signing.key").stat().st_mode & 0o077 == 0


def test_a_journal_is_described(tmp_path: Path, config: Path) -> None:
    """What it holds, what is torn, what is damaged; status 1 only for damage."""
    book = open_book(tmp_path / "journal", Clock(), segment_bytes=JournalConfig().segment_bytes, bytes_max=2**30)
    book.finish(book.begin("u_1", 1, KNOWN), AuditEvent, {"status": "ok"})
    book.begin("u_2", 0, KNOWN)
    book.mark({0: 1})
    used = json.loads(run("journal", "check", "--config", config, "--json").stdout)
    book.journal.close()
    assert [(boot["boot"], boot["in_use"]) for boot in used] == [("boot-1", True)]
    segment = tmp_path / "journal/boot-1/00000001.seg"
    whole = segment.read_bytes()
    segment.write_bytes(whole + whole[:20])
    told = run("journal", "check", "--config", config, "--json")
    boot = json.loads(told.stdout)[0]
    assert (boot["in_use"], boot["records"], boot["unacknowledged"], boot["open_requests"]) == (False, 3, 2, 1)
    kinds = {"meta": 1, "record": 3, "begin": 2, "ack": 1}
    assert (boot["segments"][0]["kinds"], boot["segments"][0]["torn_bytes"], told.exit_code) == (kinds, 20, 0)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    segment.write_bytes(damaged)
    told = run("journal", "check", "--config", config)
    assert (told.exit_code, "damaged from" in told.stdout) == (1, True)
    assert segment.read_bytes() == bytes(damaged)
