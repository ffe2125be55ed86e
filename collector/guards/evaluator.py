"""The evaluator guard: a second opinion on a pair, what was asked and what was answered, by a classifier of yours.

`[collector.guards.evaluator]`, off by default. The model runs here (a transformers folder or pinned revision) or behind
an endpoint with vLLM's `POST /classify`, there with two labels. It reads the end of what was asked and, beside it, each
window of the answer to its very end; the worst window is the score. Nothing is known of your model's labels, so those
that mean a bad answer are named in the config, and the self-test is yours: without a pair that it must block it does
not start.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from collector.event import Stage
from collector.guards.endpoint import BadAnswer, Endpoint, EndpointPolicy
from collector.guards.local_model import ModelConfig, SequenceModel, share_of
from collector.guards.protocol import ALONE, Context, Guard, GuardRefused, Judgement, Probe, Text, whole

_OUTPUT: Final[frozenset[Stage]] = frozenset({"output"})
_PROMPT_CHARS_MAX: Final = 4_000
_SLACK: Final = 0.01
"""How far the probabilities of both labels may miss 1 by rounding."""


class PairProbe(BaseModel):
    """A pair whose answer you know of your own model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field("", max_length=20_000, repr=False, description="What was asked.")
    answer: str = Field(min_length=1, max_length=20_000, repr=False, description="What was answered.")
    block: bool = Field(description="Whether it must be blocked or must pass.")


class EvaluatorConfig(EndpointPolicy):
    """`[collector.guards.evaluator]`: judges answers beside their questions."""

    able = _OUTPUT
    model: ModelConfig | None = Field(None, description="The model where it runs here.")
    bad_labels: tuple[str, ...] = Field(
        (),
        max_length=64,
        description="Labels that mean a bad answer; summed. An endpoint tells the likeliest label alone: there, one "
        "of two.",
    )
    separator: str = Field(" [SEP] ", max_length=64, description="Between question and answer, for an endpoint.")
    pairs: dict[str, PairProbe] = Field(
        default_factory=dict, max_length=64, description="The self-test, by name: one pair to block and one to pass."
    )

    def build(self) -> Guard:
        if (self.model is None) is (self.endpoint is None):
            raise GuardRefused(
                "the evaluator guard did not start: it needs guards.evaluator.model or .endpoint, not both"
            )
        if self.model is not None:
            return LocalEvaluator(self, SequenceModel(self.model, "evaluator"))
        return EndpointEvaluator(self, self.open("evaluator"))


class _Evaluator:
    """What both kinds have in common."""

    name = "evaluator"
    stages = EvaluatorConfig.able
    reads: frozenset[str] = frozenset({"prompt"})
    labels = frozenset({"bad_answer"})

    def __init__(self, config: EvaluatorConfig, digest: str) -> None:
        self._config = config
        told = repr((digest, sorted(config.bad_labels), config.separator))
        self.version = f"1+{hashlib.sha256(told.encode()).hexdigest()[:12]}"

    @property
    def probes(self) -> Sequence[Probe]:
        """The configured pairs."""
        return [
            Probe(each.answer, "output", each.block, Context(prompt=each.prompt))
            for each in self._config.pairs.values()
        ]


class LocalEvaluator(_Evaluator):
    """Judges in this process. Stateless after the start."""

    def __init__(self, config: EvaluatorConfig, model: SequenceModel) -> None:
        """Raises `GuardRefused` where the model has no such label, or no other."""
        super().__init__(config, model.digest)
        self._model = model
        self._bad = model.places(config.bad_labels, "evaluator", "bad_labels")

    def judge(self, text: str, stage: Stage, context: Context = ALONE) -> Judgement:
        """The judgement on one answer. Raises `NotFinite`."""
        return self.judge_many([Text(text, stage, context)])[0]

    def judge_many(self, texts: Sequence[Text]) -> list[Judgement]:
        """The judgement on each, windows of all answers in common batches. Raises `NotFinite`."""
        owners: list[int] = []

        def rows() -> Iterator[list[int]]:
            for number, each in enumerate(texts):
                for row in self._rows(each.context.prompt, each.text):
                    owners.append(number)
                    yield row

        worst = [0.0] * len(texts)
        for place, values in self._model.forward(rows()):
            worst[owners[place]] = max(worst[owners[place]], share_of(values, self._bad))
        return [_judgement(score) for score in worst]

    def _rows(self, prompt: str, answer: str) -> Iterator[list[int]]:
        """Question and answer as the model was taught: the special tokens around, the last one between."""
        asked = self._model.encode(prompt[-_PROMPT_CHARS_MAX:])[-self._model.body_tokens // 4 :]
        yield from self._model.windows(answer, before=asked)


class EndpointEvaluator(_Evaluator):
    """Asks vLLM's `POST /classify`. Raises what `collector.guards.endpoint` raises."""

    def __init__(self, config: EvaluatorConfig, endpoint: Endpoint) -> None:
        super().__init__(config, repr(config.asked()))
        if not config.bad_labels:
            raise GuardRefused("the evaluator guard did not start: name the labels of a bad answer (bad_labels)")
        self._endpoint = endpoint

    def judge(self, text: str, stage: Stage, context: Context = ALONE) -> Judgement:  # noqa: ARG002 - answers alone
        """The worst of the answer's parts."""
        until_s = self._config.until_s(text)
        asked = whole(context.prompt[-_PROMPT_CHARS_MAX:]) + self._config.separator
        scores = [self._ask(asked + whole(part), until_s) for part in self._config.parts(text) if part.strip()]
        return _judgement(max(scores, default=0.0))

    def _ask(self, pair: str, until_s: float) -> float:
        body = {"model": self._config.endpoint and self._config.endpoint.model, "input": pair}
        try:
            (told,) = msgspec.convert(self._endpoint.ask("/classify", body, until_s), _Classified).data
        except (msgspec.ValidationError, ValueError):
            raise BadAnswer from None
        # The answer names the likeliest label alone. Of two labels the other has the rest; of more, nobody knows which.
        probs = told.probs
        if len(probs) != 2 or not all(0 <= share <= 1 for share in probs) or abs(sum(probs) - 1) > _SLACK:
            raise BadAnswer
        return max(probs) if told.label in self._config.bad_labels else min(probs)


class _Label(msgspec.Struct):
    label: str
    probs: list[float]


class _Classified(msgspec.Struct):
    data: list[_Label]


def _judgement(score: float) -> Judgement:
    block = score >= 0.5
    return Judgement(score, "bad_answer" if block else "", block)
