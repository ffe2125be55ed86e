"""Reads the bodies of requests to servers that can't be asked how they read them. Pure.

Two rules close what a second parser may read otherwise. Ollama is written in Go, whose JSON decoder takes `Prompt` and
`prompt` for the same field, the last one winning: a known field in any other spelling is refused, and so are two keys
that differ by case alone. And servers have prompt fields that this file has never heard of: every string under a
top-level key that is not known to be harmless is judged as a user's words.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Final

from collector import prompt
from collector.audit import EngineRequest
from collector.prompt import Body, PromptView, Turn
from collector.prompt_words import DEPTH_MAX, TooDeep, strings
from collector.requests import Refusal

_FREE: Final = frozenset(
    {"parameters", "arguments", "properties", "schema", "json_schema", "format", "input_schema", "metadata"}
    | {"logit_bias", "options", "chat_template_kwargs", "response_format", "$defs"}
)
"""Below these keys stand names that the client's application made up."""
_PROMPTS: Final = frozenset(
    {"messages", "prompt", "input", "instructions", "system", "template", "suffix", "context", "tools", "functions"}
    | {"documents", "chat_template", "chat_template_kwargs", "query", "text_1", "text_2"}
)
_FRAME: Final = frozenset({"tools", "functions", "chat_template"})
_CHAT: Final = _FRAME | {"messages", "documents", "chat_template_kwargs"}
_SCORED: Final = frozenset({"query", "text_1", "text_2", "documents"})
_READ: Final[Mapping[str, frozenset[str]]] = {
    "chat": _CHAT,
    "completion": frozenset({"prompt", "suffix"}),
    "responses": _FRAME | {"input", "instructions", "previous_input_messages"},
    "messages": _FRAME | {"messages", "system"},
    "generate": frozenset({"system", "template", "prompt", "suffix"}),
    "rerank": _SCORED,
    "score": _SCORED,
}
"""What is read of a body, by operation; a prompt's field where another operation has it may be read by a server too."""
_COUNTS: Final = ("n", "max_tokens", "max_completion_tokens", "max_output_tokens")
_N_MAX: Final = 65_536
_TOKENS_MAX: Final = 2**53
_SETTINGS: Final = frozenset(
    {"model", "user", "session_id", "stop", "stream", "stream_options", "tool_choice", "metadata", "service_tier"}
    | {"temperature", "top_p", "top_k", "n", "max_tokens", "max_completion_tokens", "max_output_tokens", "seed", "echo"}
    | {"logit_bias", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty", "best_of", "store"}
    | {"encoding_format", "dimensions", "truncate", "truncation", "keep_alive", "options", "think", "raw", "shift"}
    | {"reasoning", "reasoning_effort", "thinking", "text", "include", "parallel_tool_calls", "modalities", "format"}
    | {"prompt_cache_key", "safety_identifier", "verbosity", "add_generation_prompt", "top_n", "return_documents"}
    | {"stop_sequences", "images", "response_format", "background", "use_beam_search", "container", "betas"}
)
_KNOWN: Final = (
    _PROMPTS
    | _SETTINGS
    | {"role", "content", "name", "type", "text", "image_url", "function", "tool_calls", "tool_name", "tool_call_id"}
)


def read(operation: str, body: Body) -> tuple[PromptView, ...]:
    """The prompts of a body, as `collector.prompt.views` gives them.

    Raises `Refusal` for a body that two parsers may read in two ways, and `TooDeep`.
    """
    _check_keys(body, 0)
    if any(key.startswith("_") for key in body):
        raise Refusal(400, "private_field", "The request's body has a field that is not for clients.")
    _check_types(body)
    if body.get("context"):
        return ()  # token ids of any text: no guard can read them
    found = _READERS.get(operation, _shared)(operation, body)
    aside = _aside(body, _read_of(operation, body))
    if not aside:
        return found
    return tuple(PromptView((*view.turns, Turn("user", aside)), "messages") for view in found)


def _check_keys(value: object, depth: int) -> None:
    if depth > DEPTH_MAX:
        raise TooDeep
    if isinstance(value, list):
        for entry in value:
            _check_keys(entry, depth + 1)
    elif isinstance(value, dict):
        folded = [key.casefold() for key in value]
        odd = any(fold in _KNOWN and fold != key for key, fold in zip(value, folded, strict=True))
        if odd or len(set(folded)) != len(folded):
            raise Refusal(400, "odd_key", "The request's body has a key that can be taken for another one.")
        for key, entry in value.items():
            if key not in _FREE and not (key == "input" and depth and isinstance(entry, dict)):
                _check_keys(entry, depth + 1)


def _check_types(body: Body) -> None:
    """What the event says of a request must be what the server takes it for: some take 1 for true and "2" for 2."""
    stream, options = body.get("stream"), body.get("stream_options")
    good = isinstance(stream, bool | None) and isinstance(options, dict | None)
    if not good or any(body.get(name) is not None and not _whole(body[name]) for name in _COUNTS):
        raise Refusal(400, "odd_type", "The request's body has a field of another type than it has in this API.")


def _whole(value: object) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def _read_of(operation: str, body: Body) -> frozenset[str]:
    """The fields that the operation's reader reads."""
    if operation != "embedding":
        return _READ.get(operation, frozenset())
    if "prompt" in body and "input" not in body:
        return frozenset({"prompt"})
    return _CHAT if "messages" in body else frozenset({"input"})


def _aside(body: Body, read_: frozenset[str]) -> str:
    """What stands where nobody looks for a prompt."""
    return "\n".join(
        chain.from_iterable(strings(entry) for key, entry in body.items() if key not in read_ and key not in _SETTINGS)
    )


def _shared(operation: str, body: Body) -> tuple[PromptView, ...]:
    """The operations that vLLM has too. Ollama's images are a field of the message."""
    messages = body.get("messages")
    if operation == "chat" and isinstance(messages, list):
        body = {**body, "messages": [_without_images(message) for message in messages]}
    found = prompt.views(operation, body)
    suffix = body.get("suffix")
    if operation == "completion" and isinstance(suffix, str) and suffix:
        return tuple(PromptView((*view.turns, Turn("user", suffix)), "messages") for view in found)
    return found


def _without_images(message: object) -> object:
    return {k: v for k, v in message.items() if k != "images"} if isinstance(message, dict) else message


def _generate(_operation: str, body: Body) -> tuple[PromptView, ...]:
    """Ollama's. A template is the client's own words too, whatever the model's says."""
    named = {name: body.get(name) or "" for name in ("system", "template", "prompt", "suffix")}
    if not all(isinstance(text, str) for text in named.values()):
        return ()
    turns = [Turn("system" if name == "system" else "user", str(text)) for name, text in named.items() if text]
    return (PromptView(tuple(turns), "messages"),)


def _embedding(operation: str, body: Body) -> tuple[PromptView, ...]:
    """Ollama's older route names its text `prompt`."""
    return prompt.views("completion" if "prompt" in body and "input" not in body else operation, body)


def _scoring(_operation: str, body: Body) -> tuple[PromptView, ...]:
    """One view: a question, and the texts that are scored by it."""
    asked = [Turn("user", text) for name in ("query", "text_1", "text_2") for text in strings(body.get(name))]
    turns = [*asked, *(Turn("document", text) for text in strings(body.get("documents")))]
    return (PromptView(tuple(turns), "messages"),) if turns else ()


_READERS: Final = {"generate": _generate, "embedding": _embedding, "rerank": _scoring, "score": _scoring}


def requests(operation: str, body: Body, *, native: bool) -> Iterator[EngineRequest]:
    """One engine request for each prompt in the body, or one without text where its prompts can't be read.

    `native`: Ollama's own API, which streams unless told otherwise. Raises as `read` does.
    """
    found: tuple[PromptView | None, ...] = read(operation, body)
    stream = body.get("stream")
    settings: dict[str, Any] = {
        "max_tokens": _max_tokens(body),
        "n": _count(body.get("n"), _N_MAX) or 1,
        "stream": stream is True or (native and stream is None and operation != "embedding"),
    }
    for view in found or (None,):
        text = None if view is None else "\n".join(turn.whole for turn in view.turns)
        yield EngineRequest(operation, text, **settings)


def _max_tokens(body: Body) -> int:
    options = body.get("options")
    asked = [body.get(name) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")]
    asked += [options.get("num_predict")] if isinstance(options, Mapping) else []
    return max(_count(value, _TOKENS_MAX) for value in asked)


def _count(value: object, most: int) -> int:
    return min(max(int(value), 0), most) if isinstance(value, int | float) and _whole(value) else 0
