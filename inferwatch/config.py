"""The composed configuration: `inferwatch.toml`, one table for each room, every key checked.

Order of precedence: environment (`INFERWATCH_KAFKA__BOOTSTRAP_SERVERS=…`), then the file, then the defaults. Secrets
are never values here, only paths to files (`…_file`) that hold them.
"""

import difflib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Self, cast, get_args, get_origin

import orjson
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsConfigDict

from collector.config import CollectorConfig, TrustConfig
from collector.topics import KafkaConfig
from dashboards.config import DashboardsConfig
from detectors.config import DetectConfig
from inferwatch.settings import ConfigError, Settings, tables
from sinks.config import SinksConfig, StoreConfig
from streams.config import BrokerSettings, StreamsConfig


class Config(Settings):
    """Everything an inferwatch process can be told. Unknown keys are refused by name."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, validate_default=True)

    data_dir: Path = Field(Path(".inferwatch"), description="Where processes keep their data, logs and run files.")
    broker: BrokerSettings = Field(BrokerSettings(), description="The development Kafka of `inferwatch broker`.")
    kafka: KafkaConfig = Field(KafkaConfig(), description="The Kafka cluster that everything talks to.")
    collector: CollectorConfig = Field(CollectorConfig(), description="The collector in the inference server.")
    evidence: TrustConfig = Field(TrustConfig(), description="Whose signatures are trusted where a log is verified.")
    detect: DetectConfig = Field(DetectConfig(), description="The detectors.")
    streams: StreamsConfig = Field(StreamsConfig(), description="The stream processors.")
    sinks: SinksConfig = Field(SinksConfig(), description="Where findings are delivered.")
    store: StoreConfig = Field(StoreConfig(), description="ClickHouse or chDB.")
    dashboards: DashboardsConfig = Field(DashboardsConfig(), description="The HTML view.")

    @model_validator(mode="after")
    def _one_alert_budget(self) -> Self:
        """Findings called false are held against the budget that the detectors were given."""
        if "alert_budget" not in self.dashboards.model_fields_set:
            held = self.dashboards.model_copy(update={"alert_budget": self.detect.alert_budget})
            object.__setattr__(self, "dashboards", held)  # the model is frozen once it is made
        return self

    def digest(self) -> str:
        """Twelve hex digits over all settings: two processes with the same digest run the same configuration."""
        return settings_digest(self)


def settings_digest(model: BaseModel) -> str:
    """Twelve hex digits over all settings of a part of the configuration; the same in every process."""
    settings = orjson.dumps(model.model_dump(), default=_plain, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    return hashlib.sha256(settings).hexdigest()[:12]


def _plain(value: object) -> object:
    """Sets in order: the order in which Python walks one differs from process to process."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def load(path: Path | None = None) -> Config:
    """The configuration in `path`, else in the file `INFERWATCH_CONFIG` names, else in `inferwatch.toml` here.

    Without any of them, the defaults.

    Raises `ConfigError` where the file is missing, no TOML, or has a key or value that can't be used.
    """
    file, values = tables(path)
    try:
        return Config(**values)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(file, problem) for problem in error.errors())) from None


def _sentence(file: Path, problem: ErrorDetails) -> str:
    """One problem as a sentence: where, what, and the nearest right name. Never the value: it may be a secret."""
    keys = [str(part) for part in problem["loc"]]
    where = ".".join(keys)
    if problem["type"] != "extra_forbidden":
        return f"{file}: {where}: {problem['msg']}"
    known = list(_known_keys(keys[:-1]))
    near = difflib.get_close_matches(keys[-1], known, n=1)
    table = f"[{'.'.join(keys[:-1])}]" if keys[:-1] else "the top level"
    hint = f"did you mean {near[0]!r}?" if near else f"known there: {', '.join(sorted(known))}"
    return f"{file}: unknown key {keys[-1]!r} in {table}; {hint}"


def _known_keys(path: list[str]) -> Iterator[str]:
    """The keys of the table at `path`."""
    model: type[BaseModel] = Config
    for key in path:
        field = model.model_fields.get(key)
        found = _model_in(field.annotation) if field is not None else None
        if found is None:
            return
        model = found
    yield from model.model_fields


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The pydantic model in an annotation such as `X`, `X | None` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def describe(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every key with its default and meaning, as the lines of an example `inferwatch.toml`."""
    tables: list[tuple[str, type[BaseModel], str]] = []
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is not None:
            each = get_origin(field.annotation) is dict
            left_out = "one for each" if each else "left out: not used" if field.default is None else ""
            tables.append((f"{prefix}{name}.NAME" if each else f"{prefix}{name}", inner, left_out))
            continue
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        yield f"# {field.description}" if field.description else "#"
        yield f"# {name} = {_toml(default)}" if default is not None else f"# {name} ="
    for name, inner, left_out in tables:
        yield ""
        yield f"# [{name}]  ({left_out})" if left_out or ".NAME." in name else f"[{name}]"
        yield from describe(inner, f"{name}.")


def _as_json(value: object) -> object:
    return sorted(value) if isinstance(value, frozenset) else str(value)


def _toml(value: object) -> str:
    """A default as TOML would write it; JSON's scalars and arrays are TOML's."""
    plain = cast(object, orjson.loads(orjson.dumps(value, default=_as_json)))
    return orjson.dumps(plain).decode()
