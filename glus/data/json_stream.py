"""A large JSON object read one member at a time, in the memory of one member."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

CHUNK = 1 << 22
"""Characters read at a time; a value that is longer doubles it until it fits."""


def iterate_members(path: Path, chunk: int = CHUNK) -> Iterator[tuple[str, Any]]:
    """(key, value) of every member of the object that a file holds, in its order; a key that comes twice comes twice.

    It is as fast as ``json.loads``, whose scanner it uses, and needs tens of MB where that needs more than twice the
    file.

    Raises:
        ValueError: the file does not hold one JSON object, with the position of the first mistake.
    """
    with path.open(encoding="utf-8") as file:
        scanner = _Scanner(path, file, chunk)
        scanner.expect("{")
        separator = "}" if scanner.skip("}") else ","
        while separator == ",":
            key = scanner.value()
            if not isinstance(key, str):
                raise scanner.error(f"expected a name in quotes, found {key!r:.40}")
            scanner.expect(":")
            yield key, scanner.value()
            separator = scanner.expect(",}")
        scanner.expect_end()


class _Scanner:
    """A window over a text file that moves on and grows as needed."""

    def __init__(self, path: Path, file: TextIO, chunk: int):
        self._path, self._file, self._chunk = path, file, chunk
        self._text, self._at = "", 0
        self._dropped = 0  # characters of the file before the window
        self._decoder = json.JSONDecoder()

    def value(self) -> Any:
        """The JSON value that comes next."""
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                position = self._dropped + error.pos
                if not self._grow():
                    raise self.error(error.msg, position) from error
                continue
            if end + 3 > len(self._text) and self._grow():
                continue  # a number may go on: 1 could be the beginning of 1.5 or 1e+5
            self._at = end
            return value

    def expect(self, characters: str) -> str:
        """One of ``characters``, which must come next."""
        found = self._peek()
        if not found or found not in characters:
            raise self.error(f"expected {' or '.join(map(repr, characters))}, found {found or 'the end'!r}")
        self._at += 1
        return found

    def skip(self, character: str) -> bool:
        """Whether ``character`` comes next; if so, move behind it."""
        is_next = self._peek() == character
        self._at += is_next
        return is_next

    def expect_end(self) -> None:
        """Nothing but white space may come."""
        if self._peek():
            raise self.error("expected the end")

    def error(self, message: str, position: int | None = None) -> ValueError:
        """What is wrong at a position of the file; the default is the current one."""
        position = self._dropped + self._at if position is None else position
        return ValueError(f"{self._path} is not JSON as expected: {message} at character {position}")

    def _peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._grow():
                return ""

    def _grow(self) -> bool:
        """Drop what was read and read on; False at the end of the file."""
        rest = self._text[self._at :]
        try:
            more = self._file.read(max(self._chunk, len(rest)))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path} is not UTF-8 text: {error}") from error
        if more:
            self._dropped += self._at
            self._text, self._at = rest + more, 0
        return bool(more)
