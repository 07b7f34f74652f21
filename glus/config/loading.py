"""Composed configs into typed ones, and back."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

Schema = TypeVar("Schema")


def require(condition: bool, key: str, expected: str, value: object) -> None:
    """Raise ValueError naming the config key ``key``, its value and what was expected, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{key}={value!r}: expected {expected}")


def check_max_videos(value: int | None) -> None:
    """Raise ValueError unless ``max_videos`` is null or positive."""
    require(value is None or value >= 1, "max_videos", "null (all) or at least 1", value)


def load_config(schema: type[Schema], cfg: DictConfig) -> Schema:
    """The typed form of a composed config.

    Raises:
        ValueError: unknown key, wrong type, missing value or failed check, naming the key.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), cfg)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(f"no value for {', '.join(missing)}: set {missing[0]}=... on the command line or in YAML")
        typed = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise ValueError(f"unknown config key {error.full_key!r}: {_known_keys(schema, error.full_key)}") from error
    except MissingMandatoryValue as error:
        raise ValueError(f"no value for config key {error.full_key!r}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"config key {error.full_key!r}: {str(error).splitlines()[0]}") from error
    assert isinstance(typed, schema)
    return typed


def to_yaml(config: object) -> str:
    """A typed config as YAML that ``load_config`` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _known_keys(schema: Any, full_key: str | None) -> str:
    """The keys that exist where ``full_key`` was looked for."""
    for part in (full_key or "").split(".")[:-1]:
        inner = next((f for f in fields(schema) if f.name == part), None)
        default = inner.default_factory() if inner and callable(inner.default_factory) else None
        if not is_dataclass(default):
            break
        schema = type(default)
    return f"{schema.__name__} knows {', '.join(f.name for f in fields(schema))}"
