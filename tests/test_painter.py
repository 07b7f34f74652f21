"""Masks on frames as people see them: measured on the pixels, over many frames."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from glus.painter import FILL, INK, PAPER, SENTENCE_COLOURS, Painter, label_size, line_width, overlay, palette
from glus.pictures import annotate

STEPS = 240
SIZE = (270, 360)
WHITE = np.full((*SIZE, 3), 255, np.uint8)
ROWS, COLUMNS = np.mgrid[: SIZE[0], : SIZE[1]]
ONLY = [(0, 255, 255), (255, 0, 255), (255, 255, 0)]
"""Colours that show on white in one channel alone: how dark it is says how much of the mask's line is there."""


DICHROMACY = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
"""Linear RGB as these eyes see it: Machado, Oliveira and Fernandes (2009), severity 1."""


def oklab(colours_n3: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(n, 3) in Ottosson's OKLab times 100, where distances are about alike for the eye."""
    share = colours_n3 / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(matrix), 0, 1)
    to_cones = [[0.41222, 0.53633, 0.05145], [0.2119, 0.6807, 0.1074], [0.0883, 0.28172, 0.62998]]
    to_lab = [[0.21045, 0.79362, -0.00407], [1.978, -2.42859, 0.45059], [0.0259, 0.78277, -0.80868]]
    return 100 * np.cbrt(seen @ np.transpose(to_cones)) @ np.transpose(to_lab)


def disk(x: float, y: float, radius: float) -> np.ndarray:
    return (COLUMNS - x) ** 2 + (ROWS - y) ** 2 < radius**2


def square(x: int, y: int, side: int) -> np.ndarray:
    return (abs(COLUMNS - x) <= side // 2) & (abs(ROWS - y) <= side // 2)


def chips(picture: np.ndarray, colour: tuple[int, ...]) -> tuple[float, float] | None:
    """Centre of the patch of pure colour: lines are too thin to survive."""
    pure = (picture == colour).all(-1).astype(np.uint8)
    patch = cv2.morphologyEx(pure, cv2.MORPH_OPEN, np.ones((3, 9), np.uint8))
    y, x = np.nonzero(patch)
    return ((x.min() + x.max()) / 2, (y.min() + y.max()) / 2) if len(x) else None


def line_widths(picture: np.ndarray, channel: int, centre: tuple[float, float], radius: float) -> np.ndarray:
    """(180,) widths in pixels of a disk's line, across it, every two degrees."""
    line = line_width(picture)
    along = np.arange(-line / 2 - 1.2, line / 2 + 1.2, 0.1)  # from within the rim inside to within the one outside
    angles = np.radians(np.arange(0, 360, 2))[:, None]
    reach = radius - 0.5 + along  # an outline runs through the outermost pixels
    at = [centre[1] + reach * np.sin(angles), centre[0] + reach * np.cos(angles)]
    darkness = 1 - picture[..., channel] / 255.0
    return map_coordinates(darkness, at, order=1).sum(1) * 0.1


def test_the_width_of_lines_never_changes_however_masks_overlap() -> None:
    """B5. Three moving disks of which the upper ones cross the lower: each line is whole or absent, and never wider."""
    line = line_width(WHITE)
    for step in range(STEPS):
        turn = 2 * np.pi * step / STEPS
        disks = [
            ((180.0, 135.0), 100.0),
            ((180 + 90 * np.cos(turn), 135 + 40 * np.sin(turn)), 50.0),
            ((180 + 90 * np.cos(3 * turn), 135 - 70 * np.sin(2 * turn)), 30.0),
        ]
        masks = np.stack([disk(*centre, radius) for centre, radius in disks])
        picture = overlay(WHITE, masks, ONLY)
        for number, (centre, radius) in enumerate(disks):
            widths = line_widths(picture, number, centre, radius)
            assert widths.max() < line + 0.6, step
            if number == 2:  # nothing is above it
                assert widths.min() > line - 0.6, step
            above = [(c, r) for c, r in disks if r < radius]
            angles = np.radians(np.arange(0, 360, 2))
            rim = np.stack([centre[0] + radius * np.cos(angles), centre[1] + radius * np.sin(angles)])
            away = np.min([np.hypot(rim[0] - c[0], rim[1] - c[1]) - r for c, r in above] or [np.full(180, 99.0)], 0)
            assert (widths[away > 3 * line + 3] > line - 0.6).all(), step
            assert (widths[away < 0] < 0.6).all(), step


def test_what_does_not_move_is_drawn_alike_in_every_frame() -> None:
    painter = Painter(["1", "2"], palette(2))
    still, first = disk(80, 135, 40), None
    for step in range(STEPS):
        picture = painter.draw(WHITE, np.stack([still, disk(250 + 40 * np.sin(step / 9), 135, 30)]))
        first = picture[:, :140] if first is None else first
        np.testing.assert_array_equal(picture[:, :140], first)


@pytest.mark.parametrize("text", ["1", "1  the disk"])
def test_a_label_follows_its_object_without_a_jump(text: str) -> None:
    painter, places, step_size = Painter([text], palette(1)), [], 1.0
    for step in range(STEPS):
        picture = painter.draw(WHITE, disk(60 + step_size * step, 135 + 40 * np.sin(step / 30), 25)[None])
        places.append(chips(picture, SENTENCE_COLOURS[0]))
    moves = np.abs(np.diff(np.array(places), axis=0))
    assert moves.max() <= 3
    assert np.linalg.norm(np.subtract(places[-1], places[0])) > 0.9 * step_size * STEPS


def test_labels_make_room_for_each_other_without_a_jump() -> None:
    """Two objects cross; at the end each label is at its own object again."""
    painter, places = Painter(["1", "2"], palette(2)), []
    for step in range(STEPS):
        masks = np.stack([disk(60 + step, 150, 25), disk(300 - step, 150, 20)])
        picture = painter.draw(WHITE, masks)
        places.append([chips(picture, colour) for colour in palette(2)])
        assert None not in places[-1], "both are seen in every frame"
    across = np.array(places)[..., 0]  # in y, what one leaves uncovered of the other changes the centre
    assert np.abs(np.diff(across, axis=0)).max() <= 5
    np.testing.assert_allclose(across[-1], [60 + STEPS, 300 - STEPS], atol=5)


def test_a_label_stays_with_its_part_while_that_is_about_as_large_as_another() -> None:
    painter, places = Painter(["1"], palette(1)), []
    for step in range(60):
        parts = disk(90, 135, 30 + 3 * np.sin(step)) | disk(270, 135, 30)
        places.append(chips(painter.draw(WHITE, parts[None]), SENTENCE_COLOURS[0]))
    assert np.ptp([place[0] for place in places if place]) < 3


def test_the_smallest_mask_is_on_top_and_its_colour_alone_fills_it() -> None:
    masks = np.stack([disk(180, 135, 20), disk(180, 135, 100), disk(180, 135, 60)])
    picture = overlay(WHITE, masks, palette(3))
    for number, x in enumerate((180, 100, 140)):
        mixed = np.round(255 + FILL * (np.array(palette(3)[number]) - 255.0))
        np.testing.assert_allclose(picture[135, x], mixed, atol=1)


def test_more_masks_than_a_byte_counts_are_drawn() -> None:
    masks = np.zeros((300, 12, 30), bool)
    masks[range(300), np.arange(300) // 30, np.arange(300) % 30] = True
    colours = palette(300)
    picture = overlay(np.zeros((12, 30, 3), np.uint8), masks, colours, fill=1.0)
    np.testing.assert_array_equal(picture[9, 20:], colours[290:])


def test_masks_of_about_one_size_do_not_swap() -> None:
    painter, seen = Painter(["", ""], palette(2)), set()
    for step in range(20):
        masks = np.stack([disk(150, 135, 50 + step % 2), disk(200, 135, 51 - step % 2)])
        seen.add(tuple(painter.draw(WHITE, masks)[135, 175]))
    assert len(seen) == 1
    for number, radii in enumerate([(50, 90), (90, 50), (40, 100)]):
        masks = np.stack([disk(150, 135, radii[0]), disk(200, 135, radii[1])])
        smaller = np.round(255 + FILL * (np.array(SENTENCE_COLOURS[number % 2]) - 255.0))
        np.testing.assert_allclose(painter.draw(WHITE, masks)[135, 175], smaller, atol=1)


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (50, 7), (61, 83)])
def test_any_masks_are_drawn(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    painter = Painter(["1", "2  a long sentence", ""], palette(3))
    for share in np.linspace(0, 1, 25):
        noise = cv2.resize(rng.random((9, 9, 3)), size[::-1], interpolation=cv2.INTER_CUBIC).reshape(*size, 3)
        frame = np.full((*size, 3), 90, np.uint8)
        assert painter.draw(frame, noise.transpose(2, 0, 1) < share, "00000").shape == frame.shape


def has_line(picture: np.ndarray, colour: tuple[int, ...]) -> bool:
    return bool((picture == colour).all(-1).any())


def test_specks_have_no_outline() -> None:
    specks = disk(50, 50, 2) | disk(200, 100, 3)
    assert not has_line(overlay(WHITE, specks[None], palette(1)), SENTENCE_COLOURS[0])
    assert (overlay(WHITE, specks[None], palette(1))[50, 50] != 255).any(), "they are filled"
    assert has_line(overlay(WHITE, disk(50, 50, 12)[None], palette(1)), SENTENCE_COLOURS[0])


def test_the_edge_of_the_frame_is_no_outline() -> None:
    picture = overlay(WHITE, (COLUMNS < 200)[None], palette(1))
    is_line = (picture == SENTENCE_COLOURS[0]).all(-1)
    assert is_line[:, 190:210].any(1).all(), "from edge to edge"
    assert not is_line[:, :190].any()


def test_an_empty_answer_says_nothing_and_the_frame_its_name() -> None:
    def drawn(labels: list[str], mask: np.ndarray, name: str) -> np.ndarray:
        return (Painter(labels, palette(1)).draw(WHITE, mask[None], name) != WHITE).any(-1)

    empty, middle = np.zeros(SIZE, bool), SIZE[1] // 2
    assert not drawn([""], disk(180, 135, 40), "")[:40].any()
    assert drawn([""], empty, "")[:40, :middle].any()
    assert drawn(["2  the dog"], empty, "")[:40, :middle].sum() > drawn(["2"], empty, "")[:40, :middle].sum()
    assert drawn([""], disk(180, 135, 40), "00012")[:40, middle:].any()
    assert not drawn([""], disk(180, 135, 40), "00012")[:40, :middle].any()


def test_short_sentences_stand_at_their_objects_and_long_ones_below() -> None:
    masks = np.stack([disk(100, 135, 40), disk(250, 135, 40)])

    def pictures(*texts: str) -> list[np.ndarray]:
        return list(annotate(texts, [("0", WHITE, masks[: len(texts)]), ("1", WHITE, masks[: len(texts)])]))

    for picture in (*pictures("a dog"), *pictures("a dog", "a cat")):
        assert picture.shape == WHITE.shape
    for count in (1, 2):
        shapes = {picture.shape for picture in pictures(*["a dog that runs after another dog, then sleeps"] * count)}
        ((height, width, _),) = shapes
        assert width == SIZE[1]
        assert height > SIZE[0] + count * label_size(WHITE)
    assert chips(pictures("a dog")[0], SENTENCE_COLOURS[0]) is not None


def test_frames_of_a_movie_may_differ_in_size() -> None:
    frames = [("0", WHITE, np.ones((1, *SIZE), bool)), ("1", WHITE[:90, :80], np.ones((1, 90, 80), bool))]
    assert [picture.shape[1] for picture in annotate(["a long sentence that is told below"], frames)] == [SIZE[1], 80]


@pytest.mark.parametrize(("count", "apart"), [(4, 19), (7, 13.5), (28, 5)])
def test_colours_differ_for_every_kind_of_eyes(count: int, apart: float) -> None:
    """Okabe and Ito's seven come to 7.6, and with paler and darker forms of them to 1.4."""
    assert palette(count) == palette(28)[:count], "the same for any number of sentences"
    for matrix in DICHROMACY.values():
        seen = oklab(np.array(palette(count)), matrix)
        distances = np.linalg.norm(seen[:, None] - seen, axis=-1) + np.diag([np.inf] * count)
        assert distances.min() > apart


def test_letters_show_on_every_colour() -> None:
    for colour in SENTENCE_COLOURS:
        picture = Painter(["8"], [colour]).draw(WHITE, disk(180, 135, 30)[None])
        inks = [(picture == ink).all(-1)[90:105].any() for ink in (INK, PAPER)]
        assert any(inks)
