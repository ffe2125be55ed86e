"""Made-up traffic of one model with thirty users and three kinds of request, and four staged campaigns.

Everything is drawn from one seed. Nothing here is text: prompts are digests and MinHash sketches of numbered shingles.
"""

import base64
import hashlib
import random
import struct
from dataclasses import dataclass, field

from collector.event import SCHEMA_VERSION, AuditEvent, Decision, GuardResult, Status, from_timestamp_us

START_US = 1_800_000_000 * 1_000_000
MODEL = "tiny@0123abc"
TENANT = "acme"


@dataclass
class Traffic:
    """A growing day of events."""

    seed: int
    rate: float = 7.0
    block_rate: float = 0.01
    users: int = 30
    events: list[AuditEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)  # noqa: S311 seeded on purpose
        self.prompts = 0

    def calm(self, begin_s: float, span_s: float, slow: float = 1.0) -> None:
        """Chat, completions and streaming at `rate` a second, all `slow` times as slow as usual."""
        now_s = begin_s
        while (now_s := now_s + self.rng.expovariate(self.rate)) < begin_s + span_s:
            user = self.rng.randrange(self.users)
            prompt_tokens = self.rng.choice((12, 40, 150)) + self.rng.randrange(10)
            limit = self.rng.choice((16, 32, 48))
            tokens = self.rng.randint(8, limit)
            blocked = self.rng.random() < self.block_rate
            self.one(now_s, user, prompt_tokens, limit, tokens, blocked=blocked, slow=slow)

    def one(
        self,
        at_s: float,
        user: int,
        prompt_tokens: int,
        limit: int,
        tokens: int,
        *,
        blocked: bool = False,
        slow: float = 1.0,
        shingles: set[int] | None = None,
        session: int = 0,
        status: Status | None = None,
    ) -> None:
        """One request that closes at `at_s` seconds from the start."""
        self.prompts += 1
        # A prompt like no other has a sketch like no other; making one from shingles takes a millisecond.
        minhash = base64.b64encode(self.rng.randbytes(256)).decode() if shingles is None else sketch(shingles)
        queue_ms = self.rng.lognormvariate(0.5, 0.5) * slow
        ttft_ms = queue_ms + (8 + 0.05 * prompt_tokens) * self.rng.lognormvariate(0, 0.25) * slow
        per_token_ms = 4 * self.rng.lognormvariate(0, 0.15) * slow
        name = f"u_{hashlib.blake2b(str(user).encode(), digest_size=16).hexdigest()}"
        decision: Decision = "block" if blocked else "allow"
        guard = GuardResult(guard="injection", version="1", stage="input", decision=decision, score=0.5)
        pattern = GuardResult(guard="secrets", version="1", stage="input", decision="allow")
        self.events.append(
            AuditEvent(
                schema_version=SCHEMA_VERSION,
                event_id=f"{self.seed:04x}-{self.prompts:08x}",
                timestamp=from_timestamp_us(START_US + int(at_s * 1e6)),
                collector_id="",
                boot="",
                seq=0,
                tenant=TENANT,
                session_id=f"s_{session}",
                user_id=name,
                prompt_hash=f"hmac:p{self.prompts}",
                turn_hash=f"hmac:{hash_of(shingles or {self.prompts})}",
                minhash=minhash,
                model_version=MODEL,
                guardrail_results=[guard, pattern],
                response_tokens=0 if blocked else tokens,
                latency_ms=2.0 if blocked else ttft_ms + per_token_ms * tokens,
                ttft_ms=None if blocked else ttft_ms,
                queue_ms=None if blocked else queue_ms,
                ms_per_output_token=None if blocked else per_token_ms,
                blocked=blocked,
                status=status or ("blocked_input" if blocked else "ok"),
                prompt_tokens=prompt_tokens,
                max_tokens=limit,
            )
        )

    def block_burst(self, begin_s: float, span_s: float = 12, prompts: int = 40, users: int = 25) -> None:
        """Blocked prompts by many users."""
        for number in range(prompts):
            at_s = begin_s + span_s * (number + self.rng.random()) / prompts
            self.one(at_s, 100 + number % users, 40, 32, 0, blocked=True)

    def probe(self, begin_s: float, span_s: float = 12, prompts: int = 20, user: int = 200, hit: float = 0.7) -> None:
        """One session varies one prompt of sixty shingles, seven at a time."""
        base = 10**9 + user * 10**6
        for number in range(prompts):
            changed = {base + 1_000 + number * 100 + step for step in range(7)}
            shingles = {base + step for step in range(7, 60)} | changed
            at_s = begin_s + span_s * (number + self.rng.random()) / prompts
            self.one(at_s, user, 40, 32, 20, blocked=self.rng.random() < hit, shingles=shingles, session=7)

    def spread(self, begin_s: float, span_s: float = 12, users: int = 30) -> None:
        """Each user is blocked with his own variant of one prompt of sixty shingles, twenty of them replaced."""
        for number in range(users):
            shingles = {7 * 10**9 + step for step in self.rng.sample(range(60), 40)}
            shingles |= {8 * 10**9 + number * 100 + step for step in range(20)}
            at_s = begin_s + span_s * (number + self.rng.random()) / users
            self.one(at_s, 500 + number, 40, 32, 0, blocked=True, shingles=shingles)

    def heavy(self, begin_s: float, span_s: float = 12, rate: float = 4.0, users: int = 2, slow: float = 5.0) -> None:
        """Heavy prompts by two users; calm traffic meanwhile must be made with the same `slow`."""
        now_s = begin_s
        while (now_s := now_s + self.rng.expovariate(rate)) < begin_s + span_s:
            self.one(now_s, 300 + self.rng.randrange(users), 3_000, 48, self.rng.randint(8, 48), slow=slow)

    def long_answers(self, begin_s: float, span_s: float = 12, prompts: int = 20, users: int = 3) -> None:
        """Answers of about 400 tokens where 8 to 48 are usual."""
        for number in range(prompts):
            at_s = begin_s + span_s * (number + self.rng.random()) / prompts
            self.one(at_s, 400 + number % users, 40, 512, self.rng.randint(380, 420))

    def flood(
        self, begin_s: float, span_s: float = 12, requests: int = 900, user: int = 700, sessions: int = 1
    ) -> None:
        """One client sends as fast as it can, a session in turn."""
        for number in range(requests):
            at_s = begin_s + span_s * (number + self.rng.random()) / requests
            self.one(at_s, user, 40, 32, self.rng.randint(8, 32), session=900 + number % sessions)


def hash_of(shingles: set[int]) -> str:
    return hashlib.blake2b(repr(sorted(shingles)).encode(), digest_size=16).hexdigest()


def sketch(shingles: set[int], slots: int = 64) -> str:
    """A MinHash of numbered shingles, in the wire form."""
    mixed = [(shingle * 0x9E3779B97F4A7C15 + 0x1234567) & (2**64 - 1) for shingle in shingles]
    least = []
    for slot in range(slots):
        factor = (2 * slot + 1) * 0xC2B2AE3D27D4EB4F & (2**64 - 1) | 1
        least.append(min(((value ^ (value >> 29)) * factor & (2**64 - 1)) >> 32 for value in mixed))
    return base64.b64encode(struct.pack(f"<{slots}I", *least)).decode()
