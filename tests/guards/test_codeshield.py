"""CodeShield with both halves: each is seen to work, and a half that does not is an error, never an allow."""

import stat
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from collector.guards.codeshield import CodeShieldConfig, CodeShieldGuard, SemgrepFailed, TooManyPieces, pieces_of
from collector.guards.protocol import Guard, GuardRefused, Judgement, TextTooLong

pytestmark = pytest.mark.skipif(find_spec("codeshield") is None, reason="codeshield is in the sidecar's environment")


@pytest.fixture(scope="module")
def guard() -> Guard:
    """The guard as it is by default."""
    return CodeShieldConfig().build()


def fenced(code: str, tag: str = "") -> str:
    return f"Sure:\n```{tag}\n{code}\n```\nThat is all."


@pytest.mark.parametrize(
    ("code", "label"),
    [
        ("import os\nos.system(input())", "cwe-78"),
        ("import subprocess\nsubprocess.run(cmd, shell=True)", "cwe-78"),
        ("import pickle\npickle.loads(data)", "cwe-502"),
        ("x = eval(input())", "cwe-94+cwe-95"),
    ],
)
def test_flaws_that_run_away_are_blocked(guard: Guard, code: str, label: str) -> None:
    """In a fenced piece whatever its tag says, and without a fence."""
    for text in (fenced(code), fenced(code, "python"), fenced(code, "text"), code):
        found = guard.judge(text, "output")
        assert (found.score, found.block) == (1.0, True), text
        assert set(label.split("+")) & set(found.label.split("+")), found.label


def test_a_weak_hash_is_reported_and_hides_nothing(guard: Guard) -> None:
    """A regex hit does not end the search: the command behind it is found too, which the package by itself misses."""
    weak = "import hashlib\nhashlib.md5(b'a')"
    assert guard.judge(fenced(weak), "output") == Judgement(0.25, "cwe-327+cwe-328", False)
    both = guard.judge(fenced(f"{weak}\nimport os\nos.system(input())"), "output")
    assert both.block
    assert {"cwe-78", "cwe-328"} <= set(both.label.split("+"))


def test_harmless_code_and_talk_about_code_pass(guard: Guard) -> None:
    """Nothing found is nothing said."""
    for text in (fenced("print(sorted(['b', 'a']))", "python"), "Never build SQL from input.", "", "```\n```"):
        assert guard.judge(text, "output") == Judgement(0.0, "", False)


def test_pieces_are_told_apart() -> None:
    """Fences of any length, an unclosed one, and the rest."""
    text = "a\n```py\none\n```\nb\n~~~~\ntwo\n~~~~\nc\n```\nthree"
    assert list(pieces_of(text)) == ["one\n", "two\n", "three", "a\n\n\nb\n\n\nc\n\n"]


def with_semgrep(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Puts another semgrep in place."""
    from codeshield.insecure_code_detector import oss

    program = folder / "semgrep"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(oss, "SEMGREP_COMMAND", [str(program)])


@pytest.mark.parametrize(
    "script",
    [
        """echo '{"results": [], "paths": {"scanned": []}}'""",
        "exit 2",
        "echo canary; exit 0",
        """echo '{"results": [], "paths": {"scanned": ["a"]}}'; exit 7""",
        "sleep 30",
    ],
    ids=["scans nothing", "fails", "prose", "bad status", "hangs"],
)
def test_a_semgrep_that_does_not_work_is_no_allow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """A running guard says error; a new one does not start."""
    config = CodeShieldConfig(deadline_ms=1_500)
    guard = CodeShieldConfig(deadline_ms=20_000).build()
    assert isinstance(guard, CodeShieldGuard)
    guard._detector._timeout_s = 1.0
    with_semgrep(monkeypatch, tmp_path, script)
    with pytest.raises(SemgrepFailed):
        guard.judge(fenced("import os\nos.system(input())"), "output")
    with pytest.raises(GuardRefused, match="semgrep half fails with SemgrepFailed"):
        config.build()


def test_a_semgrep_that_finds_nothing_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Even where it says that it has looked."""
    with_semgrep(monkeypatch, tmp_path, """echo '{"results": [], "paths": {"scanned": ["a"]}}'""")
    with pytest.raises(GuardRefused, match="semgrep half found nothing in known bad code"):
        CodeShieldConfig().build()


def test_a_regex_half_that_finds_nothing_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other half is seen, too."""
    from codeshield.insecure_code_detector import insecure_code_detector

    monkeypatch.setattr(insecure_code_detector, "_regex_analyze", lambda *_: [])
    with pytest.raises(GuardRefused, match="regex half found nothing in known bad code"):
        CodeShieldConfig().build()


def test_no_code_stays_behind(guard: Guard, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    """Not in the temporary folder, where the package leaves it, not in a log, not on a terminal."""
    folder = Path(tempfile.gettempdir())
    before = set(folder.glob("*.*"))
    guard.judge(fenced("import hashlib\nhashlib.md5(b'canary-8842')\nimport os\nos.system(input())"), "output")
    assert [path for path in set(folder.glob("*.*")) - before if path.suffix in (".py", ".js", ".c", ".java")] == []
    assert "canary-8842" not in caplog.text + "".join(capfd.readouterr())


def test_bounds_are_errors(guard: Guard) -> None:
    """A text too long, or of too many pieces, is not allowed for it."""
    with pytest.raises(TextTooLong):
        guard.judge("a" * 20_001, "output")
    with pytest.raises(TooManyPieces):
        guard.judge(fenced("a") * 40, "output")
