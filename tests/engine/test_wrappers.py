"""The wrappers of the offline road round a stand-in for the engine: what each call leaves behind, without a boot."""

from types import SimpleNamespace
from typing import Any

import pytest

from collector.routes import GateConfig
from tests.collector.gating import Recorder, Site


class Book(Recorder):
    """Keeps the end of each request beside its begin."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[dict[str, Any]] = []

    def finish(self, ticket: Any, **fields: Any) -> None:
        """One event."""
        self.ended.append({**ticket["known"], **fields})

    def told(self) -> list[tuple[str, str, int]]:
        """Operation, status and tokens of each event."""
        return [(each["operation"], each["status"], each.get("response_tokens", 0)) for each in self.ended]


class Engine:
    """As much of `LLMEngine` as the wrappers touch: requests go in, what the test put into `outputs` comes out."""

    def __init__(self) -> None:
        self.added: list[str] = []
        self.outputs: list[Any] = []
        self.fails = False
        self.output_processor = SimpleNamespace(external_req_ids={}, parent_requests={}, request_states={})

    def add_request(self, request_id: str, prompt: Any, params: Any, *_: Any, **__: Any) -> str:
        self.added.append(request_id)
        return f"{request_id}-internal"

    def step(self) -> list[Any]:
        if self.fails:
            raise RuntimeError("secret words")
        outputs, self.outputs = self.outputs, []
        return outputs

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        abort_requests(self.output_processor, request_ids, internal)

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))


def abort_requests(processor: Any, ids: list[str], internal: bool) -> list[str]:
    """As the output processor does it."""
    return [processor.request_states.pop(each).request_id for each in ids]


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> Book:
    """The process has an auditor whose publisher is a book, and the stand-in engine is wrapped."""
    from collector.engine import counting, offline
    from collector.engine.process import current

    site = Site(GateConfig())
    made = Book()
    site.auditor.publisher = made  # type: ignore[assignment]  # it has what the auditor calls
    monkeypatch.setattr(current, "auditor", site.auditor)
    monkeypatch.setattr(Engine, "add_request", offline.wrap_add_request(Engine.add_request))
    monkeypatch.setattr(Engine, "step", offline.wrap_step(Engine.step))
    monkeypatch.setattr(Engine, "abort_request", offline.wrap_abort_request(Engine.abort_request))
    monkeypatch.setitem(globals(), "abort_requests", counting.wrap_abort_requests(abort_requests))
    return made


def params(**fields: Any) -> Any:
    """Sampling parameters of the offline road."""
    kind = SimpleNamespace(name="FINAL_ONLY")
    return SimpleNamespace(**{"max_tokens": 8, "n": 1, "output_kind": kind, "detokenize": True, **fields})


def answer(request_id: str, tokens: int, finished: bool = True) -> Any:
    """An output of the engine."""
    choice = SimpleNamespace(
        index=0, text="word " * tokens, token_ids=[7] * tokens, finish_reason="stop", logprobs=None, stop_reason=None
    )
    return SimpleNamespace(request_id=request_id, outputs=[choice], finished=finished, metrics=None)


def test_a_request_has_its_event_when_its_last_output_leaves(book: Book) -> None:
    """Begun by add_request, ended by step; an output of nobody's passes untouched."""
    engine = Engine()
    engine.add_request("0", {"prompt": "hello", "prompt_token_ids": [1, 2]}, params())
    stray = answer("stray", 1)
    engine.outputs = [answer("0", 3), stray]
    assert len(engine.step()) == 2
    assert book.told() == [("generate", "ok", 3)]
    assert (book.ended[0]["prompt_tokens"], book.ended[0]["view"]) == (2, "rendered")


def test_a_blocked_prompt_never_reaches_the_engine(book: Book) -> None:
    """As text, and as token ids that only decode to it."""
    from collector.audit import Blocked

    engine = Engine()
    with pytest.raises(Blocked, match="blocked by policy"):
        engine.add_request("0", {"prompt": "an attack"}, params())
    assert (engine.added, book.told()) == ([], [("generate", "blocked_input", 0)])


def test_an_abort_counts_what_was_generated(book: Book) -> None:
    """By the engine's own id, as LLM does it when a later prompt of the same call was blocked."""
    engine = Engine()
    internal = engine.add_request("0", {"prompt": "hello"}, params())
    state = SimpleNamespace(
        request_id=internal, external_req_id="0", detokenizer=SimpleNamespace(num_output_tokens=lambda: 5)
    )
    engine.output_processor.request_states[internal] = state
    engine.abort_request([internal], internal=True)
    assert book.told() == [("generate", "aborted", 5)]


def test_the_death_of_the_engine_is_an_error_for_each_request(book: Book) -> None:
    """By the class of the error alone."""
    engine = Engine()
    for number in range(2):
        engine.add_request(str(number), {"prompt": "hello"}, params())
    engine.fails = True
    with pytest.raises(RuntimeError):
        engine.step()
    assert [(each["status"], each["reason"]) for each in book.ended] == [("error", "RuntimeError")] * 2


def test_pooling_has_an_event_and_no_answer(book: Book) -> None:
    """Parameters without a number of tokens are those of a pooling request."""
    engine = Engine()
    engine.add_request("0", {"prompt": "hello"}, SimpleNamespace(task="embed"))
    engine.outputs = [SimpleNamespace(request_id="0", outputs=SimpleNamespace(), finished=True)]
    engine.step()
    assert book.told() == [("encode", "ok", 0)]


def test_an_offline_beam_search_is_one_event_a_prompt(book: Book) -> None:
    """Its steps go to the engine unaudited by themselves; the beams' tokens without the prompt are the answer's."""
    from collector.engine import beam

    engine = Engine()

    def search(self: Any, prompts: Any, given: Any) -> list[Any]:
        for step in range(6):
            engine.add_request(str(step), {"prompt": "step"}, params())
            engine.outputs = [answer(str(step), 1)]
            assert len(engine.step()) == 1
        sequences = [SimpleNamespace(tokens=[1, 2, 9, 9, 9], logprobs=[], text="") for _ in range(2)]
        return [SimpleNamespace(sequences=sequences) for _ in prompts]

    rendered = [{"type": "token", "prompt": "one", "prompt_token_ids": [1, 2]}] * 2
    llm = SimpleNamespace(llm_engine=engine, _preprocess_cmpl=lambda _: rendered)
    wrapped = beam.wrap_offline(search)
    assert len(wrapped(llm, ["one", "one"], SimpleNamespace(beam_width=2, max_tokens=3))) == 2
    assert book.told() == [("beam_search", "ok", 6)] * 2
    assert {each["n"] for each in book.ended} == {2}
