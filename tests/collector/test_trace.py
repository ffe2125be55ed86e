"""The trace id comes from a well-formed `traceparent` and from nothing else."""

import pytest

from collector.trace import trace_id, traceparent

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{PARENT}-01"


@pytest.mark.parametrize("value", [GOOD, GOOD[:-2] + "00", f"01-{TRACE}-{PARENT}-01", f"01-{TRACE}-{PARENT}-01-more"])
def test_a_well_formed_header_gives_its_trace_id(value: str) -> None:
    """Any flags, and a later version with something at its end."""
    headers = [(b"accept", b"*/*"), (b"TraceParent", value.encode())]
    assert (trace_id(headers), traceparent(headers)) == (TRACE, value.encode())


@pytest.mark.parametrize(
    "value",
    [
        "",
        "secret words",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01-",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-01\n",
        f" {GOOD}",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"01-{TRACE}-{PARENT}-01-{'x' * 600}",
    ],
)
def test_anything_else_is_ignored(value: str) -> None:
    """Nothing that a client writes there gets further."""
    headers = [(b"traceparent", value.encode())]
    assert (trace_id(headers), traceparent(headers)) == ("", b"")


def test_of_two_headers_neither_counts() -> None:
    """Which one the next server reads can't be known."""
    assert trace_id([(b"traceparent", GOOD.encode())] * 2) == ""
