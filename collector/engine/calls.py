"""Reads the arguments of an engine call: what is asked, as text, with which adapter and which media.

A prompt that comes as token ids is decoded, however deep it was nested in the request's body: the server hands the
engine one flat list for each prompt.
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, NamedTuple

import structlog
from vllm.exceptions import GracefulHTTPError

from collector.adapters import AdapterRefused
from collector.audit import Blocked, EngineRequest, Unaudited
from collector.engine.process import current
from collector.event import Adapter, Media

log = structlog.get_logger(__name__)

_MODALITIES: Final[Mapping[str, Any]] = {"image": "image", "audio": "audio", "video": "video"}


class Call(NamedTuple):
    """What the wrappers need of the arguments."""

    prompt: object
    params: Any
    request_id: str
    lora_request: Any

    @classmethod
    def of(cls, params_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Call":
        """Of `generate` and `encode`: prompt, parameters and id by place or by name."""
        return cls(
            args[0] if args else kwargs.get("prompt"),
            args[1] if len(args) > 1 else kwargs.get(params_name),
            str(args[2] if len(args) > 2 else kwargs.get("request_id")),
            args[3] if len(args) > 3 else kwargs.get("lora_request"),
        )


class Refusing:
    """Turns whatever fails while a request is begun into the HTTP error that the client gets: 403 or 503."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Blocked):
            raise GracefulHTTPError(str(error), HTTPStatus.FORBIDDEN) from None
        if isinstance(error, Exception):
            if not isinstance(error, Unaudited):
                # By its class alone: message and trace may quote the prompt.
                log.error("the engine plugin failed and the request is refused", error=type(error).__name__)
            raise GracefulHTTPError(str(Unaudited()), HTTPStatus.SERVICE_UNAVAILABLE) from None


refusing: Final = Refusing()


def engine_request(engine: Any, operation: str, call: Call) -> EngineRequest:
    """What is known of a request before the engine sees it."""
    prompt = call.prompt.get("decoder_prompt", call.prompt) if isinstance(call.prompt, dict) else call.prompt
    token_ids: Sequence[int] = ()
    text: str | None = None
    if isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, dict):
        token_ids, text = prompt.get("prompt_token_ids") or (), prompt.get("prompt")
        if "prompt_embeds" in prompt:
            text = None  # vectors say more than the tokens beside them
        elif text is None and token_ids:
            text = decode(engine, token_ids)
    elif isinstance(prompt, list | tuple) and all(isinstance(token, int) for token in prompt):
        token_ids, text = prompt, decode(engine, prompt)
    elif hasattr(prompt, "prompt_token_ids"):
        token_ids = prompt.prompt_token_ids or ()
        text = decode(engine, token_ids) if token_ids else None
    output_kind = getattr(call.params, "output_kind", None)
    return EngineRequest(
        operation,
        text,
        prompt_tokens=len(token_ids),
        max_tokens=getattr(call.params, "max_tokens", None) or 0,
        n=getattr(call.params, "n", None) or 1,
        stream=output_kind is not None and output_kind.name == "DELTA",
        adapter=_adapter(call.lora_request),
        adapter_refused=_refused(call.lora_request),
        media=_media(call.prompt),
    )


def decode(engine: Any, token_ids: Sequence[int]) -> str:
    """The text of token ids."""
    return str(engine.get_tokenizer().decode(list(token_ids)))


def _adapter(lora_request: Any) -> Adapter | None:
    if lora_request is None:
        return None
    name = str(lora_request.lora_name)[:256]
    return Adapter(name=name, digest="" if _refused(lora_request) else current.adapters.admit(lora_request.lora_path))


def _refused(lora_request: Any) -> bool:
    if lora_request is None:
        return False
    try:
        current.adapters.admit(str(lora_request.lora_path))
    except AdapterRefused:
        return True
    return False


def _media(prompt: object) -> tuple[Media, ...]:
    """What the engine was given beside text, by its own digests: they are not keyed, so they are hashed again later."""
    hashes = prompt.get("mm_hashes") if isinstance(prompt, dict) else None
    if hashes is None:
        features = getattr(prompt, "mm_features", None) or ()
        return tuple(
            Media(kind=_MODALITIES.get(feature.modality, "file"), source="engine", digest=str(feature.identifier)[:80])
            for feature in features
        )
    return tuple(
        Media(kind=_MODALITIES.get(modality, "file"), source="engine", digest=str(digest)[:80])
        for modality, digests in hashes.items()
        for digest in digests
    )
