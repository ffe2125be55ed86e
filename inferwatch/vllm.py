"""The two names that vLLM loads: `register` (its plugin) and `Gate` (`--middleware inferwatch.vllm.Gate`).

`register` does nothing unless `INFERWATCH_CONFIG` names a configuration, so installing inferwatch changes no vLLM. A
server that was asked for the gate and can't have it does not start.
"""

import os
import sys
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from inferwatch.settings import CONFIG_VARIABLE

failure: str | None = None
"""Why the gate did not open, for whoever runs the server in this process: vLLM itself then ends with status 0."""


def register() -> None:
    """Called by vLLM in each of its processes: puts the audit round the engine, and keeps prompts out of crash dumps.

    Raises ServeRefused where this vLLM would open a road that has no gate; what a plugin raises stops the process.
    """
    if os.environ.get(CONFIG_VARIABLE):
        from collector import cores  # noqa: PLC0415 - nothing of ours is loaded where we are not wanted
        from collector.engine import install  # noqa: PLC0415
        from inferwatch.refused import check_process  # noqa: PLC0415

        check_process(sys.argv, os.environ)
        cores.forbid()
        install(_open)


def _open(model: Any) -> Any:
    """The auditor of this process, by the configuration."""
    from collector.startup import open_auditor  # noqa: PLC0415
    from inferwatch.config import load  # noqa: PLC0415

    config = load()
    return open_auditor(config.kafka, config.collector, model, config_digest=config.digest())


class Gate:
    """The gate as vLLM makes it: an ASGI middleware class that takes the app."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        from collector import gate  # noqa: PLC0415

        self._gate = gate.Gate(app, auditor=_auditor, stop=_stop, selftest=_selftest)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """One ASGI connection."""
        await self._gate(scope, receive, send)


def _engine(scope: MutableMapping[str, Any]) -> Any:
    return getattr(getattr(scope.get("app"), "state", None), "engine_client", None)


@contextmanager
def _told() -> Iterator[None]:
    """What stops the gate is kept for whoever runs the server in this process."""
    global failure  # noqa: PLW0603 - one server a process, and vLLM gives no other way back
    try:
        yield
    except Exception as error:
        failure = str(error) or type(error).__name__
        raise


def _auditor(scope: MutableMapping[str, Any]) -> Any:
    """The auditor for the engine behind the app. Raises ServeRefused, RuntimeError where the plugin is not round it."""
    from collector.engine import auditor_for  # noqa: PLC0415
    from inferwatch.refused import check_arguments, check_environment  # noqa: PLC0415

    with _told():
        check_environment(os.environ)
        check_arguments(getattr(getattr(scope.get("app"), "state", None), "args", None))
        return auditor_for(_engine(scope))


async def _selftest(scope: MutableMapping[str, Any], auditor: Any) -> None:
    """One audited request through the real engine. Raises SelfTestFailed."""
    from collector.engine import selftest  # noqa: PLC0415

    with _told():
        await selftest(_engine(scope), auditor)


def _stop() -> None:
    from collector.engine import close  # noqa: PLC0415

    close()
