"""What stands in place of an answer that a guard has blocked, in the shape of each API, whole and as a stream.

Pure. Shapes: OpenAI's chat, completions and responses with `content_filter`, Anthropic's messages with the stop reason
`refusal`, Ollama's with `done_reason` `content_filter`. Of the model's own answer only ids, names and counts remain.
"""

import json
from collections.abc import Mapping
from typing import Any

from collector.answers import FILTERED
from collector.proxy_answers import Seen
from collector.proxy_routes import Api


def whole(api: Api, seen: Seen, fixed_text: str) -> dict[str, Any]:
    """The answer to a request that did not stream."""
    counts = {"prompt_tokens": seen.prompt_tokens, "completion_tokens": seen.token_count}
    usage = {**counts, "total_tokens": sum(counts.values())}
    if api == "chat":
        return {**seen.head, "object": "chat.completion", "choices": _choices(seen, fixed_text), "usage": usage}
    if api == "completion":
        texts = [_completed(index, fixed_text) for index in range(seen.choices)]
        return {**seen.head, "object": "text_completion", "choices": texts, "usage": usage}
    spent = {"input_tokens": seen.prompt_tokens, "output_tokens": seen.token_count}
    if api == "responses":
        part = {"type": "output_text", "text": fixed_text, "annotations": []}
        item = {"type": "message", "id": "msg_0", "role": "assistant", "status": "incomplete", "content": [part]}
        spent["total_tokens"] = sum(spent.values())
        details = {"reason": FILTERED}
        return {
            "created_at": 0,
            **_of_response(seen),
            "object": "response",
            "status": "incomplete",
            "incomplete_details": details,
            "output": [item],
            "usage": spent,
            "error": None,
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": False,
        }
    if api == "messages":
        content = [{"type": "text", "text": fixed_text}]
        ended = {"stop_reason": "refusal", "stop_sequence": None, "usage": spent}
        return {**_of_message(seen), "type": "message", "role": "assistant", "content": content, **ended}
    said = {"response": fixed_text} if api == "ollama-generate" else {"message": _message(fixed_text)}
    counted = {"prompt_eval_count": seen.prompt_tokens, "eval_count": seen.token_count}
    return {**seen.head, **said, "done": True, "done_reason": FILTERED, **counted}


def stream(api: Api, seen: Seen, fixed_text: str, *, begun: bool) -> bytes:
    """The end of a stream; all of it where none was `begun`."""
    answer = whole(api, seen, fixed_text)
    if api in ("ollama-chat", "ollama-generate"):
        return json.dumps(answer).encode() + b"\n"
    if api == "chat":
        deltas = [
            {"index": c["index"], "delta": c["message"], "finish_reason": FILTERED, "logprobs": None}
            for c in answer["choices"]
        ]
        chunk = {**seen.head, "object": "chat.completion.chunk", "choices": deltas}
        return _event(chunk) + b"data: [DONE]\n\n"
    if api == "completion":
        return _event({**seen.head, "object": "text_completion", "choices": answer["choices"]}) + b"data: [DONE]\n\n"
    events = _messages(answer, fixed_text, begun) if api == "messages" else _responses(answer, begun)
    return b"".join(b"event: " + str(event["type"]).encode() + b"\n" + _event(event) for event in events)


def _messages(answer: dict[str, Any], fixed_text: str, begun: bool) -> list[dict[str, Any]]:
    ends: list[dict[str, Any]] = [
        {
            "type": "message_delta",
            "delta": {"stop_reason": "refusal", "stop_sequence": None},
            "usage": {"output_tokens": answer["usage"]["output_tokens"]},
        },
        {"type": "message_stop"},
    ]
    if begun:
        return ends
    return [
        {"type": "message_start", "message": {**answer, "content": [], "stop_reason": None}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": fixed_text}},
        {"type": "content_block_stop", "index": 0},
        *ends,
    ]


def _responses(answer: dict[str, Any], begun: bool) -> list[dict[str, Any]]:
    item = answer["output"][0]
    part, bare = item["content"][0], {**item, "content": [], "status": "in_progress"}
    where = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    starts: list[dict[str, Any]] = [
        {"type": "response.created", "response": {**answer, "output": [], "status": "in_progress"}},
        {"type": "response.output_item.added", "output_index": 0, "item": bare},
        {"type": "response.content_part.added", **where, "part": {**part, "text": ""}},
        {"type": "response.output_text.delta", **where, "delta": part["text"], "logprobs": []},
        {"type": "response.output_text.done", **where, "text": part["text"], "logprobs": []},
        {"type": "response.content_part.done", **where, "part": part},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
    ]
    events = [*([] if begun else starts), {"type": "response.incomplete", "response": answer}]
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def _of_response(seen: Seen) -> dict[str, Any]:
    return {"id": "resp_withheld", "model": "", **seen.head}


def _of_message(seen: Seen) -> dict[str, Any]:
    return {"id": "msg_withheld", "model": "", **seen.head}


def _choices(seen: Seen, text: str) -> list[dict[str, Any]]:
    return [
        {"index": index, "message": _message(text), "finish_reason": FILTERED, "logprobs": None}
        for index in range(seen.choices)
    ]


def _completed(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "finish_reason": FILTERED, "logprobs": None}


def _message(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _event(frame: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(frame).encode() + b"\n\n"
