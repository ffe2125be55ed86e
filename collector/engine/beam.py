"""Beam search, online and offline: one event for each prompt, whatever number of engine requests it takes.

vLLM runs it above the engine: for each token it asks the engine once for every beam, and gives the beams at the end. So
the whole answer is at hand before any of it leaves, and is judged like any other. A search's steps are begun in the
tally, so that the engine's own count agrees, and have no events. `response_tokens` are those of the beams that are
given; of an aborted search those that the engine has generated.
"""

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin as Offline
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin as Online

from collector.answers import Answer
from collector.audit import Audit, Blocked
from collector.auditor import Auditor
from collector.engine.calls import Call, decode, engine_request, refusing
from collector.engine.online import answered, close_quietly, judged_first
from collector.engine.process import current
from collector.engine.steps import Search, part_of
from collector.event import GuardResult, Status

__all__ = ["Offline", "Online", "wrap_offline", "wrap_online"]

Generator = AsyncGenerator[Any, None]


def wrap_online(original: Callable[..., Generator]) -> Callable[..., Generator]:
    """`BeamSearchOnlineMixin.beam_search`."""

    @functools.wraps(original)
    def beam_search(
        self: Any, prompt: Any, request_id: str, params: Any, lora_request: Any = None, *rest: Any, **more: Any
    ) -> Generator:
        inner = original(self, prompt, request_id, params, lora_request, *rest, **more)
        with refusing:
            engine = self.engine_client
            auditor = current.auditor or current.open(engine)
            call = Call(prompt, params, request_id, lora_request)
            request = engine_request(engine, "beam_search", call)._replace(n=params.beam_width)
            answer, search = Answer("final", keep_text="output" in auditor.stages), Search(current.tally)

            def begun(audit: Audit) -> Generator:
                return answered(_searched(inner, search, audit), audit, answer, auditor)

            return judged_first(auditor, request, begun)

    return beam_search


async def _searched(inner: Generator, search: Search, audit: Audit) -> Generator:
    """The search's only output. It runs in a task of its own, so that the mark reaches its steps and nothing else."""

    async def run() -> list[Any]:
        part_of.set(search)
        return [output async for output in inner]

    try:
        outputs = await asyncio.create_task(run())
    except asyncio.CancelledError:
        audit.generated = search.tokens
        raise
    for output in outputs:
        output.finished = output is outputs[-1]
        yield output


def wrap_offline(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """`LLM.beam_search`: the prompts of a call search together, each has its event. Raises Blocked, Unaudited."""

    @functools.wraps(original)
    def beam_search(self: Any, prompts: Sequence[Any], params: Any, *rest: Any, **more: Any) -> list[Any]:
        engine = self.llm_engine
        auditor = current.auditor or current.open(engine)
        adapters = rest[0] if rest else more.get("lora_request")
        rendered = self._preprocess_cmpl(prompts)
        audits: list[Audit] = []
        status: Status = "error"
        token = part_of.set(Search(current.tally))
        try:
            for place, prompt in enumerate(rendered):
                adapter = adapters[place] if isinstance(adapters, Sequence) else adapters
                request = engine_request(engine, "beam_search", Call(prompt, params, "", adapter))
                audits.append(auditor.open(request._replace(n=params.beam_width)))
            outputs = original(self, prompts, params, *rest, **more)
            for audit, prompt, output in zip(audits, rendered, outputs, strict=True):
                _close(auditor, audit, output.sequences, len(prompt["prompt_token_ids"]), engine)
        except (Blocked, KeyboardInterrupt):
            status = "aborted"
            raise
        finally:
            part_of.reset(token)
            for audit in audits:
                close_quietly(audit, status, reason="the search ended early")
        return outputs

    return beam_search


def _close(auditor: Auditor, audit: Audit, beams: Sequence[Any], prompt_tokens: int, engine: Any) -> None:
    """Judge the beams of one prompt, without the prompt that they repeat, and write the event."""
    answers = [beam.tokens[prompt_tokens:] for beam in beams]
    verdicts: list[GuardResult] = []
    blocked = False
    if "output" in auditor.stages:
        verdicts, blocked = audit.judge([decode(engine, tokens) for tokens in answers])
    audit.generated = sum(map(len, answers))
    if blocked:
        for beam in beams:
            beam.tokens, beam.logprobs, beam.text = beam.tokens[:prompt_tokens], [], auditor.gate.blocked_text
    audit.close("blocked_output" if blocked else "ok", verdicts=verdicts, http_status=200)
