"""Runs the test suite as `make test` and CI do: two pytest sessions side by side, one summary at the end.

The analysis side runs in this interpreter's environment, the engine's tests in `.venv-engine` where that exists. Each
session has one broker and, where it needs it, one engine. Exit status 1 when anything failed or no test ran at all.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ENGINE_PYTHON = ROOT / ".venv-engine" / "bin" / "python"


class Totals(NamedTuple):
    """What one pytest session counted; an error in a fixture is a failure."""

    passed: int
    failed: int
    skipped: int


class Session(NamedTuple):
    """One pytest process, its report and its log."""

    name: str
    process: subprocess.Popen[bytes]
    report: Path
    log: Path


def start(name: str, python: Path, arguments: list[str], folder: Path) -> Session:
    """One pytest process that writes its output to a file, so that two of them do not interleave."""
    report, log = folder / f"{name}.xml", folder / f"{name}.log"
    command = [str(python), "-m", "pytest", "-q", "--durations=8", f"--junitxml={report}", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    return Session(name, process, report, log)


def totals(report: Path) -> Totals:
    """The counts in a JUnit report. Raises `OSError` or `ET.ParseError` where the session died before writing it."""
    failed = skipped = tests = 0
    for suite in ET.parse(report).getroot().iter("testsuite"):  # noqa: S314  # our own pytest wrote it
        tests += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return Totals(tests - failed - skipped, failed, skipped)


def main() -> int:
    """Starts both sessions, prints each log when its session ends, then the sum."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak", action="store_true", help="only the long batteries (tests marked soak)")
    options, passed_on = parser.parse_known_args()
    marks = ["-m", "soak" if options.soak else "not soak"]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="inferwatch-tests-") as folder:
        analysis = ["--ignore=tests/engine", *marks, *passed_on]
        sessions = [start("analysis", Path(sys.executable), analysis, Path(folder))]
        if ENGINE_PYTHON.exists():
            sessions.append(start("engine", ENGINE_PYTHON, ["tests/engine", *marks, *passed_on], Path(folder)))
        counted, sound = [], True
        for session in sessions:
            code = session.process.wait()
            print(f"── {session.name} ──\n{session.log.read_text(errors='replace')}", flush=True)
            sound = sound and code in (0, 5)  # 5: nothing of this session was selected
            try:
                counted.append(totals(session.report))
            except (OSError, ET.ParseError):
                print(f"The {session.name} session ended with exit status {code} before it could report.")
                sound = False
        passed, failed, skipped = (sum(column) for column in zip(*counted, strict=True)) if counted else (0, 0, 0)
        print(f"Both sessions took {time.monotonic() - began:.0f} s.")
        print(f"{passed} passed, {failed} failed, {skipped} skipped")
        return 0 if sound and failed == 0 and passed > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
