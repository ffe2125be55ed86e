"""Cutting and cleaning."""

import pytest

from sinks.formats.text import bounded, clean, cut, fit, handling
from tests.sinks.samples import HOSTILE, finding


def test_clean_changes_only_what_no_encoder_takes():
    """A pair of surrogates is the character they mean, a lone one the replacement character."""
    assert clean("a\ud83d\ude00\ud800b") == "a😀\ufffdb"
    for name, value in HOSTILE.items():
        if name != "surrogates":
            assert clean(value) == value


def test_cut_marks_what_is_missing():
    """At most `limit` characters, the last an ellipsis; a text that fits is left alone."""
    assert (cut("abcdef", 6), cut("abcdef", 5), cut("", 1)) == ("abcdef", "abcd…", "")


def test_bounded_keeps_shapes_and_numbers():
    """Strings are cut, lists and objects shortened, everything else stays."""
    document = {"a": ["x" * 9] * 9, "b": {str(n): n for n in range(9)}, "c": 1.5, "d": None, "e": True}
    assert bounded(document, 5) == {
        "a": ["xxxx…"] * 5,
        "b": {"0": 0, "1": 1, "2": 2, "3": 3, "4": 4},
        "c": 1.5,
        "d": None,
        "e": True,
    }


def test_fit_says_when_nothing_fits():
    """A body that stays too long is an error, not a cut in the middle."""
    assert fit(lambda limit: b"x" * limit, 100) == b"x" * 64
    with pytest.raises(ValueError, match="can't be cut to 10 bytes"):
        fit(lambda _: b"x" * 11, 10)


def test_what_people_said_of_a_finding_is_one_sentence():
    """Held back, acknowledged, called false, or nothing."""
    said = {"handled_by": "alice", "handled_why": "load test"}
    assert [
        handling(finding()),
        handling(finding(suppressed_by="c1", **said)),
        handling(finding(acknowledged_by="c2", **said)),
        handling(finding(acknowledged_by="c2", false_positive=True, **said)),
    ] == [
        "",
        "Held back by alice (load test), command c1.",
        "Acknowledged by alice (load test), command c2.",
        "Called false by alice (load test), command c2.",
    ]
