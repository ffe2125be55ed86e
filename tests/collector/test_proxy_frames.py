"""Streams are cut into the same frames however their bytes arrive, and answers are counted as their servers count."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.proxy_answers import Seen
from collector.proxy_frames import Frame, Frames, Garbled

EVENTS = (
    'data: {"a": "é"}\n\n: ping\r\n\r\nevent: x\r\ndata: {"b":\r\ndata: 2}\r\n\r\n\ndata: [DONE]\n\ndata: {"c": 3}'
).encode()
LINES = '{"a": "é"}\n\r\n{"b": 2}\r\n{"c": 3}'.encode()
SAID = [{"a": "é"}, {"b": 2}, {"c": 3}]


def cut(kind: str, pieces: list[bytes]) -> list[Frame]:
    """All frames."""
    frames = Frames(kind)
    return [frame for piece in pieces for frame in frames.feed(piece)] + list(frames.end())


@pytest.mark.parametrize(("kind", "raw"), [("text/event-stream", EVENTS), ("application/x-ndjson", LINES)])
@given(places=st.lists(st.integers(0, len(EVENTS)), max_size=6))
def test_frames_do_not_depend_on_how_the_bytes_arrive(kind: str, raw: bytes, places: list[int]) -> None:
    """Cut anywhere, within characters and line ends too, the frames are the same and no byte of an event is lost."""
    ends = [0, *sorted(place for place in places if place < len(raw)), len(raw)]
    found = cut(kind, [raw[start:end] for start, end in pairwise(ends)])
    assert found == cut(kind, [raw])
    assert [frame.said for frame in found if frame.said is not None] == SAID
    if kind == "text/event-stream":
        assert b"".join(frame.raw for frame in found) == raw + b"\n\n"
        assert [frame.last for frame in found] == [False, False, False, False, True, False]


@pytest.mark.parametrize("raw", [b"data: {\n\n", b"data: [1]\n\n", b"data: \xff\n\n", b"data: nan\n\n"])
def test_what_is_no_json_object_is_garbled(raw: bytes) -> None:
    """And the error does not quote it."""
    with pytest.raises(Garbled, match="a frame is not"):
        cut("text/event-stream", [raw])


@pytest.mark.parametrize(
    "raw",
    [
        b'event: x\rdata: {"secret": 1}\n\n',
        b'data: {}\rdata: {"x": 1}\n\n',
        b'\xef\xbb\xbfdata: {"secret": 1}\n\n',
        b"\r\r\n\n",
    ],
)
def test_what_a_client_would_read_otherwise_is_garbled(raw: bytes) -> None:
    """A CR alone ends a line for it, and it skips a byte order mark: it would be given what no guard has seen."""
    with pytest.raises(Garbled):
        cut("text/event-stream", [raw])


KEYS = (
    "choices",
    "usage",
    "delta",
    "message",
    "response",
    "index",
    "finish_reason",
    "done",
    "error",
    "type",
    "x",
    "output_index",
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)


@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(KEYS), inner)))
def test_no_frame_of_any_shape_upsets_the_reader(value: object) -> None:
    """A server may send anything: the counts stay in the event's bounds, the reasons among fixed words."""
    seen = Seen("chat", keep_text=True)
    for _ in range(2):
        seen.see({"choices": [value], "message": value, "usage": value, "response": value, "type": value})
        if isinstance(value, dict):
            seen.see(value)
    assert 0 <= seen.token_count < 2**53
    assert 0 <= seen.prompt_tokens < 2**53
    assert 1 <= seen.choices <= 4096
    assert seen.finish_reason in ("", "error", "abort", "length", "content_filter", "tool_calls", "stop", "other")
    assert all(isinstance(text, str) for text in seen.texts())


@pytest.mark.parametrize(
    ("frames", "counts"),
    [
        ([{"message": {"usage": {"input_tokens": 9, "output_tokens": 1}}}, {"usage": {"output_tokens": 7}}], (9, 7)),
        ([{"usage": {"completion_tokens": 1}}, {"usage": {"prompt_tokens": 2, "completion_tokens": 3}}], (2, 3)),
        ([{"response": {"usage": {"input_tokens": 4, "output_tokens": 5}}}], (4, 5)),
        ([{"prompt_eval_count": 6, "eval_count": 8}], (6, 8)),
        (
            [{"usage": {"prompt_tokens": -1, "completion_tokens": True}}, {"usage": {"completion_tokens": 2**60}}],
            (0, 0),
        ),
    ],
)
def test_counts_are_where_each_api_puts_them(frames: list[dict[str, object]], counts: tuple[int, int]) -> None:
    """Of several the largest counts; what is no count is none."""
    seen = Seen("chat", keep_text=False)
    for frame in json.loads(json.dumps(frames)):
        seen.see(frame)
    assert (seen.prompt_tokens, seen.token_count) == counts
