"""A headless Chromium, driven over its DevTools protocol: what a page asks for, what it complains of, what it shows."""

import asyncio
import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Self

from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType

CHROMIUM = shutil.which("chromium")
START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 60.0


class Chromium:
    """One browser with one page. Use as `async with Chromium(folder) as browser:`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._session = ClientSession()
        self._socket: ClientWebSocketResponse | None = None
        self._listening: asyncio.Task[None] | None = None
        self._awaited: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = asyncio.Event()
        self._count = 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        """Console errors and warnings, uncaught exceptions, and what the page's policy refused."""

    async def __aenter__(self) -> Self:
        assert CHROMIUM is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        options = (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0",
            "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={self._folder}", "about:blank",
        )  # fmt: skip
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen([CHROMIUM, *options], stdout=log, stderr=log)  # noqa: ASYNC220  # at once
        async with asyncio.timeout(START_TIMEOUT_S):
            while not (told := self._port_file()):  # noqa: ASYNC110  # a file can only be looked for
                await asyncio.sleep(0.1)
            base = f"http://127.0.0.1:{told}"
            while not (pages := [t for t in await self._targets(base) if t["type"] == "page"]):  # noqa: ASYNC110  # likewise
                await asyncio.sleep(0.1)
        self._socket = await self._session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=64 * 1024 * 1024)
        self._listening = asyncio.create_task(self._listen(self._socket))
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.call(f"{domain}.enable")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._listening is not None:
            self._listening.cancel()
        await self._session.close()
        if self._process is not None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, 10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)

    def _port_file(self) -> str:
        try:
            return (self._folder / "DevToolsActivePort").read_text().splitlines()[0]
        except (OSError, IndexError):
            return ""

    async def _targets(self, base: str) -> list[dict[str, Any]]:
        async with self._session.get(f"{base}/json/list") as answer:
            targets: list[dict[str, Any]] = await answer.json()
            return targets

    async def _listen(self, socket: ClientWebSocketResponse) -> None:
        async for message in socket:
            if message.type is not WSMsgType.TEXT:
                continue
            told = json.loads(message.data)
            if "id" in told:
                self._awaited.pop(told["id"]).set_result(told)
            else:
                self._note(told["method"], told["params"])

    def _note(self, method: str, told: dict[str, Any]) -> None:
        match method:
            case "Network.requestWillBeSent":
                self.requests.append(told["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(told["exceptionDetails"])[:500])
            case "Log.entryAdded" if told["entry"]["level"] in ("error", "warning"):
                self.complaints.append(told["entry"]["text"])
            case "Runtime.consoleAPICalled" if told["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(told["args"])[:500])
            case "Page.loadEventFired":
                self._loaded.set()
            case _:
                pass

    async def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """One command of the protocol."""
        assert self._socket is not None
        self._count += 1
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._awaited[self._count] = answer
        await self._socket.send_json({"id": self._count, "method": method, "params": parameters})
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            told = await answer
        assert "error" not in told, told
        result: dict[str, Any] = told["result"]
        return result

    async def open(self, url: str, *, width: int = 1440, height: int = 900, dark: bool | None = None) -> None:
        """Loads a page in a window of that size, and waits until its script is ready."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {None: "", True: "dark", False: "light"}[dark]
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._loaded.clear()
        await self.call("Page.navigate", url=url)
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await self._loaded.wait()

    async def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        told = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def until(self, script: str, timeout_s: float = 15.0) -> None:
        """Waits until an expression in the page is true."""
        async with asyncio.timeout(timeout_s):
            while not await self.evaluate(f"Boolean({script})"):  # noqa: ASYNC110  # as is the page
                await asyncio.sleep(0.05)

    async def key(self, key: str) -> None:
        """Presses a key."""
        for kind in ("rawKeyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 and kind == "rawKeyDown" else {}
            kind = "keyDown" if text else kind  # noqa: PLW2901  # a key that writes is told as such
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, **text)

    async def point(self, x: float, y: float, *, click: bool = False) -> None:
        """Moves the mouse there, and clicks."""
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def middle(self, selector: str) -> tuple[float, float]:
        """Where the middle of an element is, once it is scrolled into sight."""
        box = await self.evaluate(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
            f" return [b.x + b.width / 2, b.y + b.height / 2]; }})(document.querySelector({json.dumps(selector)}))"
        )
        return box[0], box[1]

    async def picture(self, file: Path) -> bytes:
        """A PNG of what the window shows, also written to `file`."""
        png = base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])
        await asyncio.to_thread(file.write_bytes, png)
        return png
