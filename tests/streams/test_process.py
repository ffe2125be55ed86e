"""Quiet libraries: one line, and not the same one over and over."""

import logging

from structlog.testing import capture_logs

from streams.process import CHARACTERS_MAX, OneLine


def test_a_library_is_told_once_in_a_while() -> None:
    """The first time at once; repetitions are counted and told with the next line after ten seconds."""
    now_s = [100.0]
    logger = logging.getLogger("made_up.aiokafka")
    logger.addHandler(OneLine(lambda: now_s[0]))
    with capture_logs() as lines:
        for node in range(5):
            logger.error("cannot reach node %d\nat all", node)
        logger.warning("%s", "x" * 1000)
        now_s[0] += 11
        logger.error("cannot reach node %d\nat all", 7)
    said = [(line["log_level"], line["said"], line["repeats"]) for line in lines]
    assert said == [
        ("error", "cannot reach node 0 at all", 0),
        ("warning", "x" * CHARACTERS_MAX, 0),
        ("error", "cannot reach node 7 at all", 4),
    ]


def test_a_traceback_stays_out() -> None:
    """The message is told, what the exception quotes is not."""
    logger = logging.getLogger("made_up.faust")
    logger.addHandler(OneLine())
    with capture_logs() as lines:
        try:
            int("tell me a secret")
        except ValueError:
            logger.exception("something broke")
    assert lines == [
        {
            "event": "library says",
            "library": "made_up.faust",
            "said": "something broke",
            "repeats": 0,
            "log_level": "error",
        }
    ]
