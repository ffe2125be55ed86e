"""The auditor: turns requests into events. What the gate and the engine plugin share in one server process.

Order of a request: judged, begun in the journal, worked on by the engine, its answer judged, its event in the journal,
the last byte of the answer. Guarantee: what `open` returned an `Audit` for has exactly one event in the end; where the
journal can't take a request, `Unaudited` is raised and it must not be worked on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import structlog
from msgspec.structs import replace

from collector.audit import Audit, Blocked, EngineRequest, Unaudited
from collector.chunks import Chunk, chunks, marked, take_out
from collector.context import Caller, Claim, Exchange, Judged, exchange
from collector.doors import Identity
from collector.event import GuardResult, Media, Stage, Status
from collector.guards.protocol import Context, MediaGuard
from collector.guards.stack import GuardStack
from collector.guards.verdicts import worst
from collector.identity import Pseudonyms
from collector.judging import JudgingThreads
from collector.media import Item, listed, verdict_on
from collector.prompt import PromptView, rendered_view
from collector.publisher import Publisher, Ticket
from collector.routes import GateConfig

log = structlog.get_logger(__name__)

STAGES: Final[tuple[Stage, ...]] = ("input", "retrieved", "tool", "output")
CALLERS_MAX: Final = 4_096
"""Callers whose pseudonyms are remembered; sessions never are, since their names may hold text."""
_AT_ONCE_CHARS_MAX: Final = 65_536
"""A prompt up to this takes quick guards some 50 ms at most."""
_NOTHING: Final[Mapping[str, object]] = {}


class Auditor:
    """Judges, begins, finishes and rejects. Thread-safe; holds no text beyond a call."""

    def __init__(
        self,
        publisher: Publisher,
        guards: GuardStack,
        identity: Identity,
        gate: GateConfig,
        *,
        model_version: str,
        weights_digest: str = "",
        threads: JudgingThreads | None = None,
        canary_s: float = 0,
        media_guard: MediaGuard | None = None,
        clock_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`gate.tenant` must be among the tenants of `identity`.

        `threads`: that judge, as many as the guards take requests at a time.
        `canary_s`: how often the guards' health is looked at.
        `media_guard`: judges media for tenants whose policy is `guard`; without one such media are refused.
        """
        self.publisher, self.guards, self.identity, self.gate = publisher, guards, identity, gate
        self._media_guard = media_guard
        self.clock_s = clock_s
        self.threads = threads or JudgingThreads(2, waiting_max=256, wait_s_max=5)
        self._model = {"model_version": model_version, "weights_digest": weights_digest}
        publisher.counters.guards = guards.health
        guards.health.watch(canary_s)
        self.stages = guards.stages
        """The stages that some guard judges."""
        self.judges_prompts = bool(guards.stages - {"output"})
        self._callers: dict[tuple[str, str, str, str], Caller] = {}

    def stop(self, timeout_s: float = 10) -> bool:
        """Stop guards and publisher; False where Kafka has not all events yet and the next start sends them."""
        self.identity.stop()
        self.threads.shutdown()
        self.guards.close()
        return self.publisher.stop(timeout_s)

    def caller(self, tenant: str, *, key_id: str = "", user: str = "", session: str = "", address: str = "") -> Caller:
        """The pseudonyms of names and an address under the tenant's key."""
        names, who = self.identity.names(tenant, user), (tenant, key_id, user, address)
        known = self._callers.get(who)
        if known is not None and known.names is names and not session:
            return known
        caller = Caller(
            tenant=tenant,
            user_id=names.user(user),
            session_id=names.session(session),
            key_id=key_id,
            api_key=names.api_key(key_id),
            client_address=names.address(address),
            key_epoch=names.epoch,
            names=names,
        )
        if not session:
            if len(self._callers) >= CALLERS_MAX:
                self._callers.clear()
            self._callers[who] = caller
        return caller

    def judge(self, view: PromptView, caller: Caller, route: str = "") -> Judged:
        """Verdicts and digests of one prompt. Takes as long as the guards do: run it in a thread where it can be."""
        results: list[GuardResult] = []
        names, system, new = self._names(caller), view.system, view.new
        context = Context(caller.tenant, route, system, view.prompt, names.session)
        if self.judges_prompts:
            texts = [*view.texts(all_roles=self.gate.judge_all_roles), *marked(view, self.gate.markers)]
            results = self.guards.judge(texts, context)
            self.count_errors(results)
        digests = {"turn_hash": names.digest(new), "system_hash": names.digest(system), "minhash": names.minhash(new)}
        return Judged(view, results, self.guards.blocks(results, context), digests, context)

    def sift(self, operation: str, body: dict[str, Any], at_hand: Exchange, views: Sequence[PromptView]) -> None:
        """Take out of a body the chunks that policy wants out of it; `at_hand` is told. Blocking."""
        around = (views[0].system, views[0].prompt) if views else ("", "")
        context = Context(at_hand.caller.tenant, at_hand.route, *around, self._names(at_hand.caller).session)
        found, gone, verdicts = chunks(operation, body, self.gate.markers), list[Chunk](), list[GuardResult]()
        for chunk, (results, _) in zip(
            found, self.judge_each([(chunk.stage, chunk.text) for chunk in found], context), strict=True
        ):
            if self.guards.takes_out(results, context):
                gone.append(chunk)
                verdicts += results
        take_out(gone)
        at_hand.chunks_removed = len(gone)
        at_hand.chunk_verdicts = worst(verdicts)

    def drops(self, caller: Caller, route: str) -> bool:
        """Whether chunks can be taken out of this caller's requests."""
        return self.judges_prompts and self.guards.drops(Context(caller.tenant, route))

    def judge_each(self, texts: Sequence[tuple[Stage, str]], context: Context) -> list[tuple[list[GuardResult], bool]]:
        """For each text its own verdicts, and whether they block. Blocking: run it in a thread."""
        judged = [self.guards.judge([text], context) for text in texts]
        for results in judged:
            self.count_errors(results)
        return [(results, self.guards.blocks(results, context)) for results in judged]

    def judge_media(
        self, found: Sequence[Item], caller: Caller, route: str = "", prompt: str = ""
    ) -> tuple[list[Media], list[GuardResult], bool]:
        """What the event says of them, the verdicts, and whether they may pass by the tenant's policy. Blocking."""
        told = [item.told(self._names(caller).digest) for item in found]
        policy = self.gate.media_policy(caller.tenant)
        if not found or policy != "guard":
            return told, [], not found or policy == "allow"
        if self._media_guard is None:
            return told, [], False
        verdict = verdict_on(found, self._media_guard, Context(caller.tenant, route, prompt=prompt))
        self.count_errors([verdict])
        return told, [verdict], verdict.decision == "allow"

    def _names(self, caller: Caller) -> Pseudonyms:
        return caller.names or self.identity.names(caller.tenant)

    def count_errors(self, results: Sequence[GuardResult]) -> None:
        """Guards that failed are counted in the heartbeats."""
        for result in results:
            if result.decision == "error":
                self.publisher.counters.guard_error(result.guard)

    def claim(self, text: str | None) -> Claim:
        """What the gate says of the engine request that is made now."""
        at_hand = exchange.get()
        return Claim() if at_hand is None else at_hand.claim(text)

    def at_once(self, text: str | None, claim: Claim) -> bool:
        """Whether `judged` is quick enough for an event loop."""
        return claim.fits or not self.judges_prompts or (self.guards.quick and len(text or "") <= _AT_ONCE_CHARS_MAX)

    def judged(self, text: str | None, claim: Claim) -> Judged:
        """What the gate says of this very prompt. Where the engine is given another, that is judged too: it must pass
        both, whichever of the gate's prompts it is. What the gate read stays what digests and answers are about.
        """
        if claim.judged is not None and claim.fits:
            return claim.judged
        at_hand = exchange.get()
        if at_hand is None:
            return self.judge(rendered_view(text or ""), self.caller(self.gate.tenant))
        whole = self.judge(rendered_view(text or ""), at_hand.caller, at_hand.route)
        every = [*at_hand.prompts, whole]
        verdicts = worst([verdict for judged in every for verdict in judged.verdicts])
        blocked = any(judged.blocked for judged in every)
        told, around = claim.judged or whole, claim.judged or every[0]
        return Judged(whole.view, verdicts, blocked, told.digests, around.context)

    def open(self, request: EngineRequest, judged: Judged | None = None) -> Audit:
        """Begin one engine request. Raises `Blocked` where a guard blocked it, `Unaudited` where it can't be begun.

        `judged`: where it was judged before; else that is done here.
        """
        at_hand = exchange.get()
        caller = at_hand.caller if at_hand is not None else self.caller(self.gate.tenant)
        started_s = at_hand.started_s if at_hand is not None and at_hand.started_s else self.clock_s()
        judged = judged or self.judged(request.text, self.claim(request.text))
        known = self._known(request, caller, judged, at_hand)
        try:
            ticket = self.publisher.begin(key=caller.key, known=known)
        except Exception as error:  # noqa: BLE001 - whatever fails here, nothing goes on unaudited
            raise _unaudited("a request can't be begun in the journal and is refused", error) from None
        self.publisher.counters.engine_requests += 1
        if at_hand is not None:
            at_hand.engine_requests += 1
        lease = at_hand.lease if at_hand is not None else None
        audit = Audit(self, ticket, known, started_s, lease=lease, context=judged.context)
        if reason := self._refusal(request, judged, caller.tenant, at_hand):
            audit.close("blocked_input", http_status=403, reason=reason)
            raise Blocked
        return audit

    def _refusal(self, request: EngineRequest, judged: Judged, tenant: str, at_hand: Exchange | None) -> str:
        """Why an engine request that was begun must not go on; empty where it may."""
        if judged.blocked:
            return "guard"
        if request.adapter_refused:
            return "adapter"
        seen = 0 if at_hand is None else len(at_hand.media)
        if len(request.media) > seen and self.gate.media_policy(tenant) != "allow":
            return "media"  # no gate has seen all of it and asked for it
        if request.text is None and self.judges_prompts:
            return "unreadable"
        return ""

    def _known(
        self, request: EngineRequest, caller: Caller, judged: Judged, at_hand: Exchange | None
    ) -> dict[str, object]:
        digest = self._names(caller).digest
        media, verdicts = [replace(each, digest=digest(each.digest)) for each in request.media], judged.verdicts
        if at_hand is not None and at_hand.media:
            media, verdicts = list(at_hand.media), [*verdicts, *at_hand.media_verdicts]
        if at_hand is not None and at_hand.chunk_verdicts:
            verdicts = worst([*verdicts, *at_hand.chunk_verdicts])
        known: dict[str, object] = {
            **caller.fields(),
            **self._model,
            **judged.digests,
            **listed(media),
            "prompt_hash": digest(request.text or ""),
            "guardrail_results": list(verdicts)[:64],
            "view": judged.view.view,
            "operation": request.operation,
            "prompt_tokens": request.prompt_tokens,
            "max_tokens": request.max_tokens,
            "n": request.n,
            "stream": request.stream,
        }
        if request.adapter is not None:
            known["adapter"] = request.adapter
        if request.model_version:
            known |= {"model_version": request.model_version, "weights_digest": request.weights_digest}
        if at_hand is not None:
            known["http_request_id"] = at_hand.http_request_id
            known["chunks_removed"] = at_hand.chunks_removed
            known["route"] = at_hand.route
            known["trace_id"] = at_hand.trace_id
            known["operation"] = at_hand.operation or request.operation
        return known

    def finish(self, ticket: Ticket, fields: Mapping[str, object]) -> None:
        """Write the event of a ticket. Raises `Unaudited` where that fails."""
        try:
            self.publisher.finish(ticket, **fields)
        except Exception as error:  # noqa: BLE001 - as above
            raise _unaudited("an event can't be written to the journal and its answer is withheld", error) from None

    def reject(
        self,
        at_hand: Exchange,
        *,
        reason: str,
        http_status: int,
        status: Status = "rejected",
        verdicts: Sequence[GuardResult] = (),
        told: Mapping[str, object] = _NOTHING,
    ) -> None:
        """Write the event of an HTTP request that the engine never saw, once. Raises `Unaudited`.

        `told`: more fields.
        """
        if at_hand.rejected:
            return
        latency_s = self.clock_s() - at_hand.started_s if at_hand.started_s else 0.0
        try:
            self.publisher.reject(
                key=at_hand.caller.key,
                **at_hand.caller.fields(),
                **self._model,
                status=status,
                reason=reason,
                http_status=http_status,
                http_request_id=at_hand.http_request_id,
                route=at_hand.route,
                operation=at_hand.operation,
                trace_id=at_hand.trace_id,
                latency_ms=max(0.0, latency_s * 1000),
                guardrail_results=[*at_hand.media_verdicts, *at_hand.chunk_verdicts, *verdicts],
                chunks_removed=at_hand.chunks_removed,
                **listed(at_hand.media),
                **told,
            )
        except Exception as error:  # noqa: BLE001 - as above
            raise _unaudited("a rejection can't be written to the journal", error) from None
        at_hand.rejected = True


def _unaudited(what: str, error: Exception) -> Unaudited:
    """Log what failed by the class of the error, never its message or trace: they may quote values."""
    log.error(what, error=type(error).__name__)
    return Unaudited()
