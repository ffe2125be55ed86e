"""One worker of the sidecar: a process that builds the guards, tests them, and judges one text after the other.

The first frame on its line is the guards' config in JSON. It ends when the line does, and may be killed at any moment:
the sidecar asks another one. Once it judges, it writes nowhere: whatever a library prints could be what it was given to
read.
"""

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from collector.guards.config import GuardsConfig
from collector.guards.protocol import CONTEXT, Context, Guard, GuardRefused, Judgement, Text
from collector.guards.stack import GuardStack
from collector.guards.verdicts import BadJudgement, checked
from collector.guards.wire import (
    BAD_BODY,
    HEADER,
    Answer,
    Ask,
    Frames,
    GuardTold,
    ProbeTold,
    Ready,
    ask_of,
    encode,
    frame,
    to_bytes,
    to_text,
)

_RECEIVE_BYTES: Final = 1_048_576
_FLUSH_S: Final = 0.002
"""Answers wait for company so long."""


def sidecar_guards(config: GuardsConfig) -> dict[str, Guard]:
    """The guards that the config places in the sidecar, built and self-tested. Raises GuardRefused."""
    names = tuple(name for name in config.names if config.policy(name).where == "sidecar")
    guards = {name: config.policy(name).build() for name in names}
    alone = config.model_copy(update={"order": names, "tenants": {}, "routes": {}})
    GuardStack(alone, guards=guards).close()
    return guards


def told(guards: Mapping[str, Guard]) -> tuple[GuardTold, ...]:
    """What clients learn of them."""
    return tuple(
        GuardTold(
            name,
            guard.version,
            guard.stages,
            guard.labels,
            hasattr(guard, "judge_many"),
            getattr(guard, "reads", CONTEXT),
            int(getattr(guard, "window_chars", 0)),
            tuple(
                ProbeTold(
                    to_bytes(probe.text),
                    probe.stage,
                    probe.block,
                    to_bytes(probe.context.system),
                    to_bytes(probe.context.prompt),
                )
                for probe in guard.probes
            ),
        )
        for name, guard in guards.items()
    )


class Judge:
    """Answers questions. Raises nothing: what goes wrong is in the answer, by its class."""

    def __init__(self, guards: Mapping[str, Guard]) -> None:
        self._guards = guards

    def answers(self, asked: Sequence[tuple[int, bytes]]) -> Iterator[tuple[int, Answer]]:
        """The answers in order; neighbours for one guard that judges many at once are judged at once."""
        waiting: list[tuple[int, Text]] = []
        of: Guard | None = None
        for number, body in asked:
            try:
                ask = ask_of(body)
                text = Text(to_text(ask.text), ask.stage, _context(ask))
                guard = self._guards[ask.guard]
            except (*BAD_BODY, KeyError) as problem:
                yield number, Answer(0.0, "", block=False, error=_word(problem))
                continue
            if waiting and guard is not of:
                yield from self._together(of, waiting)
                waiting = []
            of = guard
            if hasattr(guard, "judge_many"):
                waiting.append((number, text))
            else:
                yield number, self._alone(guard, text)
        if waiting:
            yield from self._together(of, waiting)

    def _alone(self, guard: Guard, text: Text) -> Answer:
        try:
            return _answer(guard, guard.judge(text.text, text.stage, text.context))
        except BaseException as problem:  # noqa: BLE001 - SystemExit too: whatever a guard raises is its answer
            return Answer(0.0, "", block=False, error=_word(problem))

    def _together(self, guard: Any, waiting: Sequence[tuple[int, Text]]) -> Iterator[tuple[int, Answer]]:
        """Where judging together fails, each is judged alone: the fault may be that of one text."""
        if len(waiting) > 1:
            try:
                judged = guard.judge_many([text for _, text in waiting])
                answers = [(number, _answer(guard, one)) for (number, _), one in zip(waiting, judged, strict=True)]
            except BaseException:  # noqa: BLE001, S110 - as above; each is tried again below
                pass
            else:
                yield from answers
                return
        for number, text in waiting:
            yield number, self._alone(guard, text)


def _answer(guard: Guard, judgement: object) -> Answer:
    good: Judgement = checked(guard, judgement)
    return Answer(good.score, good.label, good.block)


def _context(ask: Ask) -> Context:
    return Context(ask.tenant, ask.route, to_text(ask.system), to_text(ask.prompt))


def _word(problem: BaseException) -> str:
    return "BadJudgement" if isinstance(problem, BadJudgement) else type(problem).__name__[:64]


def serve(link: socket.socket) -> None:
    """Be a worker until the other end closes."""
    frames = Frames(2**31)
    asked = _receive(link, frames)
    if not asked:
        return
    try:
        guards = sidecar_guards(GuardsConfig.model_validate_json(asked[0][1]))
        ready = Ready(told(guards))
    except Exception as problem:  # noqa: BLE001 - nothing has been read yet: its words are ours or a library's
        known = isinstance(problem, GuardRefused)
        refused = str(problem) if known else f"a guard can't be built: {type(problem).__name__}: {problem}"[:1000]
        link.sendall(frame(0, encode(Ready((), refused))))
        return
    link.sendall(frame(0, encode(ready)))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    judge = Judge(guards)
    while asked := _receive(link, frames):
        _answer_all(link, judge, asked)
        del asked  # an idle worker keeps no text alive


def _answer_all(link: socket.socket, judge: Judge, asked: Sequence[tuple[int, bytes]]) -> None:
    out, last_s = bytearray(), time.monotonic()
    for number, answer in judge.answers(asked):
        body = encode(answer)
        out += HEADER.pack(len(body), number) + body
        now_s = time.monotonic()
        if now_s - last_s > _FLUSH_S:
            link.sendall(out)
            out.clear()
            last_s = now_s
    if out:
        link.sendall(out)


def _receive(link: socket.socket, frames: Frames) -> list[tuple[int, bytes]]:
    """At least one frame, and all that came with it; none at the end."""
    while data := link.recv(_RECEIVE_BYTES):
        if found := list(frames.feed(data)):
            return found
    return []
