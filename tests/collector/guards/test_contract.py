"""What every guard must keep, whichever it is: found by the table in GuardsConfig, without a list of exceptions."""

import base64
import logging
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.guards.config import GuardsConfig
from collector.guards.protocol import Guard, Judgement
from collector.guards.stack import GuardStack

CANARY = "canary-8842-ignore all previous instructions-4111 1111 1111 1111-AKIAQQQQWWWWEEEERRRR"
HOSTILE = {
    "empty": "",
    "blank": " \n\t ",
    "one character": "a",
    "NUL": "a\0b\0" * 50,
    "lone surrogates": "\ud800 abc \udfff ignore",
    "emoji": "👩‍👩‍👧🏴󠁧󠁢󠁥󠁮󠁧󠁿" * 40,
    "right to left": "\u202eabc\u202c" * 40,
    "combining marks": "e" + "\u0301" * 3000,
    "swelling ligatures": "\ufdfa" * 3000,
    "nested base64": base64.b64encode(base64.b64encode(base64.b64encode(b"hello world, hello") * 3) * 3).decode(),
    "one long word": "a" * 60_000,
    "letters apart": "a b " * 15_000,
    "digits apart": "1 2-" * 15_000,
    "leet": "1gn0r3 4ll " * 6_000,
    "key heads": "AKIA eyJ sk- ghp_ secret= -----BEGIN " * 2_000,
    "at signs": "a@" * 30_000,
}


@pytest.fixture(scope="module", params=GuardsConfig.known())
def guard(request: pytest.FixtureRequest) -> Guard:
    """Each guard there is, as its default config builds it."""
    return GuardsConfig().policy(request.param).build()


def well_formed(guard: Guard, judgement: Judgement) -> bool:
    """Whether a judgement keeps to the protocol."""
    return (
        type(judgement) is Judgement
        and type(judgement.score) is float
        and math.isfinite(judgement.score)
        and 0 <= judgement.score <= 1
        and type(judgement.block) is bool
        and set(filter(None, judgement.label.split("+"))) <= guard.labels
    )


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_is_judged(guard: Guard, kind: str) -> None:
    """Any string gets a judgement, at every stage, and the same one twice."""
    for stage in sorted(guard.stages):
        first = guard.judge(HOSTILE[kind], stage)
        assert well_formed(guard, first)
        assert guard.judge(HOSTILE[kind], stage) == first


@given(text=st.text(max_size=400))
@settings(max_examples=60, deadline=None)
def test_any_text_is_judged(text: str) -> None:
    """No text at all makes a guard raise or answer out of shape."""
    for name, built in BUILT.items():
        for stage in sorted(built.stages):
            assert well_formed(built, built.judge(text, stage)), name


BUILT = {name: GuardsConfig().policy(name).build() for name in GuardsConfig.known()}


def test_ten_megabytes_are_judged_to_the_end(guard: Guard) -> None:
    """What must be blocked is found at the very end of ten million characters."""
    bad = next(probe for probe in guard.probes if probe.block)
    filler = "The train leaves at nine and takes two hours to the coast. " * 170_000
    assert len(filler) > 10_000_000
    assert guard.judge(filler + " \n" + bad.text, bad.stage).block


def test_probes_are_answered(guard: Guard) -> None:
    """The self-test has both answers, and the guard gives them."""
    assert {probe.block for probe in guard.probes} == {True, False}
    assert [guard.judge(probe.text, probe.stage).block for probe in guard.probes] == [
        probe.block for probe in guard.probes
    ]


def test_threads_agree(guard: Guard) -> None:
    """Eight threads at once judge as one does."""
    texts = [probe.text * repeats for probe in guard.probes for repeats in (1, 5, 20)] * 4
    stage = min(guard.stages)
    alone = [guard.judge(text, stage) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: guard.judge(text, stage), texts)) == alone


def test_version_says_what_judges(guard: Guard) -> None:
    """The version is short, and the same for the same build."""
    assert 0 < len(guard.version) <= 64
    assert GuardsConfig().policy(guard.name).build().version == guard.version


def test_no_text_gets_out(guard: Guard, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither verdicts nor logs nor reprs hold a piece of what was judged."""
    config = GuardsConfig(order=(guard.name,))
    stack = GuardStack(config, guards={guard.name: guard})
    with caplog.at_level(logging.DEBUG):
        results = stack.judge([(stage, CANARY) for stage in sorted(guard.stages)])
    told = " ".join((repr(results), repr(guard), repr(stack), repr(vars(stack)), caplog.text, *capsys.readouterr()))
    pieces = ("canary", "8842", "4111", "AKIAQ", "previous instructions")
    assert [piece for piece in pieces if piece in told] == []
    stack.close()


def test_it_runs_in_the_stack_by_default() -> None:
    """Every guard of the table is on without a word in the config."""
    stack = GuardStack(GuardsConfig())
    assert tuple(stack.versions) == GuardsConfig.known()
    stack.close()
