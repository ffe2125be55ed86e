"""The vLLM plugin: every engine request is begun in the journal before the engine sees it and has its event after.

The only folder that imports vllm. `install` wraps `AsyncLLM.generate` and `encode`, the one road that all HTTP routes
of the server and `run-batch` take, `LLMEngine.add_request`, `step` and `abort_request`, the road of the offline `LLM`,
and beam search, which is one request to the client and many to the engine. Arguments are passed through as they come:
the first three of `generate` were the same in all versions from 0.10.2 to 0.33.0. vLLM runs plugins in each of its
processes; only the one that takes requests ever calls these methods, so only there an auditor is opened.

All wrappers are plain functions: a blocked request raises before the HTTP answer has begun, for streams too. Whatever
fails in here fails the request: there is no answer without its event.
"""

from typing import Any, Final

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.engine.output_processor import OutputProcessor

from collector.auditor import Auditor
from collector.engine import beam, counting, offline, online
from collector.engine.process import MARK, Opener, current
from collector.engine.selftest import selftest

__all__ = ["active", "auditor_for", "close", "install", "run_command_line", "selftest"]

_WRAPS: Final[dict[type, dict[str, Any]]] = {
    AsyncLLM: {
        "__init__": counting.wrap_init,
        "generate": online.wrap_generate,
        "encode": online.wrap_encode,
        "add_lora": online.wrap_add_lora,
    },
    LLMEngine: {
        "add_request": offline.wrap_add_request,
        "step": offline.wrap_step,
        "abort_request": offline.wrap_abort_request,
    },
    OutputProcessor: {"abort_requests": counting.wrap_abort_requests},
    beam.Online: {"beam_search": beam.wrap_online},
    beam.Offline: {"beam_search": beam.wrap_offline},
}


def install(opener: Opener) -> None:
    """Wrap the engine's methods; called again, nothing is wrapped twice."""
    current.opener = opener
    for owner, wraps in _WRAPS.items():
        for name, wrap in wraps.items():
            method = getattr(owner, name)
            if not hasattr(method, MARK):
                wrapped = wrap(method)
                setattr(wrapped, MARK, True)
                setattr(owner, name, wrapped)


def active(engine: object) -> bool:
    """Whether all roads into this engine are wrapped, and its own count of finished requests is kept."""
    wrapped = all(hasattr(getattr(owner, name), MARK) for owner, wraps in _WRAPS.items() for name in wraps)
    return wrapped and isinstance(engine, AsyncLLM) and counting.counted(engine)


def auditor_for(engine: object) -> Auditor:
    """This process's auditor for a gate, opened on the first call: blocking, some seconds. Seals the adapters.

    Raises RuntimeError where the plugin is not active, and what the opener raises.
    """
    if not active(engine):
        raise RuntimeError(
            "inferwatch's plugin is not active in this vLLM: set INFERWATCH_CONFIG, and let VLLM_PLUGINS, "
            "where it is set, name inferwatch; the server does not start without it"
        )
    current.adapters.seal()
    return current.open(engine)


def close() -> None:
    """Stop this process's publisher with its goodbyes. Once; engine requests after it are refused."""
    current.close()


def run_command_line() -> None:
    """vLLM's own command line, as `sys.argv` has it; returns when the server has ended."""
    from vllm.entrypoints.cli.main import main  # noqa: PLC0415 - it loads the whole server

    main()
