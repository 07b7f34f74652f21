"""The terminal: one console for bars and log lines, so that neither is written over the other."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from functools import cache
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


@cache
def console() -> Console:
    """Of everything that is said while a program works: stderr."""
    return Console(stderr=True, emoji=False, highlight=False)


def tables() -> Console:
    """Of what a program is run for: stdout, 120 wide where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 120, emoji=False, highlight=False)


def bar(items: Iterable[Item], total: int, text: str) -> Iterable[Item]:
    """The items, with a bar on a terminal that tells how many have been taken."""
    return track(items, text, total, console=console(), disable=not console().is_terminal, transient=True)


def log_to_console() -> None:
    """Log from INFO on to the console, instead of where Hydra does, which is another place in a sweep."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)
    if not any(isinstance(handler, ConsoleHandler) for handler in root.handlers):
        root.addHandler(ConsoleHandler())
        root.handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    root.setLevel(logging.INFO)


class ConsoleHandler(logging.Handler):
    """Writes log lines above the bars of ``console``, if there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler``."""
        style = _STYLES.get(record.levelno)
        console().print(self.format(record), style=style, markup=False, soft_wrap=True)
