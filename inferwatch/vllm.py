"""The two names that vLLM loads: `register` (its plugin) and `Gate` (`--middleware inferwatch.vllm.Gate`).

`register` does nothing unless `INFERWATCH_CONFIG` names a configuration, so installing inferwatch changes no vLLM. A
server that was asked for the gate and can't have it does not start.
"""

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from inferwatch.config import CONFIG_VARIABLE

failure: str | None = None
"""Why the gate did not open, for whoever runs the server in this process: vLLM itself then ends with status 0."""


def register() -> None:
    """Called by vLLM in each of its processes: puts the audit round the engine."""
    if os.environ.get(CONFIG_VARIABLE):
        from collector.engine import install  # noqa: PLC0415 - nothing of ours is loaded where we are not wanted

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

        self._gate = gate.Gate(app, auditor=_auditor, stop=_stop)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """One ASGI connection."""
        await self._gate(scope, receive, send)


def _auditor(scope: MutableMapping[str, Any]) -> Any:
    """The auditor for the engine behind the app. Raises RuntimeError where the plugin is not round it."""
    global failure  # noqa: PLW0603 - one server a process, and vLLM gives no other way back
    from collector.engine import auditor_for  # noqa: PLC0415

    try:
        return auditor_for(getattr(getattr(scope.get("app"), "state", None), "engine_client", None))
    except Exception as error:
        failure = str(error) or type(error).__name__
        raise


def _stop() -> None:
    from collector.engine import close  # noqa: PLC0415

    close()
