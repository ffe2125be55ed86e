"""Reads the answers of servers that are not wrapped from within: their texts, their token counts, how they ended.

Works on parsed JSON of any of the APIs in `proxy_routes`: a whole answer, or one frame of a stream (an SSE event's
`data`, a line of NDJSON). Counts come from where these APIs put them: `usage` (OpenAI, Anthropic), `eval_count`
(Ollama). Every string that is not known to be a label counts as text of the model's, so that fields that come with
later versions are judged too. The arguments of a tool are the model's own making: as JSON they are one text, with names
and numbers. Memory: the text of one answer, where a guard judges it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import orjson

from collector.holdback import Piece
from collector.proxy_frames import Garbled
from collector.proxy_routes import Api

Frame = Mapping[str, Any]
Path = tuple[object, ...]

_LABELS: Final = frozenset(
    {"id", "object", "model", "created", "created_at", "role", "type", "index", "finish_reason", "done_reason"}
    | {"stop_reason", "stop_sequence", "system_fingerprint", "service_tier", "usage", "status", "item_id", "call_id"}
    | {"logprobs", "instructions", "tools", "tool_choice", "metadata", "user", "timings"}
    | {"remote_model", "remote_host", "encrypted_content", "signature", "incomplete_details", "reasoning_effort"}
)
_ARGUMENTS: Final = frozenset({"input", "arguments"})
_DEPTH_MAX: Final = 32
_FINISHES: Final[Mapping[str, str]] = {
    "stop": "stop", "end_turn": "stop", "stop_sequence": "stop", "eos_token": "stop", "eos": "stop",
    "completed": "stop", "unload": "stop", "load": "stop", "length": "length", "max_tokens": "length",
    "max_output_tokens": "length", "tool_calls": "tool_calls", "tool_use": "tool_calls", "function_call": "tool_calls",
    "content_filter": "content_filter", "refusal": "content_filter", "abort": "abort", "error": "error",
    "failed": "error",
}  # fmt: skip
"""What servers say, as the event says it: never their own words."""
_WORST_FIRST: Final = ("error", "abort", "length", "content_filter", "tool_calls", "stop")
_ENDS: Final = frozenset({"response.completed", "response.incomplete", "response.failed", "message_stop"})
_IN: Final = ("prompt_tokens", "input_tokens", "prompt_eval_count")
_OUT: Final = ("completion_tokens", "output_tokens", "eval_count")


class Seen:
    """What is known so far of one answer."""

    def __init__(self, api: Api, *, keep_text: bool) -> None:
        self._api, self._keep = api, keep_text and api != "vectors"
        self._texts: dict[Path, list[str]] = {}
        self._pieces = 0
        self._finishes: set[str] = set()
        self._choices_done: set[int] = set()
        self._choices_open: set[int] = set()
        self.prompt_tokens = self.usage_tokens = 0
        self.counted = self.ended = self.failed = False
        self.choices = 1
        self.pieces: list[Piece] = []
        """The texts of the last frame."""
        self.head: dict[str, Any] = {}
        """The labels of the first frame, for the answer that is put in its place where it is blocked."""

    def see(self, frame: Frame) -> bool:
        """Take note of a whole answer or of a frame; whether the model said anything in it. Raises Garbled."""
        if not self.head:
            self.head = {name: frame[name] for name in ("id", "created", "created_at", "model") if name in frame}
        if frame.get("error"):
            self.failed = True
        self._count(frame)
        self._end(frame)
        said = False
        kind, place = str(frame.get("type", "")), _count(frame.get("output_index"))
        self.pieces.clear()
        for path, text in [] if self._api == "vectors" else _texts(frame, (kind, place)):
            said = said or (bool(text) and "error" not in path)
            if self._keep:
                self._texts.setdefault(path, []).append(text)
                self.pieces.append(Piece(path, text, _choice(path)))
        said = said and not (kind.startswith("response.") and not kind.endswith(".delta"))
        self._pieces += said
        return said

    def _count(self, frame: Frame) -> None:
        for holder in (frame, frame.get("response"), frame.get("message")):
            if not isinstance(holder, dict):
                continue
            usage = holder.get("usage")
            counts = usage if isinstance(usage, dict) else holder
            self.prompt_tokens = max(self.prompt_tokens, *(_count(counts.get(name)) for name in _IN))
            out = [_count(counts[name]) for name in _OUT if name in counts]
            if out:
                self.counted = True
                self.usage_tokens = max(self.usage_tokens, *out)

    def _end(self, frame: Frame) -> None:
        if frame.get("done") is True or str(frame.get("type")) in _ENDS:
            self.ended = True
        self._finish(frame.get("done_reason"))
        self._finish(frame.get("stop_reason"))
        delta, response = frame.get("delta"), frame.get("response", frame)
        if isinstance(delta, dict):
            self._finish(delta.get("stop_reason"))
        if self._api == "responses" and isinstance(response, dict):
            details = response.get("incomplete_details")
            self._finish(details.get("reason") if isinstance(details, dict) else response.get("status"))
        choices = frame.get("choices")
        for choice in choices if isinstance(choices, list) else []:
            if isinstance(choice, dict):
                place = min(_count(choice.get("index")), 4095)
                self.choices = max(self.choices, place + 1)
                self._finish(choice.get("finish_reason"))
                (self._choices_done if choice.get("finish_reason") else self._choices_open).add(place)

    def _finish(self, reason: object) -> None:
        if isinstance(reason, str) and reason and reason not in ("in_progress", "queued"):
            self._finishes.add(_FINISHES.get(reason, "other"))

    @property
    def finished(self) -> bool:
        """Whether the server said that the answer has come to its end, each of its choices where there are several."""
        return self.ended or (bool(self._finishes) and self._choices_open <= self._choices_done)

    @property
    def token_count(self) -> int:
        """Tokens of the model's, by the server's own count, else one for each piece that came."""
        return self.usage_tokens if self.counted else self._pieces

    @property
    def tokens_from(self) -> str:
        """Who counted."""
        if self.counted or self._api == "vectors":
            return "usage"
        return "chunks" if self._pieces > 1 or not self.finished else "unknown"

    @property
    def finish_reason(self) -> str:
        """The worst of the reasons; empty while none was given."""
        return next((reason for reason in _WORST_FIRST if reason in self._finishes), min(self._finishes, default=""))

    def texts(self) -> list[str]:
        """Every text of the answer, its pieces put together."""
        return [text for pieces in self._texts.values() if (text := "".join(pieces))]


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


def _texts(value: object, path: Path, depth: int = 0) -> Iterator[tuple[Path, str]]:
    """Every text within and where it stands: pieces of one text stand at one place in all frames. Raises Garbled."""
    if depth > _DEPTH_MAX:
        raise Garbled("an answer is nested too deeply")
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key in _ARGUMENTS and entry and not isinstance(entry, str):
                yield (*path, key), _json(entry)
            elif key not in _LABELS:
                yield from _texts(entry, (*path, key), depth + 1)
    elif isinstance(value, list):
        for place, entry in enumerate(value):
            index = entry.get("index") if isinstance(entry, dict) else None
            yield from _texts(entry, (*path, index if isinstance(index, int) else place), depth + 1)


def _json(arguments: object) -> str:
    try:
        return orjson.dumps(arguments).decode()
    except orjson.JSONEncodeError:
        raise Garbled("an answer is nested too deeply") from None


def _choice(path: Path) -> int:
    """Of OpenAI's several choices the one that a text is of."""
    place = path[3] if path[2:3] == ("choices",) and len(path) > 3 else 0
    return place if isinstance(place, int) else 0


def usage_alone(frame: Frame) -> bool:
    """Whether a frame of the OpenAI API holds token counts and nothing else."""
    return frame.get("choices") == [] and isinstance(frame.get("usage"), dict)
