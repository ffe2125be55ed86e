"""What a guard may decide for whom, which requests it is asked about, and what it need not be asked again."""

import pytest
from pydantic import ValidationError

from collector.event import Stage
from collector.guards.cache import VerdictCache
from collector.guards.config import GuardsConfig
from collector.guards.protocol import ALONE, CONTEXT, Context, Guard, Judgement
from tests.collector.guards.test_stack import BLOCKED, ActingGuard, error, result, stack_of

CHAT, PLAIN = "POST /v1/chat/completions", "POST /v1/completions"


class Counting(ActingGuard):
    """Blocks what says `bad`, and remembers what it was asked."""

    def __init__(self, name: str = "injection", version: str = "1+test") -> None:
        super().__init__(name=name, version=version)
        self.asked: list[str] = []

    def judge(self, text: str, stage: Stage, context: Context = ALONE) -> Judgement:
        self.asked.append(text)
        return super().judge(text, stage, context)


def test_the_narrowest_setting_wins_one_by_one() -> None:
    """Tenant and route, then tenant, then route, then the guard's own table; each setting by itself."""
    own = {
        "threshold": 0.5,
        "routes": {PLAIN: {"threshold": 0.6, "mode": "shadow", "on_error": "allow"}},
        "tenants": {"lab": {"threshold": 0.7, "routes": {PLAIN: {"mode": "enforce", "poisoned": "drop"}}}},
    }
    policy = GuardsConfig.model_validate({"injection": {"shadow_stages": [], **own}}).injection
    told = {(tenant, route): policy.rule(tenant, route)[:5] for tenant in ("default", "lab") for route in (CHAT, PLAIN)}
    assert told == {
        ("default", CHAT): (0.5, "enforce", "block", 1.0, "block"),
        ("default", PLAIN): (0.6, "shadow", "allow", 1.0, "block"),
        ("lab", CHAT): (0.7, "enforce", "block", 1.0, "block"),
        ("lab", PLAIN): (0.7, "enforce", "allow", 1.0, "drop"),
    }


def test_a_tenant_and_a_route_have_their_own_decisions() -> None:
    """The same judgement blocks, is watched or passes by who asks and where."""
    own = {"tenants": {"lab": {"threshold": 0.95}}, "routes": {PLAIN: {"mode": "shadow"}}}
    stack = stack_of(ActingGuard(), injection=own)
    places = [("default", CHAT), ("default", PLAIN), ("lab", CHAT), ("lab", PLAIN)]
    decisions = [stack.judge([("input", "bad")], Context(*place))[0].decision for place in places]
    assert decisions == ["block", "shadow", "allow", "allow"]
    failed = [error("ValueError")]
    assert [stack.blocks(failed, Context(*place)) for place in places] == [True, False, True, False]


def test_each_tenant_and_route_has_its_order_of_guards() -> None:
    """A guard that an order leaves out does not judge there, and one that only some order names is built."""
    stack = stack_of(
        ActingGuard(),
        ActingGuard("secrets"),
        order=["injection"],
        secrets={"stages": ["input"]},
        tenants={"lab": {"order": ["secrets", "injection"], "routes": {PLAIN: {"order": []}}}},
        routes={PLAIN: {"order": ["secrets"]}},
    )
    told = {
        (tenant, route): [got.guard for got in stack.judge([("input", "bad")], Context(tenant, route))]
        for tenant in ("default", "lab")
        for route in (CHAT, PLAIN)
    }
    assert told == {
        ("default", CHAT): ["injection"],
        ("default", PLAIN): ["secrets"],
        ("lab", CHAT): ["secrets", "injection"],
        ("lab", PLAIN): [],
    }
    assert stack.versions == {"injection": "1+test", "secrets": "1+test"}


@pytest.mark.parametrize(
    "fields",
    [
        {"routes": {"/v1/completions": {"order": []}}},
        {"tenants": {"lab": {"order": ["injektion"]}}},
        {"tenants": {"lab": {"routes": {PLAIN: {"order": ["secrets", "secrets"]}}}}},
        {"injection": {"sample": 0}},
        {"injection": {"routes": {"chat": {"mode": "shadow"}}}},
        {"injection": {"tenants": {"lab": {"poisoned": "remove"}}}},
    ],
)
def test_a_policy_that_can_not_be_meant_is_refused(fields: dict[str, object]) -> None:
    """Routes that are none, guards that are none, a share of nothing."""
    with pytest.raises(ValidationError):
        GuardsConfig.model_validate(fields)


def test_sampling_judges_a_share_of_the_requests_and_always_the_same_ones() -> None:
    """By a keyed hash of the prompt: every text of such a request, and none of the others; the event says which."""
    guard = Counting()
    stack = stack_of(guard, injection={"sample": 0.25}, cache_entries=0)
    guard.asked.clear()
    prompts = [f"prompt {number} bad" for number in range(800)]
    texts: list[tuple[Stage, str]] = [("input", "so bad"), ("tool", "bad as well")]
    rounds = [[stack.judge(texts, Context("lab", prompt=prompt)) for prompt in prompts] for _ in range(2)]
    assert rounds[0] == rounds[1]
    judged = [found for found in rounds[0] if found == [result(**BLOCKED), result(stage="tool", **BLOCKED)]]
    left = [result(score=0.0, label="unsampled"), result(stage="tool", score=0.0, label="unsampled")]
    assert rounds[0].count(left) == 800 - len(judged)
    assert 140 <= len(judged) <= 260  # 200 expected, by hash: 4 standard deviations and more
    assert len(guard.asked) == 2 * 2 * len(judged)
    assert not stack.blocks(left)


def test_what_is_sampled_is_decided_under_the_tenants_key() -> None:
    """The same prompts draw otherwise under another key, so nobody without it can tell which are judged."""
    stack = stack_of(ActingGuard(), injection={"sample": 0.5})

    def drawn(key: str) -> list[str]:
        contexts = [
            Context("lab", prompt=f"{number}", draw=lambda text: f"s_{hash((key, text)) & (2**64 - 1):032x}")
            for number in range(64)
        ]
        return [stack.judge([("input", "bad")], context)[0].label for context in contexts]

    assert drawn("one") == drawn("one") != drawn("two")


def test_a_threshold_of_next_to_nothing_does_not_block_what_was_left_out() -> None:
    """A score of 0 that no guard gave is no score."""
    stack = stack_of(ActingGuard(), injection={"sample": 1e-9, "threshold": 1e-9})
    assert stack.judge([("input", "bad")]) == [result(score=0.0, label="unsampled")]


def test_a_text_is_judged_once_for_a_tenant() -> None:
    """Another tenant, stage or context has it judged anew, and so does a guard of another version."""
    guard = Counting()
    stack = stack_of(guard)
    guard.asked.clear()
    places = [
        ("input", Context("a")),
        ("input", Context("a")),
        ("tool", Context("a")),
        ("input", Context("b")),
        ("input", Context("a", system="be kind")),
        ("input", Context("a", prompt="what was asked")),
        ("input", Context("a", route=PLAIN)),
    ]
    verdicts = [stack.judge([(stage, "bad")], context) for stage, context in places]  # type: ignore[list-item]
    assert [found[0].decision for found in verdicts] == ["block"] * 7
    assert guard.asked == ["bad"] * 6
    guard.version = "2+test"
    assert stack.judge([("input", "bad")], Context("a"))[0].version == "2+test"
    assert guard.asked == ["bad"] * 7


def test_what_a_guard_does_not_read_does_not_part_its_entries() -> None:
    """`reads`: a conversation goes on, and its first turn is not judged again. Never across tenants."""
    guard = Counting()
    guard.reads = frozenset({"system"})  # type: ignore[attr-defined]  # as a guard of that kind has it
    stack = stack_of(guard)
    guard.asked.clear()
    for tenant in ("a", "b"):
        for turn in range(5):
            stack.judge([("input", "fine")], Context(tenant, prompt=f"turn {turn}"))
    assert guard.asked == ["fine"] * 2


def test_errors_are_never_kept() -> None:
    """A guard that failed is asked again, and what it says then is kept."""
    answers = iter([ValueError("x"), Judgement(0.9, "nasty", block=True)])

    def act(_: str) -> object:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    stack = stack_of(ActingGuard(act=act))
    assert [stack.judge([("input", "text")]) for _ in range(3)] == [
        [error("ValueError")],
        [result(**BLOCKED)],
        [result(**BLOCKED)],
    ]


def test_policy_is_applied_to_what_is_kept_anew() -> None:
    """A judgement that one route blocks by is a mere score on another: decisions are not kept."""
    guard = Counting()
    guard.reads = frozenset()  # type: ignore[attr-defined]  # as above
    stack = stack_of(guard, injection={"routes": {PLAIN: {"mode": "shadow"}}})
    assert [stack.judge([("input", "bad")], Context("a", route))[0].decision for route in (CHAT, PLAIN)] == [
        "block",
        "shadow",
    ]


def test_two_texts_never_share_an_entry() -> None:
    """However they are cut into fields, whatever characters they hold: no harmless text stands for a bad one."""
    cache = VerdictCache(100, 60, clock_s=lambda: 0.0)
    guard: Guard = ActingGuard()
    texts = ["", "a", "ab", "a\0", "\0a", "\ud800", "\udc00", "\ufffd", "é", "e\u0301", " a", "a "]
    around = ["....", "a...", ".a..", "..a.", "...a", "ab..", ".ab.", "a.b."]
    contexts = [Context(*(field.replace(".", "") for field in fields)) for fields in around]
    keys = {
        cache.key(guard, stage, text, context) for stage in ("input", "tool") for text in texts for context in contexts
    }
    assert len(keys) == 2 * len(texts) * 8
    other = VerdictCache(100, 60, clock_s=lambda: 0.0)
    assert cache.key(guard, "input", "a", ALONE) != other.key(guard, "input", "a", ALONE)


def test_the_cache_is_bounded_and_forgets() -> None:
    """The least recently used leave first; what is too old is judged anew; 0 keeps nothing."""
    now_s = 0.0
    cache = VerdictCache(2, 10, clock_s=lambda: now_s)
    good = Judgement(0.1, "", block=False)
    for key in (b"a", b"b"):
        cache.put(key, good)
    assert cache.get(b"a") == good
    cache.put(b"c", good)
    assert [cache.get(key) for key in (b"a", b"b", b"c")] == [good, None, good]
    now_s = 10.0
    assert (cache.get(b"a"), len(cache._kept)) == (None, 1)
    none = VerdictCache(0, 10, clock_s=lambda: now_s)
    none.put(none.key(ActingGuard(), "input", "a", ALONE), good)
    assert len(none._kept) == 0


def test_every_guard_says_rightly_what_it_reads() -> None:
    """A guard that judged by context and did not say so would give one tenant's prompt another's verdict."""
    for name in ("injection", "secrets"):
        guard = GuardsConfig().policy(name).build()
        reads: frozenset[str] = getattr(guard, "reads", CONTEXT)
        for probe in guard.probes:
            around = {field: f"ignore {field}" for field in CONTEXT - reads}
            assert guard.judge(probe.text, probe.stage, Context(**around)) == guard.judge(probe.text, probe.stage)
