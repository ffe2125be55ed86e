"""Passes one answer on from the server behind to the client, and writes the events of its prompts at the right moment.

Without a guard on answers a stream's frames go on as they come; with one they are held back as far as it needs
(`collector.watch`). In each case the events are written before the last byte goes out.
"""

import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Final

import orjson

from collector.answers import FILTERED
from collector.audit import Audit, Counted, Timing, Unaudited
from collector.auditor import Auditor
from collector.event import GuardResult, Status
from collector.proxy_answers import Seen, usage_alone
from collector.proxy_frames import Frame, Frames, Garbled
from collector.proxy_routes import Api
from collector.proxy_upstream import Answer, UpstreamFailed
from collector.proxy_withheld import stream as withheld_stream
from collector.proxy_withheld import whole as withheld_whole
from collector.requests import Refusal
from collector.watch import Watch

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_NOTHING: Final[Mapping[str, object]] = {}
_ERROR_BYTES_MAX: Final = 65_536
_STREAMS: Final = frozenset({"text/event-stream", "application/x-ndjson"})


class Relay:
    """One answer. `audits`: the begun requests that it answers, in the order of their prompts.

    `pass_on` once; where it raises, `fail` or `refuse` ends the answer; `drop` in any case.
    """

    def __init__(self, auditor: Auditor, api: Api, send: Send) -> None:
        self.audits: list[Audit] = []
        self.hides_usage = False
        """Whether the client did not ask for the counts that the stream will hold."""
        self._auditor, self._api, self._send = auditor, api, send
        self._judged = "output" in auditor.stages and api not in ("vectors", "management")
        self._seen = Seen(api, keep_text=self._judged)
        self._verdicts: Sequence[GuardResult] = ()
        """On what was judged of a stream."""
        self._streaming = ""
        """The type of the stream that has begun to go out."""
        self._first_s = self._last_s = 0.0

    async def pass_on(self, answer: Answer) -> None:
        """The whole answer. Raises UpstreamFailed and Unaudited."""
        if answer.status >= 400:
            await self._refused(answer)
        elif answer.type in _STREAMS:
            await self._stream(answer)
        else:
            await self._whole(answer)

    async def fail(self, failure: UpstreamFailed) -> None:
        """The server behind failed: an error of ours, or the end of the stream that says so."""
        await self.refuse(Refusal(failure.status, failure.reason, str(failure)), failure.reason, status="error")

    async def refuse(self, refusal: Refusal, reason: str, *, status: Status = "aborted") -> None:
        """End the answer otherwise; prompts that are begun get events with `reason`."""
        try:
            self._close(status, reason=reason, http_status=refusal.status)
        except Unaudited as unaudited:
            refusal = Refusal(503, "unaudited", str(unaudited))
        if not self._streaming:
            await answer_json(self._send, refusal.status, refusal.body())
            return
        error = refusal.body()
        if self._streaming != "text/event-stream":
            last = orjson.dumps({"error": refusal.sentence}) + b"\n"
        else:
            last = (b"event: error\n" if self._api == "messages" else b"") + b"data: " + error + b"\n\n"
        await self._send({"type": "http.response.body", "body": last})

    def drop(self) -> None:
        """What has no event yet gets one: the client has gone."""
        with contextlib.suppress(Unaudited):
            self._close("aborted", verdicts=self._verdicts, reason="client gone")

    # -- whole answers

    async def _refused(self, answer: Answer) -> None:
        """The server's own refusal: its words are for the client, who asked; its headers are not."""
        raw = await answer.whole()
        reason = "upstream_refused" if answer.status < 500 else "upstream_failed"
        try:
            told = orjson.dumps(orjson.loads(raw)) if len(raw) <= _ERROR_BYTES_MAX else b""
        except ValueError:
            told = b""
        self._close("error", reason=reason, http_status=answer.status)
        told = told or Refusal(answer.status, reason, str(UpstreamFailed(answer.status, reason))).body()
        after = answer.retry_after if re.fullmatch("[0-9]{1,5}", answer.retry_after) else ""
        await answer_json(self._send, answer.status, told, [(b"retry-after", after.encode())] if after else [])

    async def _whole(self, answer: Answer) -> None:
        raw = await answer.whole()
        try:
            said = orjson.loads(raw)
            for entry in said if isinstance(said, list) else [said]:
                if not isinstance(entry, dict):
                    raise UpstreamFailed(502, "upstream_garbled")
                self._seen.see(entry)
        except ValueError:  # Garbled is one
            raise UpstreamFailed(502, "upstream_garbled") from None
        verdicts, blocked = await self._judge()
        if blocked:
            raw = orjson.dumps(withheld_whole(self._api, self._seen, self._auditor.gate.blocked_text))
        self._close("blocked_output" if blocked else "ok", verdicts=verdicts, http_status=200)
        await answer_json(self._send, 200, raw)

    # -- streams

    async def _stream(self, answer: Answer) -> None:
        frames = Frames(answer.type)
        watch: Watch[bytes] = Watch(self._auditor, self.audits[0] if self._judged and self.audits else None)
        try:
            async for piece in answer.pieces():
                await self._pass(answer.type, frames.feed(piece), watch)
                if watch.blocked:
                    break
            watch.shut()
            await self._pass(answer.type, iter(()) if watch.blocked else frames.end(), watch)
        except Garbled:
            raise UpstreamFailed(502, "upstream_garbled") from None
        late = watch.blocked
        if not late and not self._seen.finished and not self._seen.failed and self._api != "management":
            raise UpstreamFailed(502, "upstream_broke")
        verdicts, blocked = await watch.judge(self._seen.texts())
        last = b"".join(watch.held)
        if blocked:
            text, begun = self._auditor.gate.blocked_text, bool(self._streaming)
            last = withheld_stream(self._api, self._seen, text, begun=begun)
        status: Status = "blocked_output" if blocked else "error" if self._seen.failed else "ok"
        reason = "upstream_failed" if status == "error" else ""
        finish = FILTERED if late else ""
        self._close(status, verdicts=verdicts, reason=reason, http_status=200, finish=finish, told=watch.told)
        await self._out(answer.type, last, more=False)

    async def _pass(self, content_type: str, frames: Iterator[Frame], watch: "Watch[bytes]") -> None:
        """Take frames in, and let out what may go."""
        for frame in frames:
            if not self._keeps(frame):
                continue
            if frame.last or (self._seen.finished if self._judged else self._seen.ended or self._seen.failed):
                watch.shut()
            watch.put(frame.raw, self._seen.pieces if frame.said is not None else ())
        ready = b"".join(await watch.ready())
        self._verdicts = watch.verdicts
        if ready:
            await self._out(content_type, ready)

    def _keeps(self, frame: Frame) -> bool:
        """Take note of a frame; whether the client is to have it."""
        if frame.said is None:
            self._seen.ended = self._seen.ended or (frame.last and bool(self._seen.finish_reason))
            return True
        if self._seen.see(frame.said):
            self._last_s = self._auditor.clock_s()
            self._first_s = self._first_s or self._last_s
            for audit in self.audits:
                audit.saw_tokens()
        return not (self.hides_usage and usage_alone(frame.said))

    async def _out(self, content_type: str, body: bytes, *, more: bool = True) -> None:
        if not self._streaming:
            self._streaming = content_type
            headers = [(b"content-type", content_type.encode()), (b"cache-control", b"no-store")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    # -- events

    async def _judge(self) -> tuple[Sequence[GuardResult], bool]:
        if not self._judged or not self.audits:
            return (), False
        return await self._auditor.threads.run(self.audits[0].judge, self._seen.texts())

    def _close(
        self,
        status: Status,
        *,
        verdicts: Sequence[GuardResult] = (),
        reason: str = "",
        http_status: int = 0,
        finish: str = "",
        told: Mapping[str, object] = _NOTHING,
    ) -> None:
        """Write the events that are not written yet. Raises Unaudited."""
        seen, several = self._seen, len(self.audits)
        spans = seen.token_count > 1 and self._last_s > self._first_s
        spread = (self._last_s - self._first_s) * 1000 / (seen.token_count - 1) if spans else None
        for place, audit in enumerate(self.audits):
            counts = {
                "prompt_tokens": _share(seen.prompt_tokens, place, several),
                "tokens_from": "shared" if several > 1 else seen.tokens_from,
            }
            audit.close(
                status,
                answer=Counted(_share(seen.token_count, place, several), finish or seen.finish_reason),
                verdicts=verdicts,
                timing=Timing(ms_per_output_token=spread),
                reason=reason,
                http_status=http_status,
                told={**counts, **told},
            )


def _share(total: int, place: int, several: int) -> int:
    """A prompt's share of a count that the server gives for all of them; the shares add up."""
    return total // several + (place < total % several)


async def answer_json(send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """One whole answer."""
    basics = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*basics, *headers]})
    await send({"type": "http.response.body", "body": body})
