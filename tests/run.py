"""Runs the test suite as `make test` and CI do: two pytest sessions, one after the other, one summary at the end.

The analysis side runs in this interpreter's environment, file by file on two workers with a broker each; the engine's
tests in `.venv-engine`, where that exists, with one engine, which has both cores to itself.
Exit status 1 when anything failed or no test ran at all.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ENGINE_PYTHON = ROOT / ".venv-engine" / "bin" / "python"
SIDE_BY_SIDE = ["--numprocesses=2", "--dist=loadfile"]


class Totals(NamedTuple):
    """What one pytest session counted; an error in a fixture is a failure."""

    passed: int
    failed: int
    skipped: int


def run(python: Path, arguments: list[str]) -> Totals:
    """One pytest session. Where it dies before it can report, that is a failure."""
    with tempfile.TemporaryDirectory(prefix="inferwatch-tests-") as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", "pytest", "-q", "--durations=8", f"--junitxml={report}", *arguments]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        try:
            counted = totals(report)
        except (OSError, ET.ParseError):
            print(f"A session ended with exit status {code} before it could report.", flush=True)
            return Totals(0, 1, 0)
    # 5: nothing of this session was selected.
    return counted if code in (0, 5) else counted._replace(failed=max(counted.failed, 1))


def totals(report: Path) -> Totals:
    """The counts in a JUnit report. Raises `OSError` or `ET.ParseError` where the session died before writing it."""
    failed = skipped = tests = 0
    for suite in ET.parse(report).getroot().iter("testsuite"):  # noqa: S314  # our own pytest wrote it
        tests += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return Totals(tests - failed - skipped, failed, skipped)


def main() -> int:
    """Runs both sessions and prints the sum."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak", action="store_true", help="only the long batteries (tests marked soak)")
    options, passed_on = parser.parse_known_args()
    chosen = ["-m", "not soak and not long", *passed_on]
    if options.soak:  # a battery of hours is no test that hangs
        chosen = ["-m", "soak", "-o", "faulthandler_timeout=0", *passed_on]
    began = time.monotonic()
    counted = [run(Path(sys.executable), ["--ignore=tests/engine", *SIDE_BY_SIDE, *chosen])]
    if ENGINE_PYTHON.exists():
        counted.append(run(ENGINE_PYTHON, ["tests/engine", *chosen]))
    passed, failed, skipped = (sum(column) for column in zip(*counted, strict=True))
    print(f"All sessions took {time.monotonic() - began:.0f} s.")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 0 if failed == 0 and passed > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
