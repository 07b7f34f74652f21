"""Composed configs into typed ones, and back; and how a program ends at what its user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import field, fields, is_dataclass
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

Schema = TypeVar("Schema")


@contextmanager
def user_errors() -> Iterator[None]:
    """End the program with ``error: ...`` and exit status 1 at a ValueError or OSError, which a user can mend."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def require(condition: bool, key: str, expected: str, value: object) -> None:
    """Raise ValueError naming the config key ``key``, its value and what was expected, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{key}={value!r}: expected {expected}")


def checked(test: Callable[[Any], bool], expected: str, default: Any = MISSING) -> Any:
    """A field of a dataclass whose value ``load_config`` tests: of a dict each value, and null never.

    Args:
        test: whether a value is fine.
        expected: what the message says otherwise.
        default: of the field, or a function that makes it.
    """
    metadata = {"test": test, "expected": f"{expected} or null" if default is None else expected}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def at_least(least: int, default: Any = MISSING) -> Any:
    """A field with a lower limit."""
    return checked(lambda value: value >= least, f"at least {least}", default)


def positive(default: Any = MISSING) -> Any:
    """A field for numbers above 0."""
    return checked(lambda value: value > 0, "a positive number", default)


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
        where: Any = error.object_type if is_dataclass(error.object_type) else schema
        known = ", ".join(declared.name for declared in fields(where))
        raise ValueError(f"unknown config key {error.full_key!r}: {where.__name__} knows {known}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"config key {error.full_key!r}: {str(error).splitlines()[0]}") from error
    assert isinstance(typed, schema)
    _check(typed, "")
    return typed


def _check(config: Any, prefix: str) -> None:
    """Test every field that was declared with ``checked``."""
    for declared in fields(config):
        value, key = getattr(config, declared.name), prefix + declared.name
        entries = {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {key: value}
        for name, entry in entries.items():
            if is_dataclass(entry):
                _check(entry, f"{name}.")
            elif "test" in declared.metadata and entry is not None:
                require(declared.metadata["test"](entry), name, declared.metadata["expected"], entry)


def to_yaml(config: object) -> str:
    """A typed config as YAML that ``load_config`` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
