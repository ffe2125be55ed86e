"""What the gate tells the engine plugin about the HTTP request at hand, carried by a context variable."""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from collector.event import GuardResult, Media
from collector.guards.protocol import Context
from collector.identity import Principal, Pseudonyms
from collector.limits import Lease
from collector.prompt import PromptView


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asked: a tenant's name and pseudonyms, empty where nothing is known."""

    tenant: str
    user_id: str = ""
    session_id: str = ""
    key_id: str = ""
    api_key: str = ""
    client_address: str = ""
    key_epoch: str = ""
    names: Pseudonyms | None = field(default=None, repr=False, compare=False)
    """Under whose key all digests of the request are: that of its start, though the key may change meanwhile."""

    @property
    def key(self) -> str:
        """The Kafka key of the caller's events: user, else API key, else address."""
        return self.user_id or self.api_key or self.client_address

    def fields(self) -> dict[str, object]:
        """As fields of an event."""
        return {
            "tenant": self.tenant,
            "user_id": self.user_id,
            "session_id": self.session_id,
            "key_id": self.key_id,
            "api_key": self.api_key,
            "client_address": self.client_address,
            "key_epoch": self.key_epoch,
        }


NOBODY: Final = Caller("")
"""Until the key has been looked at."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One prompt with its verdicts and digests."""

    view: PromptView = field(repr=False)
    verdicts: Sequence[GuardResult]
    blocked: bool
    digests: Mapping[str, str]
    """turn_hash, system_hash and minhash."""
    context: Context = field(repr=False)
    """For the guards that judge the answer."""


@dataclass(slots=True)
class Exchange:
    """One HTTP request on its way through."""

    http_request_id: str
    caller: Caller
    principal: Principal | None = None
    """Whoever was let in."""
    lease: Lease | None = None
    """What it uses of its limits."""
    route: str = "unlisted"
    operation: str = ""
    body_bytes: int = 0
    """Read of its body."""
    started_s: float = 0.0
    """When its body had been read, on the performance counter: what the client takes to send it is not our latency."""
    prompts: Sequence[Judged] = ()
    media: Sequence[Media] = ()
    """What its body holds beside text; it was allowed."""
    media_verdicts: Sequence[GuardResult] = ()
    chunks_removed: int = 0
    """Chunks that a guard took out of it."""
    chunk_verdicts: Sequence[GuardResult] = ()
    """Why."""
    engine_requests: int = 0
    """Engine requests that were begun for it; each has its event."""
    claimed: int = 0
    """Engine requests that have asked for the gate's verdict."""
    rejected: bool = False
    client_gone: bool = False
    trace_id: str = ""

    def claim(self, rendered: str | None) -> "Claim":
        """The gate's verdict for the next engine request: the server makes them in the order of the body's prompts."""
        place, self.claimed = self.claimed, self.claimed + 1
        judged = self.prompts[place] if place < len(self.prompts) else None
        return Claim(judged, judged is not None and rendered is not None and judged.view.within(rendered))


class Claim(NamedTuple):
    """What the gate says of one engine request."""

    judged: Judged | None = None
    """Of the prompt at its place in the body."""
    fits: bool = False
    """That is the very prompt that the engine is given."""


exchange: ContextVar[Exchange | None] = ContextVar("inferwatch_exchange", default=None)
"""The HTTP request that the running task works for; None outside the gate."""
