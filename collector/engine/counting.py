"""The engine's own counts: a stat logger for what it finished, and the tokens that an abort leaves behind.

The stat logger is handed to the engine as its own argument `stat_loggers` rather than by vLLM's entry point for them:
an entry point can't be inert, since vLLM switches its statistics on wherever one is installed.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Final

from vllm.v1.metrics.loggers import StatLoggerBase

from collector.engine.process import current


class EngineCount(StatLoggerBase):  # type: ignore[misc]  # vllm has no types
    """Counts finished requests apart from the wrapper (`collector.reconcile`)."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        """As vLLM makes it, one for each engine core."""

    def record(self, _scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """One step's statistics; vLLM passes the first two by place."""
        if iteration_stats is not None:
            for finished in iteration_stats.finished_requests:
                current.tally.finish(finished.request_id)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    """`AsyncLLM.__init__`, with one more stat logger."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["stat_loggers"] = [*(kwargs.get("stat_loggers") or ()), EngineCount]
        original(self, *args, **kwargs)

    return init


def counted(engine: Any) -> bool:
    """Whether our stat logger is among the engine's."""
    manager = getattr(engine, "logger_manager", None)
    for logger in getattr(manager, "stat_loggers", ()):
        parts = getattr(logger, "per_engine_stat_loggers", {})
        if any(isinstance(part, EngineCount) for part in (parts.values() if isinstance(parts, dict) else parts)):
            return True
    return False


ABORTED_MAX: Final = 4096
_aborted: Final[dict[str, list[int]]] = {}


def wrap_abort_requests(original: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """`OutputProcessor.abort_requests`: notes how far each request had come, which nobody can ask afterwards."""

    within: set[int] = set()  # of processors that abort the choices of a request, by calling this again

    @functools.wraps(original)
    def abort_requests(self: Any, request_ids: Iterable[str], internal: bool) -> list[str]:
        ids = list(request_ids)
        if id(self) in within:
            return original(self, ids, internal)
        for name, tokens in _progress(self, ids, internal).items():
            if len(_aborted) >= ABORTED_MAX:
                del _aborted[next(iter(_aborted))]
            _aborted.setdefault(name, []).append(tokens)
        within.add(id(self))
        try:
            return original(self, ids, internal)
        finally:
            within.discard(id(self))

    return abort_requests


def _progress(processor: Any, ids: Iterable[str], internal: bool) -> dict[str, int]:
    """Tokens generated so far, by the id that the wrapper knows; choices added up."""
    found: dict[str, int] = {}
    for request_id in ids:
        names = [request_id] if internal else processor.external_req_ids.get(request_id, ())
        for name in names:
            parent = processor.parent_requests.get(name)
            for done in [] if parent is None else filter(None, parent.output_aggregator):
                owner = parent.external_req_id
                found[owner] = found.get(owner, 0) + len(done.token_ids)
            for child in [name] if parent is None else parent.child_requests:
                state = processor.request_states.get(child)
                if state is not None:
                    tokens = 0 if state.detokenizer is None else state.detokenizer.num_output_tokens()
                    found[state.external_req_id] = found.get(state.external_req_id, 0) + tokens
    return found


def aborted_tokens(request_id: str) -> int | None:
    """What an aborted request had generated; None where none of this id was aborted. Asked once for each."""
    counts = _aborted.get(request_id)
    if not counts:
        return None
    tokens = counts.pop(0)
    if not counts:
        del _aborted[request_id]
    return tokens
