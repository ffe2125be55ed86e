"""The HTML view as people meet it: drawn, read with mouse and keys, refreshed, light and dark, wide and narrow."""

import asyncio
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from dashboards.config import DashboardsConfig
from dashboards.panels import PANELS
from dashboards.view import make_view, serve_view
from tests.browser.chromium import Chromium
from tests.dashboards.stored import StoreProcess

pytestmark = pytest.mark.browser

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
PLOTS = [panel.name for panel in PANELS if panel.kind == "timeseries"]


def shades(png: bytes) -> tuple[float, int]:
    """Mean brightness (0 to 255) and number of different colours of an 8-bit RGB or RGBA picture."""
    width, height, depth, colour = struct.unpack(">IIBB", png[16:26])
    assert (depth, colour) in ((8, 2), (8, 6))
    channels = 3 if colour == 2 else 4
    packed, position = b"", 8
    while position < len(png):
        (length,) = struct.unpack(">I", png[position : position + 4])
        if png[position + 4 : position + 8] == b"IDAT":
            packed += png[position + 8 : position + 8 + length]
        position += 12 + length
    raw, stride = bytearray(zlib.decompress(packed)), width * channels
    lines, above = [], bytearray(stride)
    for row in range(height):
        start = row * (stride + 1)
        above = _unfiltered(raw[start], raw[start + 1 : start + 1 + stride], above, channels)
        lines.append(bytes(above))
    pixels = b"".join(line[::1] for line in lines[::8])
    colours = {pixels[index : index + 3] for index in range(0, len(pixels), channels)}
    return sum(pixels[::channels]) / (len(pixels) / channels), len(colours)


def _unfiltered(kind: int, line: bytearray, above: bytearray, channels: int) -> bytearray:
    """One line of a PNG, by its filter (RFC 2083, section 6)."""
    for index in range(len(line)):
        left = line[index - channels] if index >= channels else 0
        corner = above[index - channels] if index >= channels else 0
        up = above[index]
        if kind == 1:
            line[index] = (line[index] + left) & 255
        elif kind == 2:
            line[index] = (line[index] + up) & 255
        elif kind == 3:
            line[index] = (line[index] + (left + up) // 2) & 255
        elif kind == 4:
            guess = left + up - corner
            near = min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))
            line[index] = (line[index] + near[2]) & 255
    return line


async def test_every_plot_is_drawn_without_a_complaint_or_a_request_elsewhere(browser: Chromium, view: str) -> None:
    """Each plot has shapes of real size; the console is silent; nothing but the view itself is asked."""
    await browser.open(view)
    drawn = await browser.evaluate(
        "[...document.querySelectorAll('[data-plot]')].map(p => [p.closest('[data-panel]').dataset.panel,"
        " Math.max(...[...p.querySelectorAll('path')].map(x => x.getBoundingClientRect().width)),"
        " Math.max(...[...p.querySelectorAll('path')].map(x => x.getBoundingClientRect().height))])"
    )
    assert [name for name, _, _ in drawn] == PLOTS
    assert all(width > 150 and height > 20 for _, width, height in drawn), drawn
    await asyncio.sleep(2.5)
    assert browser.complaints == []
    assert {url.split("/")[2] for url in browser.requests if not url.startswith("about:")} == {view.split("/")[2]}


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (1920, 1080), (3840, 2160), (420, 900)])
async def test_the_page_fits_its_window(browser: Chromium, view: str, tmp_path: Path, width: int, height: int) -> None:
    """From a phone to a wall nothing hangs over the side, and no text is smaller than 11 pixels."""
    await browser.open(view, width=width, height=height)
    assert await browser.evaluate(OVERFLOW) == 0
    smallest = await browser.evaluate(
        "Math.min(...[...document.querySelectorAll('main *')].filter(e => e.childNodes.length && e.textContent.trim())"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 11
    outside = await browser.evaluate(
        "[...document.querySelectorAll('.panel')].filter(p => [...p.querySelectorAll(':scope > .body > *')]"
        ".some(e => e.getBoundingClientRect().right > p.getBoundingClientRect().right + 1)).map(p => p.id)"
    )
    assert outside == []


async def test_light_and_dark_follow_the_system_and_the_reader(browser: Chromium, view: str, tmp_path: Path) -> None:
    """The system decides, `t` switches, and the choice lasts beyond the page."""
    await browser.open(view, dark=False)
    light, colours = shades(await browser.picture(tmp_path / "light.png"))
    await browser.open(view, dark=True)
    dark, _ = shades(await browser.picture(tmp_path / "dark.png"))
    assert light > 200
    assert dark < 60
    assert colours > 50
    await browser.key("t")
    await browser.open(view, dark=True)
    switched, _ = shades(await browser.picture(tmp_path / "switched.png"))
    assert switched > 200
    themed, _ = shades(await _themed(browser, view, tmp_path))
    assert themed < 60


async def _themed(browser: Chromium, view: str, tmp_path: Path) -> bytes:
    """A wall's address may name the theme, whatever was chosen before."""
    await browser.open(f"{view}/?theme=dark", dark=False)
    return await browser.picture(tmp_path / "themed.png")


async def test_text_has_contrast_in_both_themes(browser: Chromium, view: str) -> None:
    """Every text stands out from what it lies on by 4.5 to 1, as WCAG 2 asks (relative luminance, section 1.4.3)."""
    script = (Path(__file__).parent / "contrast.js").read_text()
    for dark in (False, True):
        await browser.open(view, dark=dark)
        assert await browser.evaluate(script) == []


async def test_the_cursor_reads_every_plot_at_once_and_so_do_the_arrow_keys(browser: Chromium, view: str) -> None:
    """Pointing at one plot shows the same moment in all legends; the keys walk; leaving shows the newest again."""
    await browser.open(f"{view}/?range=6h")
    legend = "document.querySelector('#panel-latency .legend output').textContent"
    time_of = "document.querySelector('#panel-tokens .cursor').dataset.time"
    newest = await browser.evaluate(legend)
    x, y = await browser.middle("#panel-requests .canvas")
    await browser.point(x, y)
    assert not await browser.evaluate("document.querySelector('#panel-tokens .cursor').hidden")
    middle = await browser.evaluate(time_of)
    row = "[...document.querySelectorAll('#panel-latency tbody tr')].find(r => r.cells[0].textContent.endsWith('%s'))"
    assert await browser.evaluate(legend) == await browser.evaluate(f"({row % middle}).cells[1].textContent")
    await browser.point(5, 5)
    assert await browser.evaluate(legend) == newest
    await browser.evaluate("document.querySelector('#panel-latency [data-plot]').focus()")
    for _ in range(3):
        await browser.key("ArrowLeft")
    rows = await browser.evaluate("document.querySelectorAll('#panel-latency tbody tr').length")
    third = await browser.evaluate(
        f"document.querySelectorAll('#panel-latency tbody tr')[{rows - 4}].cells[0].textContent.slice(11)"
    )
    assert await browser.evaluate(time_of) == third


async def test_a_finding_opens_in_a_drawer_and_closes_with_escape(browser: Chromium, view: str) -> None:
    """A click keeps the overview; the drawer has the runbook and a working copy button; Escape gives the focus back."""
    await browser.open(view)
    x, y = await browser.middle("#panel-findings a[data-finding]")
    await browser.point(x, y, click=True)
    await browser.until("document.querySelector('#drawer article')")
    said = await browser.evaluate("document.querySelector('#drawer').innerText")
    assert "What to check first" in said
    assert "inferwatch backtest" in said
    assert await browser.evaluate("document.activeElement.id") == "drawer"
    assert await browser.evaluate("!document.querySelector('#drawer [data-copy]').hidden")
    await browser.key("Escape")
    assert await browser.evaluate("document.querySelector('#drawer').hidden")
    assert await browser.evaluate("document.activeElement.matches('[data-finding]')")
    assert await browser.evaluate("location.pathname") == "/"
    assert browser.complaints == []


async def test_a_mark_on_the_time_axis_leads_to_its_finding(browser: Chromium, view: str) -> None:
    """The dot under a plot is a link like the row of the table."""
    await browser.open(f"{view}/?range=6h")
    x, y = await browser.middle("#panel-latency .mark circle")
    await browser.point(x, y, click=True)
    await browser.until("document.querySelector('#drawer article')")
    assert "4.7 times as long per token" in await browser.evaluate("document.querySelector('#drawer h1').textContent")


class Switchable:
    """A store that can be switched off."""

    def __init__(self, store: StoreProcess) -> None:
        self.store = store
        self.down = False
        self.asked = 0

    def __call__(self, sql: str, parameters: Mapping[str, object]) -> list[dict[str, object]]:
        self.asked += 1
        if self.down:
            raise ConnectionRefusedError
        return self.store.query(sql, parameters)


async def test_panels_refresh_tell_of_trouble_and_recover(browser: Chromium, looked_at: StoreProcess) -> None:
    """The page refreshes by itself; a store that goes down shows in the panels and is forgotten once it is back;
    a view that goes away is told in the bar, and what was known stays on the page."""
    store = Switchable(looked_at)
    config = DashboardsConfig(port=0, refresh_s=1, default_range="6h")
    runner, url = await serve_view(make_view(store, config), config)
    await browser.open(url)
    await browser.evaluate("document.querySelector('#panel-latency').dataset.old = 'yes'")
    await browser.until("!document.querySelector('#panel-latency').dataset.old")
    store.down = True
    await browser.until("document.querySelectorAll('.panel.trouble').length > 10")
    store.down = False
    await browser.until("document.querySelectorAll('.panel.trouble').length === 0")
    await browser.key("p")
    await asyncio.sleep(1.5)
    before = store.asked
    await asyncio.sleep(2.5)
    assert store.asked == before
    await browser.key("p")
    await runner.cleanup()
    await browser.until("document.documentElement.classList.contains('stale')")
    assert "No answer from the view" in await browser.evaluate("document.querySelector('#live').textContent")
    assert await browser.evaluate("document.querySelectorAll('[data-plot]').length") == len(PLOTS)


async def test_the_page_is_whole_without_script(browser: Chromium, view: str) -> None:
    """With JavaScript off, panels, plots, links and the time form are there."""
    await browser.call("Emulation.setScriptExecutionDisabled", value=True)
    await browser.open(view)
    await browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert await browser.evaluate("document.querySelectorAll('[data-plot] path').length") >= len(PLOTS)
    assert await browser.evaluate("document.querySelectorAll('button:not([hidden])').length") == 1
