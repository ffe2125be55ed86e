"""Where settings come from: the environment, then the file. What the whole configuration and the sidecar's share."""

import os
import tomllib
from pathlib import Path
from typing import Any, Final

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

CONFIG_VARIABLE: Final = "INFERWATCH_CONFIG"


class ConfigError(ValueError):
    """The configuration can't be used; the message is one sentence for each problem."""


class Settings(BaseSettings):
    """Fields from `INFERWATCH_A__B`, else from what it is made with, else their defaults."""

    model_config = SettingsConfigDict(env_prefix="INFERWATCH_", env_nested_delimiter="__")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  # the signature is pydantic-settings'
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment before the file; no .env file and no secrets folder."""
        return env_settings, init_settings


def tables(path: Path | None) -> tuple[Path, dict[str, Any]]:
    """The file, and what is in it: `path`, else what `INFERWATCH_CONFIG` names, else `inferwatch.toml` where it is.

    Raises `ConfigError` where it is missing, unreadable or no TOML.
    """
    named = path or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    file = named or Path("inferwatch.toml")
    if named is None and not file.exists():
        return file, {}
    try:
        return file, tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such configuration file; `inferwatch config example` prints one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: can't be read ({type(error).__name__})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None
