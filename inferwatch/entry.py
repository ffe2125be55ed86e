"""The entry point `inferwatch`: how a failure is told, and a short way to a sidecar's start.

Requests wait for a sidecar that was killed, and most of its start was loading what it has no use for. So `guards serve`
loads its own part of the configuration and nothing else. Every other command goes the long way, and so does each
mistake, which the whole configuration can put into a sentence.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collector.guards.config import GuardsConfig


def main() -> None:
    """A failure is one sentence on standard error and exit status 1; 130 after Ctrl-C."""
    match sys.argv[1:]:
        case ["guards", "serve"]:
            telling(lambda: _serve(None))
        case ["guards", "serve", "--config" | "-c", file]:
            telling(lambda: _serve(Path(file)))
        case _:
            _whole()


def telling(run: Callable[[], object]) -> None:
    """Runs; a failure is one sentence on standard error and exit status 1; 130 after Ctrl-C."""
    _log_to_stderr()
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("INFERWATCH_TRACEBACK"):
            raise
        known = isinstance(error, ValueError | OSError | RuntimeError)
        said = str(error) if known and str(error) else f"{type(error).__name__}: {error}"
        hint = "" if known else " (INFERWATCH_TRACEBACK=1 shows where)"
        sys.stderr.write(f"inferwatch: {said}{hint}\n")
        sys.exit(1)


def _log_to_stderr() -> None:
    """Standard output is for answers; logs are plain lines elsewhere, without colours in a file."""
    structlog.configure(
        processors=[
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.add_log_level,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(os.environ.get("INFERWATCH_LOG_LEVEL", "info")),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _whole() -> None:
    from inferwatch.cli import main as whole  # noqa: PLC0415 - loads all commands

    whole()


def _serve(file: Path | None) -> None:
    from collector.guards.sidecar import run_sidecar  # noqa: PLC0415 - the sidecar alone

    try:
        guards = guards_of(file)
    except ValueError:
        _whole()
    else:
        run_sidecar(guards)


def guards_of(file: Path | None) -> "GuardsConfig":
    """`[collector.guards]` as `inferwatch.config.load` reads it; keys elsewhere may be any. Raises ValueError."""
    from pydantic import BaseModel  # noqa: PLC0415 - the sidecar alone
    from pydantic_settings import SettingsConfigDict  # noqa: PLC0415

    from collector.guards.config import GuardsConfig  # noqa: PLC0415
    from inferwatch.settings import Settings, tables  # noqa: PLC0415

    class Collector(BaseModel):
        guards: GuardsConfig = GuardsConfig()

    class Part(Settings):
        model_config = SettingsConfigDict(extra="ignore")
        collector: Collector = Collector()

    return Part(**tables(file)[1]).collector.guards
