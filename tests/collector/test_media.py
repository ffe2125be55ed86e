"""Which images, sounds and films a body holds: all that a server could take, whatever stands beside them."""

import base64
from typing import Any

import pytest

from collector.media import Item, items


def inline(data: bytes) -> str:
    """An address that is the picture itself."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


BAD, GOOD = b"a bad picture", b"a good picture"
BARE = base64.b64encode(BAD).decode()
SOURCE = {"type": "base64", "media_type": "image/png", "data": BARE}
TWO: dict[str, dict[str, Any]] = {
    "data and address of one source": {"type": "image", "source": {**SOURCE, "url": inline(GOOD)}},
    "an address beside the source": {"type": "image", "source": SOURCE, "url": inline(GOOD)},
    "an image beside the source": {"type": "image", "source": SOURCE, "image": inline(GOOD)},
    "an address of another API beside the source": {
        "type": "image",
        "source": SOURCE,
        "image_url": {"url": inline(GOOD)},
    },
    "data within an address": {"type": "image_url", "image_url": {"url": inline(GOOD), "data": BARE}},
    "an image within the part": {
        "type": "image",
        "url": inline(GOOD),
        "more": [{"type": "image_url", "image_url": inline(BAD)}],
    },
}


@pytest.mark.parametrize("name", TWO)
def test_every_payload_of_a_part_is_an_item(name: str) -> None:
    """Which one a server takes is its own affair: a harmless picture hides no other."""
    found = items({"messages": [{"role": "user", "content": [TWO[name]]}]})
    assert sorted(item.data for item in found) == [BAD, GOOD]
    assert {item.kind for item in found} == {"image"}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"content": [{"type": "video_embeds", "video_embeds": BARE}]}, [Item("embeds", data=BAD)]),
        ({"content": [{"type": "prompt_embeds", "data": BARE}]}, [Item("embeds", data=BAD)]),
        ({"prompt": "", "prompt_embeds": [BARE, BARE]}, [Item("embeds", data=BAD)] * 2),
        ({"content": [{"type": "image_embeds", "image_embeds": {"image_embeds": BARE}}]}, [Item("embeds", data=BAD)]),
        ({"content": [{"type": "image_embeds", "image_embeds": {"of": "a kind"}}]}, [Item("embeds")]),
        ({"content": [{"type": "image", "source": SOURCE}]}, [Item("image", data=BAD)]),
        (
            {"content": [{"type": "image_url", "image_url": inline(BAD).replace("data:", "DATA:")}]},
            [Item("image", data=BAD)],
        ),
        ({"content": [{"type": "image_url", "image_url": "HTTPS://a/b"}]}, [Item("image", url="HTTPS://a/b")]),
        (
            {"content": [{"type": "image", "url": {"url": {"url": {"url": {"url": {"url": BARE}}}}}}]},
            [Item("image")],
        ),
    ],
)
def test_each_kind_is_found(body: dict[str, Any], found: list[Item]) -> None:
    """Once, with its bytes or its address; what can't be read is an item without either, which no guard passes."""
    assert items(body) == found
