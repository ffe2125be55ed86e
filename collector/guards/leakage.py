"""The leakage guard: planted canary tokens in an answer, and answers that recite the system prompt.

`[collector.guards.leakage]`, off by default. A canary is a random token that you put into a system prompt, a document
or a tool's secret; the config holds its SHA-256 alone, and a digest of 120 random bits tells nothing. It is found
however it is spaced, cased, turned round, or encoded as the normaliser knows. To make one:
`python -m collector.guards.leakage`.

Recital is measured by runs of five words that answer and system prompt have in common. They are compared by keyed
hashes, with a key drawn at each start, and only hashes are kept for the next answer to the same system prompt.
"""

import base64
import hashlib
import re
import secrets
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Final

from pydantic import Field

from collector.event import Stage
from collector.guards.normaliser import UNDONE, normalise
from collector.guards.protocol import ALONE, Context, Guard, GuardPolicy, Judgement, Probe

CANARY_HEAD: Final = "iw"
CANARY_CHARS: Final = 26
"""`iw` and 24 characters of base32: 120 random bits."""
NGRAM_WORDS: Final = 5
_SYSTEMS_MAX: Final = 256
"""System prompts whose hashes are kept, the least recently used given up first."""
_OUTPUT: Final[frozenset[Stage]] = frozenset({"output"})
_NOT_BASE32: Final = re.compile("[^a-z2-7]+")
_WORD: Final = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W_\u3040-\u30ff\u3400-\u9fff]+")
"""A word, or one sign of a script without blanks."""
_PROBE_SYSTEM: Final = (
    "You are the assistant of a museum of clocks. Never tell visitors which door the night guard uses, and answer "
    "every question about opening hours from the table below, politely and in two sentences at most."
)


class LeakageConfig(GuardPolicy):
    """`[collector.guards.leakage]`: looks at answers."""

    able = frozenset({"input", "retrieved", "tool", "output"})
    quick = True
    stages: frozenset[Stage] | None = Field(_OUTPUT, min_length=1, description="Judge only these stages.")
    canaries: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = Field(
        (),
        max_length=10_000,
        description="SHA-256 of each canary token, as `python -m collector.guards.leakage` prints.",
    )
    run_words: int = Field(
        25,
        ge=NGRAM_WORDS,
        le=10_000,
        description="An answer that recites so many words of the system prompt in a row is blocked.",
    )
    share: float = Field(
        0.4,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="An answer that holds this share of the system prompt's runs of five words is blocked.",
    )

    def build(self) -> Guard:
        return LeakageGuard(canaries=self.canaries, run_words=self.run_words, share=self.share)


def make_canary(random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> tuple[str, str]:
    """(token, its SHA-256 for the config)."""
    token = CANARY_HEAD + base64.b32encode(random_bytes(15)).decode().lower()
    return token, _digest(token)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class LeakageGuard:
    """Compares hashes. Memory: some 100 bytes for each word of the last 256 system prompts."""

    name = "leakage"
    stages = LeakageConfig.able
    reads: frozenset[str] = frozenset({"system"})
    labels = frozenset((*UNDONE, "canary", "system_prompt"))

    def __init__(self, *, canaries: Sequence[str] = (), run_words: int, share: float) -> None:
        self._run_words, self._share = run_words, share
        self._key = secrets.token_bytes(32)
        self._own, own_digest = make_canary()
        self._canaries = frozenset((*canaries, own_digest))
        self._systems: OrderedDict[bytes, frozenset[int]] = OrderedDict()
        self._lock = threading.Lock()
        told = repr((sorted(canaries), run_words, share))
        self.version = f"1+{hashlib.sha256(told.encode()).hexdigest()[:12]}"

    @property
    def probes(self) -> Sequence[Probe]:
        """A canary of its own, a recited system prompt, and an answer that only speaks of the same things."""
        around = Context(system=_PROBE_SYSTEM)
        polite = "The museum of clocks opens at nine. Please see the table for all opening hours."
        return (
            Probe(f"As you asked: {' '.join(self._own.upper())}.", "output", block=True),
            Probe(f"My instructions are: {_PROBE_SYSTEM}", "output", block=True, context=around),
            Probe(polite, "output", block=False, context=around),
        )

    def judge(self, text: str, stage: Stage, context: Context = ALONE) -> Judgement:  # noqa: ARG002 - alike at all
        plain, undone = normalise(text)
        views = (text,) if plain == text else (text, plain)
        canary = any(_digest(token) in self._canaries for view in views for token in _candidates(view))
        recital = max(self._recital(view, context.system) for view in views) if context.system else 0.0
        found = (("canary",) if canary else ()) + (("system_prompt",) if recital >= 0.5 else ())
        return Judgement(1.0 if canary else recital, "+".join(found + undone), bool(found))

    def _recital(self, text: str, system: str) -> float:
        """In [0, 1]: 0.5 where the longest run, or the share of the system prompt's n-grams, reaches its bound."""
        theirs = self._system(system)
        if not theirs:
            return 0.0
        run = longest = 0
        seen: set[int] = set()
        for gram in self._grams(text):
            run = run + 1 if gram in theirs else 0
            longest = max(longest, run)
            if run:
                seen.add(gram)
        words = longest + NGRAM_WORDS - 1 if longest else 0
        return min(1.0, 0.5 * max(words / self._run_words, len(seen) / len(theirs) / self._share))

    def _system(self, system: str) -> frozenset[int]:
        """The hashes of a system prompt's n-grams."""
        name = hashlib.blake2b(system.encode("utf-8", "surrogatepass"), key=self._key).digest()
        with self._lock:
            if name in self._systems:
                self._systems.move_to_end(name)
                return self._systems[name]
        grams = frozenset(self._grams(system))
        with self._lock:
            self._systems[name] = grams
            while len(self._systems) > _SYSTEMS_MAX:
                self._systems.popitem(last=False)
        return grams

    def _grams(self, text: str) -> Iterator[int]:
        """A keyed hash of each run of five words, in order."""
        words = _WORD.findall(text.lower())
        known = {word: self._hash(word) for word in set(words)}
        hashes = [known[word] for word in words]
        return map(hash, zip(*(hashes[start:] for start in range(NGRAM_WORDS)), strict=False))

    def _hash(self, word: str) -> int:
        hashed = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), key=self._key, digest_size=8).digest()
        return int.from_bytes(hashed, "little")


def _candidates(text: str) -> Iterator[str]:
    """Whatever could be a canary, forwards and backwards, with everything between its characters taken out."""
    squeezed = _NOT_BASE32.sub("", text.lower())
    for view in (squeezed, squeezed[::-1]):
        start = view.find(CANARY_HEAD)
        while start >= 0:
            yield view[start : start + CANARY_CHARS]
            start = view.find(CANARY_HEAD, start + 1)


def main() -> int:
    """Prints a new canary: the token to plant, and the digest for the config."""
    token, digest = make_canary()
    sys.stdout.write(f"plant this token:          {token}\nadd to guards.leakage.canaries: {digest}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
