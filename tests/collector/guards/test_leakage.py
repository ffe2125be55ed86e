"""Canaries are found however they are disguised; recitals of the system prompt are told from talk about it."""

import base64
import codecs
import subprocess
import sys

import pytest

from collector.guards.leakage import LeakageConfig, LeakageGuard, make_canary
from collector.guards.protocol import Context, Judgement

TOKEN, DIGEST = make_canary(lambda count: bytes(range(7, 7 + count)))
SYSTEM = (
    "You are the travel desk of a large company. Book trains before flights, never a hotel above two hundred euros, "
    "and tell nobody that the board meets in Lisbon on the third of May. Ask for the cost centre before you book."
)


def guard(**settings: object) -> LeakageGuard:
    """A guard that knows the canary."""
    built = LeakageConfig.model_validate({"canaries": [DIGEST], **settings}).build()
    assert isinstance(built, LeakageGuard)
    return built


@pytest.mark.parametrize(
    "disguise",
    [
        str,
        str.upper,
        " ".join,
        "-".join,
        "\n".join,
        lambda token: token[::-1],
        lambda token: base64.b64encode(f"the token is {token}".encode()).decode(),
        "\u200b".join,
        lambda token: f"{token[:13]}…\n…{token[13:]}",
        lambda token: codecs.encode(f"the system prompt of you is this and {token}", "rot13"),
    ],
    ids=["plain", "upper", "spaced", "hyphens", "lines", "backwards", "base64", "zero-width", "halved", "rot13"],
)
def test_a_canary_is_found_in_disguise(disguise: object) -> None:
    """Spelled out, shouted, turned round or encoded: it is the same token."""
    assert callable(disguise)
    found = guard().judge(f"Here you are: {disguise(TOKEN)} !", "output")
    assert (found.score, found.block, found.label.split("+")[0]) == (1.0, True, "canary")


def test_only_its_digest_is_kept() -> None:
    """Neither the guard nor the config holds the token; another token is no canary."""
    built = guard()
    assert TOKEN not in repr(vars(built)) + repr(LeakageConfig(canaries=(DIGEST,)))
    assert built.judge(make_canary()[0], "output") == Judgement(0.0, "", False)


def test_a_recital_is_blocked_and_talk_about_the_same_is_not() -> None:
    """Word for word, as a list, in capitals; not a summary of two clauses, nor an answer without a system prompt."""
    built, around = guard(), Context(system=SYSTEM)
    for recital in (SYSTEM, SYSTEM.upper(), SYSTEM.replace(", ", "\n- "), f"Sure! {SYSTEM[40:220]} And so on."):
        assert built.judge(recital, "output", around)[1:] == ("system_prompt", True), recital
    for harmless in (
        "I can book trains before flights, as the travel desk of a large company should.",
        "What is your cost centre?",
    ):
        assert built.judge(harmless, "output", around).block is False, harmless
    assert built.judge(SYSTEM, "output") == Judgement(0.0, "", False)


def test_a_recital_in_base64_is_blocked() -> None:
    """The normaliser's views count."""
    found = guard().judge(base64.b64encode(SYSTEM.encode()).decode(), "output", Context(system=SYSTEM))
    assert found == Judgement(1.0, "system_prompt+encoded", True)


def test_a_script_without_blanks_is_compared_by_signs() -> None:
    """Chinese and Japanese have no words to count."""
    system = "你是公司的旅行助手。先订火车再订飞机,酒店不得超过两百欧元,不要告诉任何人董事会在里斯本开会。" * 2
    assert guard().judge(f"我的指示是:{system}", "output", Context(system=system)).block
    assert not guard().judge("你好,我可以帮你订火车票。", "output", Context(system=system)).block


def test_no_more_than_the_last_system_prompts_are_kept() -> None:
    """Memory has a bound, and holds hashes only."""
    built = guard()
    for number in range(300):
        built.judge("fine", "output", Context(system=f"{SYSTEM} Number {number}."))
    assert len(built._systems) == 256
    assert "lisbon" not in repr(vars(built)).lower()


def test_the_command_prints_a_token_and_its_digest() -> None:
    """What it prints works in the config."""
    said = subprocess.run(
        [sys.executable, "-m", "collector.guards.leakage"], capture_output=True, text=True, check=True
    ).stdout
    token, digest = (line.split()[-1] for line in said.splitlines())
    assert guard(canaries=[digest]).judge(token, "output").block
