"""The report of `inferwatch guards check` as a person meets it: a file, opened in a browser."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from collector.guards.assessment import assess
from collector.guards.cases import Case
from collector.guards.check import PLAIN, STACK, Plan, Said
from collector.guards.check_record import CheckRecord
from collector.guards.protocol import ALONE
from inferwatch.guards_report import page
from tests.browser.chromium import Chromium

pytestmark = pytest.mark.browser

HOSTILE = "<script>alert(1)</script>"


def report() -> str:
    """A page over made-up answers of two guards, names that want to be markup among them."""
    cases = [
        Case(f"a:{n}", "x", n % 3 == 0, HOSTILE if n % 2 else "calm", "en", "input", ALONE) for n in range(300)
    ]  # fmt: skip
    said = [
        Said(n, PLAIN, guard, (n * 37 % 100) / 200 + 0.4 * one.attack, one.attack, 1.0, 100)
        for guard in ("one", "two", STACK)
        for n, one in enumerate(cases)
    ]
    plan = Plan(1, {HOSTILE: "0" * 64}, {"one": "1", "two": "2"}, "p", 0, 0)
    record = CheckRecord(
        format=1, at=datetime(2026, 5, 1, tzinfo=UTC), inferwatch="0", plan=plan, attacks=100, harmless=200, fpr=0.01,
        seen_in_training=False, assessment=assess(cases, said, fpr=0.01),
    )  # fmt: skip
    return page(record)


async def test_the_report_is_one_file_that_draws_its_curves(browser: Chromium, tmp_path: Path) -> None:
    """Nothing is fetched or complained of, wide and narrow; curves and bars are there, and names stay text."""
    file = tmp_path / "report.html"
    file.write_text(report(), encoding="utf-8")
    await browser.open(file.as_uri())
    assert browser.requests == [file.as_uri()]
    assert browser.complaints == []
    assert await browser.evaluate("document.querySelectorAll('polyline.roc').length") == 3
    assert await browser.evaluate("document.querySelectorAll('rect.attack').length") == 60
    assert await browser.evaluate("document.querySelectorAll('script').length") == 0
    assert HOSTILE in await browser.evaluate("document.body.innerText")
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert await browser.evaluate(overflow) <= 0
