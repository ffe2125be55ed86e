"""The steps of a beam search: to the engine a request for each beam and token, to the audit parts of one request."""

from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import Any

from collector.reconcile import Tally


class Search:
    """One running beam search, or several that step together. Its steps are known to the tally and have no events."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self.tokens = 0
        """Tokens of all beams that the engine has generated."""

    async def step(self, inner: AsyncGenerator[Any, None], request_id: str) -> AsyncGenerator[Any, None]:
        """One beam's step on the server's road, passed through and counted."""
        self._tally.begin(request_id)
        try:
            async for output in inner:
                self.saw(output)
                yield output
        finally:
            self._tally.close(request_id)
            await inner.aclose()

    def saw(self, output: Any) -> None:
        """A step's output."""
        self.tokens += sum(len(choice.token_ids) for choice in output.outputs)


part_of: ContextVar[Search | None] = ContextVar("inferwatch_search", default=None)
"""The search that an engine request of the running task belongs to."""
