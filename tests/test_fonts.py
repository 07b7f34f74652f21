"""Text in every script: drawn with the font that has it, or told what to install."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageFont, features

import glus.fonts
from glus.fonts import ascent, dejavu, draw_text, text_width, wrap

CHINESE, BOX = "漢", "\ue000"
"""A character that DejaVu Sans lacks, and one that none has."""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is remembered from another test, nor for the next."""
    cached = [function for function in vars(glus.fonts).values() if hasattr(function, "cache_clear")]
    monkeypatch.setattr(glus.fonts, "_warned", set())
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder with fonts, on a system without fontconfig."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(glus.fonts, "FONT_FOLDERS", (str(tmp_path),))
    return tmp_path


def make_font(path: Path, *characters: str) -> None:
    """A font that draws each of them as a block, as wide as high."""
    pen = TTGlyphPen(None)
    for move, point in (
        (pen.moveTo, (0, 0)),
        (pen.lineTo, (0, 900)),
        (pen.lineTo, (1000, 900)),
        (pen.lineTo, (1000, 0)),
    ):
        move(point)
    pen.closePath()
    names = [f"block{number}" for number in range(len(characters))]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap(dict(zip(map(ord, characters), names, strict=True)))
    builder.setupGlyf(dict.fromkeys([".notdef", *names], pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Blocks", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)


def drawn(text: str, size: int = 20) -> np.ndarray:
    image = Image.new("RGB", (400, 30), (255, 255, 255))
    draw_text(image, 5, 3 + ascent(size), text, size, (0, 0, 0))
    return np.array(image)


def test_latin_cyrillic_and_greek_need_no_font_of_the_system(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """B4."""
    box = drawn(BOX)
    caplog.clear()
    for text in ("ï", "—", "“", "ž", "ø", "ж", "ї", "λ", "ώ"):
        assert (drawn(text) != box).any(), text
        assert (drawn(text) != 255).any(), text
    assert not caplog.records


def test_a_missing_font_is_told_once_with_what_to_install(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for text in ("漢字", "かな漢", "red 漢字"):
        drawn(text)
    (record,) = caplog.records
    assert "'漢' (CJK UNIFIED IDEOGRAPH-6F22)" in record.getMessage()
    assert record.getMessage().endswith("fonts-noto-cjk")
    drawn("नमस्ते 🐶")
    assert [record.getMessage().split()[-1] for record in caplog.records[1:]] == [
        "fonts-noto-core", "fonts-noto-color-emoji",
    ]  # fmt: skip


def test_a_user_without_a_home_has_no_fonts_there(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glus.fonts, "FONT_FOLDERS", ("~no.one/fonts", str(folder)))
    text_width(CHINESE, 20)
    assert "no font has" in caplog.text


@pytest.mark.parametrize("has_fontconfig", [False, True])
def test_the_system_has_what_dejavu_lacks(
    has_fontconfig: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    font = tmp_path / "fonts" / "deep" / "blocks.ttf"
    # Where the system has none, one that answers as it would.
    stand_in = tmp_path / "fc-match"
    stand_in.write_text(f"#!/bin/sh\nprintf '%s\\n0' '{font}'\n")
    stand_in.chmod(0o755)
    found = (shutil.which("fc-match") or str(stand_in)) if has_fontconfig else None
    monkeypatch.setattr(shutil, "which", lambda name: found)
    monkeypatch.setattr(glus.fonts, "FONT_FOLDERS", (str(tmp_path / "fonts"),))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    make_font(font, CHINESE)
    (tmp_path / "fonts" / "broken.ttf").write_bytes(b"no font")
    (tmp_path / "fonts" / "absent.ttf").symlink_to("nowhere")
    picture = drawn(f"a{CHINESE}b")
    assert not caplog.records
    assert text_width(CHINESE, 20) == 20
    left = 5 + round(text_width("a", 20))
    assert (picture[8:18, left + 2 : left + 18] == 0).all(), "the block"
    alone = drawn("a")
    np.testing.assert_array_equal(picture[:, : left - 1], alone[:, : left - 1], "Latin stays in DejaVu Sans")


def test_a_font_of_boxes_for_everything_is_no_help(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_font(folder / "LastResort.otf", CHINESE)
    drawn(CHINESE)
    assert len(caplog.records) == 1


def test_bitmaps_of_one_size_are_scaled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As coloured emoji are: FreeType opens their font in no other size."""
    make_font(folder / "emoji.ttf", "🐶")
    truetype = ImageFont.truetype

    def opened(path: str, size: int, index: int) -> ImageFont.FreeTypeFont:
        if path != dejavu().path and size != 109:
            raise OSError("invalid pixel size")
        return truetype(path, size, index)

    monkeypatch.setattr(ImageFont, "truetype", opened)
    assert text_width("🐶", 20) == pytest.approx(20)
    rows, columns = np.nonzero(drawn("🐶").min(-1) < 128)
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (20, 18)


def test_signs_stay_with_the_letter_that_they_belong_to(folder: Path) -> None:
    make_font(folder / "letters.ttf", "क", "👩", "💻")
    pieces = [text for text, _ in glus.fonts._runs("कि 👩\u200d💻\ufe0f")]
    assert pieces == ["कि", " ", "👩\u200d💻\ufe0f"]
    lines = wrap("ककिकिक" * 5, 10, 35)
    assert len(lines) > 3
    assert all(line.startswith("क") for line in lines)


def test_pieces_of_text_from_the_right_stand_from_the_right(folder: Path) -> None:
    make_font(folder / "blocks.ttf", CHINESE)
    assert [text for text, _ in glus.fonts._runs("שלום 漢 אב")] == [" אב", "漢", "שלום "]
    assert [text for text, _ in glus.fonts._runs("ab 漢 אב")] == ["ab ", "漢", " אב"]


@pytest.mark.skipif(
    not features.check("raqm"),
    reason="Pillow needs the system's library FriBidi for this, which no Python package brings (Debian: libfribidi0); "
    "what users are told without it is the next test, which is never skipped",
)
def test_hebrew_is_read_from_the_right_and_arabic_is_joined() -> None:
    columns = np.nonzero((drawn("א..") != drawn("..")).any((0, 2)))[0]
    assert columns.mean() > 5 + text_width("..", 20), "the first letter is the rightmost"
    assert text_width("ببب", 20) < 2.5 * text_width("ب", 20)


def test_without_raqm_a_warning_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(features, "check", lambda name: False)
    drawn("a red car")
    assert not caplog.records
    drawn("שלום"), drawn("אב")
    (record,) = caplog.records
    assert "install FriBidi" in record.getMessage()


def test_lines_break_between_words_and_within_what_has_no_spaces() -> None:
    assert wrap("a b", 10, 100) == ["a b"]
    assert wrap("", 10, 100) == [""]
    for text in ("a cat that is very black", "x" * 90, "a " + "y" * 90 + " z"):
        lines = wrap(text, 10, 100)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert max(text_width(line, 10) for line in lines) <= 100
        assert len(lines) > 1
