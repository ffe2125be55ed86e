"""An answer on its way out, past the guards on answers: which of its pieces may leave when.

Three ways, by the guards that judge for this tenant and route (`GuardStack.holding`): at once where none can block, by
a window where each of those that can is able to judge in pieces (`collector.holdback`), else not before the whole
answer was judged. Guarantee: a piece leaves only once every window that it lies in was judged and passed. Judging runs
on the auditor's threads; meanwhile this one answer waits, and no other.
"""

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from collector.audit import Audit
from collector.auditor import Auditor
from collector.event import GuardResult
from collector.guards.verdicts import worst
from collector.holdback import HoldBack, Mark, Piece

T = TypeVar("T")


class Watch(Generic[T]):
    """One answer's outputs or frames, in order. `cumulative`: each piece is its text from the beginning.

    `windows` is False where an answer can't be judged in pieces; `slack` as of `HoldBack`. `audit`: None where nothing
    is judged.
    """

    def __init__(
        self, auditor: Auditor, audit: Audit | None, *, cumulative: bool = False, windows: bool = True, slack: int = 0
    ) -> None:
        self._auditor, self._audit, self._cumulative = auditor, audit, cumulative
        gate, holding = auditor.gate, audit.holding() if audit is not None else None
        holds = holding is not None and holding.blocks and gate.hold_streams
        need = holding.window_chars if holding is not None else None
        windowed = holds and windows and gate.hold_back_chars > 0 and need is not None
        self._stepwise = holding.stepwise if windowed and holding is not None else frozenset[str]()
        self._hold = HoldBack(max(gate.hold_back_chars, need or 0), slack=slack) if windowed else None
        self._shut = holds and not windowed
        self._lengths: dict[Hashable, int] = {}
        self._out: dict[Hashable, int] = {}
        self._held: deque[tuple[T, list[Mark]]] = deque()
        self._verdicts: list[GuardResult] = []
        self.blocked = False

    def put(self, item: T, pieces: Iterable[Piece] = (), *, ended: Iterable[int] = ()) -> None:
        """One more output or frame with its texts. `ended`: choices that are at their end with it."""
        self._held.append((item, [self._grow(piece) for piece in pieces]))
        for group in ended if self._hold is not None else ():
            self._hold.end(group)  # type: ignore[union-attr]  # asked one line above

    def _grow(self, piece: Piece) -> Mark:
        if self._hold is not None:
            return (self._hold.grown_to if self._cumulative else self._hold.grow)(*piece)
        before = 0 if self._cumulative else self._lengths.get(piece.key, 0)
        self._lengths[piece.key] = before + len(piece.text)
        return Mark(piece.key, self._lengths[piece.key])

    def shut(self) -> None:
        """The answer's end is near: what is held, and all that comes, waits for `judge`."""
        self._shut = True

    async def ready(self) -> list[T]:
        """What may leave now, judging first where enough has come; nothing once `blocked`."""
        hold = self._hold
        if self._shut or self.blocked:
            return []
        if hold is not None and hold.due and self._audit is not None:
            windows = hold.windows()
            if windows:
                judged = await self._auditor.threads.run(self._audit.judge, windows, self._stepwise)
                self._keep(*judged)
            if self.blocked:
                return []
            hold.pass_()
        free = []
        while self._held and (hold is None or hold.free(self._held[0][1])):
            item, marks = self._held.popleft()
            self._out.update(marks)
            free.append(item)
        return free

    async def judge(self, texts: Sequence[str]) -> tuple[list[GuardResult], bool]:
        """At the end: the verdicts on the whole answer, `texts`, and whether it is blocked."""
        if self._audit is None:
            return [], False
        if self._hold is None:
            self._keep(*await self._auditor.threads.run(self._audit.judge, texts))
        elif not self.blocked:
            rest = self._hold.rest() or ([] if self._verdicts else texts)
            audit, stepwise = self._audit, self._stepwise

            def both() -> tuple[list[GuardResult], bool]:
                last, blocked = audit.judge(rest, stepwise)
                others, also = audit.judge(texts, stepwise, others=True)
                return [*last, *others], blocked or also

            self._keep(*await self._auditor.threads.run(both))
        return self._verdicts, self.blocked

    @property
    def verdicts(self) -> list[GuardResult]:
        """So far, one for each guard."""
        return self._verdicts

    @property
    def held(self) -> list[T]:
        """What has not left, in order."""
        return [item for item, _ in self._held]

    @property
    def told(self) -> dict[str, Any]:
        """For the event: what had left of an answer that is blocked."""
        return {"released_chars": sum(self._out.values())} if self.blocked else {}

    def _keep(self, verdicts: Sequence[GuardResult], blocked: bool) -> None:
        self._verdicts = worst([*self._verdicts, *verdicts])
        self.blocked = self.blocked or blocked
