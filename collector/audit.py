"""The audit of one engine request, from its begin to its event, and what the engine's side tells of it.

`collector.auditor` opens it; whoever does the work closes it, once.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from collector.answers import Answer
from collector.event import Adapter, GuardResult, Media, Status
from collector.guards.protocol import ALONE, Context
from collector.guards.stack import Holding
from collector.limits import Lease
from collector.publisher import Ticket
from collector.reconcile import Tally

if TYPE_CHECKING:
    from collector.auditor import Auditor


class Blocked(Exception):
    """Policy blocked the request. Its event is written. The message is for the client."""

    def __init__(self) -> None:
        super().__init__("This request was blocked by policy.")


class Unaudited(Exception):
    """The request can't be audited, so it must not be answered. The message is for the client."""

    def __init__(self) -> None:
        super().__init__("The request can't be audited at the moment, so it is not answered. Try again later.")


class EngineRequest(NamedTuple):
    """What is known of an engine request before the engine sees it."""

    operation: str
    """generate or encode; the gate's operation goes before it."""
    text: str | None
    """The prompt as the engine reads it; None where it is no text (embeddings)."""
    prompt_tokens: int = 0
    max_tokens: int = 0
    n: int = 1
    stream: bool = False
    adapter: Adapter | None = None
    model_version: str = ""
    """Where one process serves several models; empty: the process's own."""
    weights_digest: str = ""
    adapter_refused: bool = False
    """The adapter is not among those that may answer."""
    media: tuple[Media, ...] = ()
    """What the engine was given beside text."""

    def __repr__(self) -> str:
        return f"EngineRequest({self.operation}, {self.prompt_tokens} tokens)"


class Counted(NamedTuple):
    """What an event needs of an answer."""

    token_count: int
    finish_reason: str


class Timing(NamedTuple):
    """What the engine measured of one request; None where it did not."""

    ttft_ms: float | None = None
    queue_ms: float | None = None
    ms_per_output_token: float | None = None


_UNTIMED: Final = Timing()
_NOTHING: Final[Mapping[str, object]] = {}


class Audit:
    """One engine request that was begun. `close` it once; later calls change nothing."""

    __slots__ = (
        "_auditor",
        "_context",
        "_known",
        "_lease",
        "_started_s",
        "_tally",
        "_ticket",
        "closed",
        "first_token_s",
        "generated",
        "request_id",
    )

    def __init__(
        self,
        auditor: "Auditor",
        ticket: Ticket,
        known: Mapping[str, object],
        started_s: float,
        *,
        lease: Lease | None = None,
        context: Context = ALONE,
    ) -> None:
        self._auditor, self._ticket, self._known, self._started_s = auditor, ticket, known, started_s
        self._lease, self._context = lease, context
        self._tally: Tally | None = None
        self.request_id = ""
        """As the engine was given it."""
        self.generated: int | None = None
        """Tokens, where more is known than the answer shows."""
        self.first_token_s = 0.0
        self.closed = False

    def begin_in_engine(self, tally: Tally, request_id: str) -> None:
        """The request is handed to the engine under this id: its own count will have it."""
        self._tally, self.request_id = tally, request_id
        tally.begin(request_id)

    def saw_tokens(self) -> None:
        """Tokens arrived: the first time counts where the engine measures none itself."""
        if not self.first_token_s:
            self.first_token_s = self._auditor.clock_s()

    def holding(self) -> Holding:
        """How the answer is to be held back."""
        return self._auditor.guards.holding(self._context)

    def judge(
        self, texts: Sequence[str], guards: frozenset[str] | None = None, *, others: bool = False
    ) -> tuple[list[GuardResult], bool]:
        """The verdicts on an answer's texts and whether they block it. Blocking: run it in a thread.

        `guards`: those that judge, or with `others` those that do not; None: all.
        """
        results = self._auditor.guards.judge(
            [("output", text) for text in texts],
            self._context,
            guards=lambda name: guards is None or (name in guards) is not others,
        )
        self._auditor.count_errors(results)
        return results, self._auditor.guards.blocks(results, self._context)

    def close(
        self,
        status: Status,
        *,
        answer: Answer | Counted | None = None,
        verdicts: Sequence[GuardResult] = (),
        timing: Timing = _UNTIMED,
        generated: int | None = None,
        reason: str = "",
        http_status: int = 0,
        told: Mapping[str, object] = _NOTHING,
    ) -> None:
        """Write the event; `told`: fields learnt only from the answer.

        `generated`: tokens that the engine had generated, where the answer shows fewer.
        Raises `Unaudited` where that fails: then the answer must not leave.
        """
        if self.closed:
            return
        fields: dict[str, object] = {
            "status": status,
            "blocked": status in ("blocked_input", "blocked_output"),
            "reason": reason,
            "http_status": http_status,
            "latency_ms": max(0.0, (self._auditor.clock_s() - self._started_s) * 1000),
            **told,
        }
        if answer is not None:
            fields |= {"response_tokens": answer.token_count, "finish_reason": answer.finish_reason}
        generated = self.generated if generated is None else generated
        if generated is not None:
            fields["response_tokens"] = max(generated, answer.token_count if answer is not None else 0)
        if verdicts:
            judged = self._known["guardrail_results"]
            assert isinstance(judged, list)  # noqa: S101 - set by `Auditor.open`, for the type checker
            fields["guardrail_results"] = [*judged, *verdicts][:64]
        if timing.ttft_ms is None and self.first_token_s:
            timing = timing._replace(ttft_ms=(self.first_token_s - self._started_s) * 1000)
        for name, value in zip(Timing._fields, timing, strict=True):
            if value is not None:
                fields[name] = max(0.0, value)
        self._auditor.finish(self._ticket, fields)
        self.closed = True
        if self._tally is not None:
            self._tally.close(self.request_id)
        if self._lease is not None and status != "blocked_input":
            read = told.get("prompt_tokens", self._known["prompt_tokens"])
            tokens = int(str(read)) + int(str(fields.get("response_tokens", 0)))
            self._lease.spend(tokens, self._auditor.identity.monotonic_s())
