"""The engine's own count against what the wrapper began."""

from collector.reconcile import CLOSED_MAX, Tally


def test_what_was_begun_is_audited_before_and_after_its_end() -> None:
    """The engine may count before the answer is read or after; n choices are n finished requests of one id."""
    tally = Tally()
    tally.begin("a")
    tally.finish("a")
    tally.finish("a")
    tally.close("a")
    tally.finish("a")
    assert (tally.finished, tally.unaudited) == (3, 0)


def test_what_nobody_began_is_unaudited() -> None:
    """By its id, and without one."""
    tally = Tally()
    tally.begin("a")
    tally.finish("b")
    tally.finish(None)
    assert (tally.finished, tally.unaudited) == (2, 2)


def test_one_id_for_two_requests_is_known_until_both_have_ended() -> None:
    """Clients choose ids, and may choose one twice."""
    tally = Tally()
    for _ in range(2):
        tally.begin("a")
    tally.close("a")
    for number in range(CLOSED_MAX + 1):
        tally.begin(f"b{number}")
        tally.close(f"b{number}")
    tally.finish("a")
    assert tally.unaudited == 0


def test_memory_is_bounded() -> None:
    """Of ended requests the latest are remembered, and an old one is told as unaudited rather than passed over."""
    tally = Tally()
    for number in range(2 * CLOSED_MAX):
        tally.begin(f"r{number}")
        tally.close(f"r{number}")
    assert len(tally._closed) == CLOSED_MAX
    assert tally._open == {}
    tally.finish(f"r{2 * CLOSED_MAX - 1}")
    assert tally.unaudited == 0
    tally.finish("r0")
    assert tally.unaudited == 1
