"""What it costs to judge an answer while it goes out: CPU by size of the window, and how late its first word is.

    .venv/bin/python -m tests.bench.holdback --json

An answer of 4,000 characters in pieces of 4, as tokens come, through `Watch` with the secrets and PII guards on their
threads; no server, no engine. CPU is that of the process (getrusage), all threads; `first_chars` is how many characters
had come when the first one left: by the tokens a second of a model it is the time to the first word. Sizes are run in
turn, in changing order; 0 is an answer held whole, `off` one that nobody judges. The last line is one JSON object.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from typing import Any, cast

from collector.audit import Audit
from collector.auditor import Auditor
from collector.guards.config import GuardsConfig
from collector.guards.stack import GuardStack
from collector.holdback import Piece
from collector.routes import GateConfig
from collector.watch import Watch

WORDS = ("the", "quick", "system", "answers", "users", "with", "short", "helpful", "messages", "while", "tokens", "go")
PIECE_CHARS = 4
SIZES = (None, 0, 1024, 256, 64)


class _Judging:
    """As much of an auditor and an audit as a watch touches, over a real stack."""

    def __init__(self, size: int | None) -> None:
        order = ("secrets", "pii") if size is not None else ()
        self.guards = GuardStack(GuardsConfig(order=order, cache_entries=0))
        self.gate = GateConfig(hold_back_chars=size or 0)

    async def in_thread(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, work, *arguments)

    def holding(self) -> Any:
        return self.guards.holding()

    def judge(self, texts: Any, guards: Any = None, *, others: bool = False) -> Any:
        results = self.guards.judge(
            [("output", text) for text in texts], guards=lambda name: guards is None or (name in guards) is not others
        )
        return results, self.guards.blocks(results)


async def answered(judging: _Judging, text: str) -> tuple[float, int]:
    """CPU microseconds of one answer, and how much had come when its first piece left."""
    cpu_s, first = time.process_time(), 0
    watch: Watch[str] = Watch(cast(Auditor, judging), cast(Audit, judging))
    for at in range(0, len(text), PIECE_CHARS):
        piece = text[at : at + PIECE_CHARS]
        watch.put(piece, [Piece(0, piece)])
        if await watch.ready() and not first:
            first = at + len(piece)
    await watch.judge([text])
    return (time.process_time() - cpu_s) * 1e6, first or len(text)


async def run(rounds: int, chars: int, seed: int) -> dict[str, Any]:
    """All sizes in turn."""
    draw = random.Random(seed)  # noqa: S311 - repeatable answers, no secret
    judging = {size: _Judging(size) for size in SIZES}
    found: dict[int | None, list[tuple[float, int]]] = {size: [] for size in SIZES}
    for number in range(-1, rounds):
        text = " ".join(draw.choices(WORDS, k=chars // 5))[:chars]
        for size in draw.sample(SIZES, len(SIZES)):
            told = await answered(judging[size], text)
            if number >= 0:
                found[size].append(told)
    off_us = statistics.median(cpu for cpu, _ in found[None])
    return {
        "off" if size is None else str(size): {
            "cpu_added_us_per_kchar": (statistics.median(cpu for cpu, _ in told) - off_us) * 1000 / chars,
            "first_chars": statistics.median(first for _, first in told),
        }
        for size, told in found.items()
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the object alone on one line")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--chars", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    sizes = asyncio.run(run(arguments.rounds, arguments.chars, arguments.seed))
    told = {"benchmark": "holdback", "seed": arguments.seed, "chars": arguments.chars, "sizes": sizes}
    print(json.dumps(told, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
