"""Look over the shoulder of a live object: what its methods were given and what they gave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """One call of an observed method."""

    arguments: tuple[Any, ...]
    result: Any


@contextmanager
def observed(**methods: tuple[object, str]) -> Iterator[dict[str, list[Call]]]:
    """Record every call of some methods, in order, while the context lasts; what they do is not changed.

    Args:
        methods: label -> (object, name of its method); ``forward`` of a module stands for calling it. Only positional
            arguments are kept.

    Yields:
        Label -> the calls so far; clear a list to let go of its tensors.
    """
    calls: dict[str, list[Call]] = {label: [] for label in methods}
    with ExitStack() as stack:
        for label, (owner, name) in methods.items():
            stack.enter_context(_wrapped(owner, name, calls[label]))
        yield calls


@contextmanager
def _wrapped(owner: object, name: str, calls: list[Call]) -> Iterator[None]:
    method = getattr(owner, name)
    shadowed = vars(owner).get(name)

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        result = method(*arguments, **keywords)
        calls.append(Call(arguments, result))
        return result

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        delattr(owner, name)
        if shadowed is not None:
            setattr(owner, name, shadowed)
