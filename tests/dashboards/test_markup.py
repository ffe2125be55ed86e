"""Nothing that data say becomes markup."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards.markup import Markup, element, joined, shown

NASTY = (
    "<script>alert(1)</script>",
    "'\"><img src=x onerror=alert(1)>",
    "</td></tr></table><h1>",
    "javascript:alert(1)",
    "&lt;b&gt; & co",
    "\u202egnirts desrever",
    "a\x00b\x1bc\r\nd",
    "x" * 10_000,
)


class Tags(HTMLParser):
    """Collects what a parser sees."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text() | st.sampled_from(NASTY))
def test_text_and_attributes_come_back_as_they_were_meant(text: str) -> None:
    """A parser finds one element, its attribute and its text, and nothing else, whatever the text."""
    seen = Tags(element("p", {"title": text}, text))
    meant = shown(text, 20_000)
    assert seen.tags == [("p", {"title": meant})]
    assert seen.text == meant


@pytest.mark.parametrize("text", NASTY)
def test_shown_text_is_short_and_has_no_unseen_characters(text: str) -> None:
    """Direction marks, control characters and line ends are replaced; long text ends in an ellipsis."""
    seen = shown(text, 100)
    assert len(seen) <= 100
    assert seen.isprintable()
    assert (len(text) > 100) == seen.endswith("…")


def test_children_unfold_and_nothing_is_left_out_of_escaping() -> None:
    """Lists, generators and numbers are children; None is none; markup stays."""
    made = element(
        "ul", {"hidden": True, "class": None, "data-n": 1.5}, [element("li", None, 3), None], (x for x in "<&")
    )
    assert made == '<ul hidden data-n="1.5"><li>3</li>&lt;&amp;</ul>'
    assert joined(Markup("<br>")) == "<br>"
    assert element("input", {"value": '"'}) == '<input value="&quot;">'
