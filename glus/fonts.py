"""Text in any script: DejaVu Sans, which matplotlib brings, and a font of the system for each character that it lacks.

DejaVu Sans holds Latin, Cyrillic, Greek, Arabic, Hebrew and more; Chinese, Japanese, Korean, Devanagari and coloured
emoji are left to the system. raqm, which Pillow comes with, joins letters and puts those that are read from the right
into their order; it needs the library FriBidi.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path

from fontTools.ttLib import TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont, features

log = logging.getLogger(__name__)

Colour = tuple[int, int, int]
"""Red, green, blue, each from 0 to 255."""
FONT_FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    *("C:/Windows/Fonts", "~/AppData/Local/Microsoft/Windows/Fonts"),
)
"""Where fonts lie, for systems without fontconfig."""
_PACKAGES = dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "FULLWIDTH", "IDEOGRAPHIC"), "fonts-noto-cjk")
"""First word of a character's name -> what has it, where that is not Debian's fonts-noto-core."""
_FRIBIDI = "Debian: libfribidi0, Homebrew: fribidi"
_ZERO_WIDTH_JOINER = "\u200d"
_BITMAP_SIZES = (109, 128, 136, 160)
"""Pixels of the only size that fonts of coloured emoji come in."""

_warned: set[str] = set()


@dataclass(frozen=True)
class Face:
    """A font of a file."""

    path: str
    number: int = 0
    """Within a collection of fonts."""


@cache
def dejavu() -> Face:
    """DejaVu Sans."""
    import matplotlib  # takes a quarter of a second, which most programs need not

    return Face(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"))


def text_width(text: str, size: int) -> float:
    """Pixels from the text's start to its end; ``size`` is that of an em, also below."""
    return sum(_width(run, face, size) for run, face in _runs(text))


def ascent(size: int) -> int:
    """Pixels between a line's top and its baseline."""
    return _sized(dejavu(), size)[0].getmetrics()[0]


def draw_text(image: Image.Image, left: float, baseline: float, text: str, size: int, colour: Colour) -> None:
    """Write a line of text onto an RGB or RGBA image.

    A character that no font has becomes a box, and a warning says once what to install.
    """
    for run, face in _runs(text):
        font, scale = _sized(face, size)
        if scale == 1:
            ImageDraw.Draw(image).text((left, baseline), run, colour, font, anchor="ls", embedded_color=True)
        else:
            _draw_scaled(image, (left, baseline), run, font, scale, colour)
        left += _width(run, face, size)


def wrap(text: str, size: int, width: float) -> list[str]:
    """Lines of at most ``width`` pixels, broken between words; a longer word, or text without spaces, anywhere."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if text_width(longer, size) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for character in word:
            if lines[-1] and not _continues(character) and text_width(lines[-1] + character, size) > width:
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line] or [""]


@lru_cache(1024)
def _runs(text: str) -> list[tuple[str, Face]]:
    """Pieces of one font each, in the order in which they stand from left to right.

    raqm orders the letters within a piece; pieces of a text that is read from the right are put in order here.
    """
    runs: list[tuple[str, Face]] = []
    for character in unicodedata.normalize("NFC", text):
        belongs = runs and (runs[-1][0].endswith(_ZERO_WIDTH_JOINER) or _continues(character))
        face = runs[-1][1] if belongs else _face_of(character)
        if runs and face == runs[-1][1]:
            runs[-1] = (runs[-1][0] + character, face)
        else:
            runs.append((character, face))
    directions = [unicodedata.bidirectional(character) for character in text]
    first_strong = next((direction for direction in directions if direction in ("L", "R", "AL")), "L")
    if any(map(_needs_raqm, text)) and not features.check("raqm"):
        _warn_once("raqm", f"{text!r} is drawn with its letters apart and from the left: install FriBidi ({_FRIBIDI})")
    return runs if first_strong == "L" else runs[::-1]


def _continues(character: str) -> bool:
    """Whether it belongs to the one before: a vowel sign, an accent, a joiner."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")


def _needs_raqm(character: str) -> bool:
    return unicodedata.bidirectional(character) in ("R", "AL") or unicodedata.category(character) == "Mc"


@cache
def _face_of(character: str) -> Face:
    for face in chain([dejavu()], _system_faces(character)):
        if ord(character) in _characters(face):
            return face
    name = unicodedata.name(character, "UNKNOWN")
    other = "fonts-noto-color-emoji" if unicodedata.category(character) == "So" else "fonts-noto-core"
    package = _PACKAGES.get(name.replace("-", " ").split()[0], other)
    _warn_once(
        package, f"no font has {character!r} ({name}), a box stands for it: install one, such as Debian's {package}"
    )
    return dejavu()


def _system_faces(character: str) -> Iterator[Face]:
    """Candidates: fontconfig's choice for the character, or where there is no fontconfig, all fonts."""
    if fontconfig := shutil.which("fc-match"):
        command = [fontconfig, "--format", "%{file}\n%{index}", f":charset={ord(character):x}"]
        path, _, number = subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")
        if path:
            yield Face(path, int(number) & 0xFFFF)  # the upper bits count the styles of a variable font
    else:
        yield from _installed()


@cache
def _installed() -> list[Face]:
    paths = [path for folder in FONT_FOLDERS for path in sorted(Path(os.path.expanduser(folder)).rglob("*"))]
    # Apple's LastResort has a box for every character.
    fonts = [p for p in paths if p.suffix.lower() in (".ttf", ".otf", ".ttc") and p.stem != "LastResort"]
    return [Face(str(path)) for path in fonts]


@cache
def _characters(face: Face) -> frozenset[int]:
    """Code points that it has; none, if it is of a kind that fontTools does not read, or cannot be opened."""
    try:
        with TTFont(face.path, fontNumber=face.number, lazy=True) as font:
            return frozenset(font.getBestCmap() or ())
    except (TTLibError, OSError):
        return frozenset()


@cache
def _sized(face: Face, size: int) -> tuple[ImageFont.FreeTypeFont, float]:
    """The font, and what its pixels are to be scaled by: other than 1 for bitmaps.

    Raises:
        OSError: it cannot be opened.
    """
    for pixels in (size, *_BITMAP_SIZES):
        try:
            return ImageFont.truetype(face.path, pixels, face.number), size / pixels
        except OSError as error:
            failure = error
    raise OSError(f"font {face.path}: {failure}")


def _width(run: str, face: Face, size: int) -> float:
    font, scale = _sized(face, size)
    return font.getlength(run) * scale


def _draw_scaled(
    image: Image.Image, start: tuple[float, float], run: str, font: ImageFont.FreeTypeFont, scale: float, colour: Colour
) -> None:
    left, top, right, bottom = font.getbbox(run, anchor="ls")
    large = Image.new("RGBA", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(large).text((-left, -top), run, colour, font, anchor="ls", embedded_color=True)
    small = large.resize((max(1, round(large.width * scale)), max(1, round(large.height * scale))))
    image.paste(small, (round(start[0] + left * scale), round(start[1] + top * scale)), small)


def _warn_once(topic: str, message: str) -> None:
    if topic not in _warned:
        _warned.add(topic)
        log.warning("%s", message)
