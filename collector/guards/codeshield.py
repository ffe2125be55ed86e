"""The codeshield guard: Meta's CodeShield on the code in answers, tool calls and tool output, both its halves at work.

`[collector.guards.codeshield]`, off by default; the package `codeshield` lives in the sidecar's environment (`make
guards`). As installed it fails open in four ways, each of which is an error here or put right: a semgrep that scans no
file and exits 0, a semgrep that fails, a regex hit that ends the search before semgrep looked, and an exception that
reads as "nothing found". Besides, it leaves the code that it looked at behind in the temporary folder. So semgrep is
run by us, with a limit, in a folder of its own that goes, and on a leash: it ends with the process that asked. At start
each half must find what it alone knows.

What blocks is by kind of flaw (CWE): a call of `md5` is reported, a shell command made of input is blocked.
"""

import asyncio
import contextlib
import contextvars
import hashlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from collector.event import Stage
from collector.guards import leash
from collector.guards.protocol import (
    ALONE,
    Context,
    Guard,
    GuardPolicy,
    GuardRefused,
    Judgement,
    Probe,
    TextTooLong,
    whole,
)

_CODE: Final[frozenset[Stage]] = frozenset({"output"})
_REPORT_SCORE: Final = 0.25
_OUTPUT_BYTES_MAX: Final = 16 * 1024 * 1024
_FENCED: Final = re.compile(r"^[ ]{0,3}(```+|~~~+)[^\n`]*\n(.*?)(?:^[ ]{0,3}\1[`~]*[ ]*$|\Z)", re.MULTILINE | re.DOTALL)
BLOCKED: Final = (78, 89, 94, 95, 119, 120, 502, 611, 676)
"""Commands, SQL, evaluated code, memory, deserialisation, XML entities: what an attacker's input can run away with."""
_ONLY_REGEX: Final = "import hashlib\nhashlib.md5(b'a')\n"
_ONLY_SEMGREP: Final = "import os\nos.system(input())\n"
"""A flaw that only this half of codeshield 1.0.1 finds."""


class SemgrepFailed(Exception):
    """semgrep ended badly, was too slow, or looked at no file. Never read as an allow."""


class TooManyPieces(Exception):
    """More pieces of code in one text than are looked at. Never read as an allow."""


class CodeShieldConfig(GuardPolicy):
    """`[collector.guards.codeshield]`: looks at the code in answers."""

    able = frozenset({"input", "retrieved", "tool", "output"})
    stages: frozenset[Stage] | None = Field(_CODE, min_length=1, description="Judge only these stages.")
    deadline_ms: float = Field(
        20_000, gt=0, le=600_000, description="Time for one text; beyond it the verdict is error."
    )
    block_cwes: tuple[Annotated[int, Field(ge=1, le=2_000)], ...] = Field(
        BLOCKED, max_length=256, description="Kinds of flaw that block, by CWE number; every other is reported."
    )
    chars_max: int = Field(
        20_000,
        ge=1_000,
        le=10_000_000,
        description="A longer text is not looked at: the verdict is error TextTooLong.",
    )
    pieces_max: int = Field(32, ge=1, le=1_024, description="Pieces of code in one text; more: error TooManyPieces.")

    def build(self) -> Guard:
        detector = Detector(timeout_s=0.9 * self.deadline_ms / 1000)
        detector.check_halves()
        return CodeShieldGuard(self, detector)


class CodeShieldGuard:
    """Looks at each fenced piece of code, and at the rest of the text, in every language it knows."""

    name = "codeshield"
    stages = CodeShieldConfig.able
    reads: frozenset[str] = frozenset()
    labels = frozenset(("other", *(f"cwe-{number}" for number in range(1, 2_001))))

    def __init__(self, config: CodeShieldConfig, detector: "Detector") -> None:
        self._config, self._detector = config, detector
        told = repr((metadata.version("codeshield"), metadata.version("semgrep"), sorted(config.block_cwes)))
        self.version = f"1+{hashlib.sha256(told.encode()).hexdigest()[:12]}"

    @property
    def probes(self) -> Sequence[Probe]:
        """A command made of input in a fenced piece, where commands block; harmless code."""
        code = f"Here:\n```python\n{_ONLY_SEMGREP}```\n"
        plain = "Here:\n```python\nprint(sorted(['b', 'a']))\n```\n"
        return (Probe(code, "output", 78 in self._config.block_cwes), Probe(plain, "output", block=False)) + (
            () if 78 in self._config.block_cwes else (Probe("eval(input())", "output", block=True),)
        )

    def judge(self, text: str, stage: Stage, context: Context = ALONE) -> Judgement:  # noqa: ARG002 - code alone
        """The judgement. Raises `SemgrepFailed`, `TextTooLong`, `TooManyPieces`."""
        if len(text) > self._config.chars_max:
            raise TextTooLong
        pieces = list(pieces_of(text))
        if len(pieces) > self._config.pieces_max:
            raise TooManyPieces
        found = self._detector.find(pieces)
        block = not found.isdisjoint(self._config.block_cwes)
        told = sorted(f"cwe-{number}" if 0 < number <= 2_000 else "other" for number in found)
        return Judgement(1.0 if block else _REPORT_SCORE if told else 0.0, "+".join(dict.fromkeys(told[:20])), block)


def pieces_of(text: str) -> Iterator[str]:
    """Each fenced piece of code, and what is left of the text without them."""
    yield from (found[2] for found in _FENCED.finditer(text) if found[2].strip())
    rest = _FENCED.sub("\n", text)
    if rest.strip():
        yield rest


class Detector:
    """codeshield's detector, made to fail loudly. Raises `GuardRefused` where the package is not here."""

    def __init__(self, timeout_s: float) -> None:
        if find_spec("codeshield") is None:
            raise GuardRefused(
                "the codeshield guard did not start: its package is not installed here; run it in the sidecar, made by "
                "`make guards`"
            )
        from codeshield.insecure_code_detector import insecure_code_detector as icd  # noqa: PLC0415 - sidecar only
        from codeshield.insecure_code_detector import languages  # noqa: PLC0415
        from codeshield.insecure_code_detector.usecases import UseCase  # noqa: PLC0415

        self._icd, self._languages, self._uses, self._timeout_s = icd, languages, UseCase, timeout_s
        make_loud()

    def check_halves(self) -> None:
        """Raises `GuardRefused` unless each half finds what only it can find."""
        for half, code, number in (("semgrep", _ONLY_SEMGREP, 78), ("regex", _ONLY_REGEX, 328)):
            try:
                found = self.find([code])
            except Exception as problem:  # noqa: BLE001 - whatever it is, the half does not work
                kind = type(problem).__name__
                raise GuardRefused(f"the codeshield guard did not start: its {half} half fails with {kind}") from None
            if number not in found:
                raise GuardRefused(
                    f"the codeshield guard did not start: its {half} half found nothing in known bad code; "
                    "semgrep 1.90.0 works, several later ones scan nothing (docs/guards.md)"
                )

    def find(self, pieces: Sequence[str]) -> set[int]:
        """The CWE numbers of all flaws in the pieces; 0 for a flaw without a number. Raises `SemgrepFailed`."""
        with scratch(self._timeout_s):
            return asyncio.run(self._find(pieces))

    async def _find(self, pieces: Sequence[str]) -> set[int]:
        found: set[int] = set()
        for piece in pieces:
            known = self._languages.get_supported_languages()
            asked = (self._issues(language, whole(piece)) for language in known)
            for issues in await asyncio.gather(*asked, return_exceptions=True):  # all have ended, whatever one raised
                if isinstance(issues, BaseException):
                    raise issues
                found |= {cwe_of(issue) for issue in issues}
        return found

    async def _issues(self, language: Any, piece: str) -> list[Any]:
        """Both halves: the quick use ends at a regex hit, which then is followed by the thorough one."""
        quick = await self._icd.analyze(language, piece, usecase=self._uses.CODESHIELD)
        if not quick or any(str(issue.analyzer.value) != "regex" for issue in quick):
            return list(quick)
        return [*quick, *await self._icd.analyze(language, piece, usecase=self._uses.CYBERSECEVAL)]


def cwe_of(issue: Any) -> int:
    """The number in `CWE-78`; 0 for anything else."""
    found = re.search(r"CWE-(\d{1,5})", str(issue.cwe_id))
    return int(found[1]) if found else 0


_scratch: contextvars.ContextVar[tuple[Path, float]] = contextvars.ContextVar("_scratch")
"""(folder, seconds that semgrep may take) of the search under way."""


@contextlib.contextmanager
def scratch(timeout_s: float) -> Iterator[None]:
    """A folder of one search's own, readable by this user alone, that goes with all that is in it."""
    with tempfile.TemporaryDirectory(prefix="inferwatch-code-") as folder:
        token = _scratch.set((Path(folder), timeout_s))
        try:
            yield
        finally:
            _scratch.reset(token)


def make_loud() -> None:
    """Has codeshield run semgrep and write files by us, in this process; its logs, which hold code, are off."""
    from codeshield.insecure_code_detector import insecure_code_detector as icd  # noqa: PLC0415 - sidecar only

    icd._run_command, icd._write_code_to_file = _run_semgrep, _write
    for name in ("codeshield", "CodeShield"):
        logging.getLogger(name).disabled = True
        logging.getLogger(name).propagate = False
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("codeshield.", "llamafirewall")):
            logging.getLogger(name).disabled = True


def _write(code: str, extension: str) -> Path:
    handle, name = tempfile.mkstemp(suffix=extension, dir=_scratch.get()[0])
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(code)
    return Path(name)


async def _run_semgrep(command: list[str]) -> str:
    """What semgrep said, as JSON. Raises `SemgrepFailed` unless it has looked at a file."""
    folder, timeout_s = _scratch.get()
    environment = {
        "PATH": os.environ.get("PATH", ""), "HOME": str(folder), "TMPDIR": str(folder), "SEMGREP_SEND_METRICS": "off",
        "SEMGREP_ENABLE_VERSION_CHECK": "0",
    }  # fmt: skip
    end, held = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", leash.__file__, *command),
        stdin=end,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=environment,
        cwd=folder,
        start_new_session=True,
    )
    os.close(end)
    try:
        said, _ = await asyncio.wait_for(process.communicate(), timeout_s)
    except TimeoutError:
        raise SemgrepFailed from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            await process.wait()
        os.close(held)
    try:
        told = json.loads(said[: _OUTPUT_BYTES_MAX + 1])
        scanned = told["paths"]["scanned"]
        kinds = {each["type"] for each in told.get("errors", ()) if each.get("level") == "error"}
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        raise SemgrepFailed from None
    # Status 2 for a rule that it can't read: the package has one such rule, for Java; all others have been tried.
    unread = process.returncode == 2 and kinds == {"Rule parse error"}
    if not scanned or not (process.returncode in (0, 1) or unread):
        raise SemgrepFailed
    return said.decode("utf-8", "replace")
