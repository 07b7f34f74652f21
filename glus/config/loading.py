"""Composed configs into typed ones, and back."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from glus.files import expanded, find_shipped, stand_in

Schema = TypeVar("Schema")
RENAMED = {"output_dir": "output", "num_videos": "max_videos", "eval_videos": "eval_max_videos"}
"""Last part of a key before 2026-11-30, and since."""


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


def share() -> Any:
    """A field for a share in [0, 1], or nothing."""
    return checked(lambda value: 0 <= value <= 1, "a share in [0, 1]", None)


def load_config(schema: type[Schema], cfg: DictConfig) -> Schema:
    """The typed form of a composed config, in which a ``~`` that a path begins with is the home folder, and
    ``glus_shapes`` and ``glus_towers`` are what is shipped.

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
        known = [declared.name for declared in fields(where)]
        group, dot, name = str(error.full_key).rpartition(".")
        near = did_you_mean(nearest(name, known)) or f"{where.__name__} knows {', '.join(known)}"
        text = f"renamed to {group}{dot}{RENAMED[name]}" if RENAMED.get(name) in known else near
        raise ValueError(f"unknown config key {error.full_key!r}: {text}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"config key {error.full_key!r}: {str(error).splitlines()[0]}") from error
    assert isinstance(typed, schema)
    typed = _expanded(typed, "")
    _check(typed, "")
    return typed


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Those of the known names that are spelled almost like it, the nearest first."""
    return difflib.get_close_matches(name, list(known), n=3, cutoff=0.65)


def did_you_mean(names: Sequence[str]) -> str:
    """A question, or nothing without names."""
    return f"did you mean {' or '.join(names)}?" if names else ""


def read_config(schema: type[Schema], file: Path) -> Schema:
    """The typed form of a YAML or JSON file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no YAML, or ``load_config`` refuses it; the message names the file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    try:
        content = OmegaConf.load(file)
        if not isinstance(content, DictConfig):
            raise ValueError(f"it holds no fields, expected those of {schema.__name__}")
        return load_config(schema, content)
    except (YAMLError, OSError, RecursionError) as error:  # the second is OmegaConf's for a number alone
        raise ValueError(f"{file} is no YAML: {error}{stand_in(file, is_text=True)}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}{stand_in(file, is_text=True)}") from error


def _expanded(value: Any, key: str) -> Any:
    """The value with ``~``, ``~user`` and names of what is shipped expanded in every text of it; of texts with a slash,
    only paths have them."""
    if isinstance(value, str) and value.startswith("~") and (value == "~" or "/" in value):
        try:
            return str(expanded(value))
        except ValueError as error:
            raise ValueError(f"{key}={error}") from error
    if isinstance(value, str):
        return find_shipped(value)
    if isinstance(value, list):
        return [_expanded(entry, key) for entry in value]
    if isinstance(value, dict):
        return {name: _expanded(entry, f"{key}.{name}") for name, entry in value.items()}
    if is_dataclass(value):
        for declared in fields(value):
            entry = getattr(value, declared.name)
            setattr(value, declared.name, _expanded(entry, f"{key}.{declared.name}".lstrip(".")))
    return value


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


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values in nested dictionaries under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def to_yaml(config: object) -> str:
    """A typed config as YAML that ``load_config`` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def plain_config(config: object) -> dict[str, Any]:
    """A typed config as JSON knows it."""
    return cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))
