"""Masks in one folder per object or sentence; palettes are in test_masks.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glus.data.benchmarks.index import open_masks, read_expressions
from glus.data.masks import MaskStore
from glus.types import Expression
from tests.layouts import SIZE
from tests.layouts.object_folders import write_long_rvos, write_reason_vos
from tests.layouts.youtube_vos import write_groundmore

MOSE = Path("Annotations/MOSE_reason0_1")


@pytest.fixture
def reason_vos(tmp_path: Path) -> tuple[MaskStore, Expression]:
    """ReasonVOS' store and its first expression."""
    dataset = write_reason_vos(tmp_path, "valid").dataset
    return open_masks(dataset), read_expressions(dataset)[0]


def test_frames_without_a_file_have_no_truth(tmp_path: Path, reason_vos: tuple[MaskStore, Expression]) -> None:
    store, expression = reason_vos
    (tmp_path / MOSE / "00002.png").unlink()
    np.testing.assert_array_equal(store.annotated(expression), [True, True, False, True, True])
    with pytest.raises(
        FileNotFoundError, match=r"reason_vos/reason0/1_0, frame 00002 is missing; expected .*00002.png"
    ):
        store.read(expression, [2], SIZE)


def test_a_missing_folder_is_named(tmp_path: Path, reason_vos: tuple[MaskStore, Expression]) -> None:
    store, expression = reason_vos
    (tmp_path / MOSE).rename(tmp_path / "elsewhere")
    for ask in (lambda: store.annotated(expression), lambda: store.read(expression, [0], SIZE)):
        with pytest.raises(FileNotFoundError, match=r"reason0/1_0 are missing; expected the folder .*MOSE_reason0_1"):
            ask()
    shutil.rmtree(tmp_path / "Annotations")
    with pytest.raises(FileNotFoundError, match=r"'reason_vos' has no masks at .*Annotations"):
        store.read(expression, [0], SIZE)


@pytest.mark.parametrize(
    ("values", "mode", "message"),
    [
        (np.ones(SIZE, np.uint8), "L", r"values up to 1; expected foreground of 255"),
        (np.full(SIZE, 3, np.uint8), "P", r"values up to 3; expected foreground of 255"),
        (np.zeros((*SIZE, 3), np.uint8), "RGB", r"mode RGB; expected palette or grey"),
        (np.zeros((4, 5), np.uint8), "L", r"is 4x5, but the frame is 36x52"),
    ],
)
def test_a_file_of_other_numbers_is_no_empty_mask(
    tmp_path: Path, reason_vos: tuple[MaskStore, Expression], values: np.ndarray, mode: str, message: str
) -> None:
    store, expression = reason_vos
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette([0] * 768)
    assert image.mode == mode
    image.save(tmp_path / MOSE / "00001.png")
    with pytest.raises(ValueError, match=rf"reason0/1_0, frame 00001: .*00001.png (has )?{message}"):
        store.read(expression, [1], SIZE)


def test_soft_borders_are_foreground_and_one_bit_files_are_masks(
    tmp_path: Path, reason_vos: tuple[MaskStore, Expression]
) -> None:
    store, expression = reason_vos
    soft = np.tile(np.linspace(0, 255, SIZE[1]).astype(np.uint8), (SIZE[0], 1))
    Image.fromarray(soft).save(tmp_path / MOSE / "00000.png")
    Image.fromarray(soft > 99).save(tmp_path / MOSE / "00001.png")
    np.testing.assert_array_equal(store.read(expression, [0, 1], SIZE), [soft > 0, soft > 99])


def test_a_missing_object_of_long_rvos_is_an_error_where_a_missing_frame_is_an_empty_mask(tmp_path: Path) -> None:
    dataset = write_long_rvos(tmp_path, "valid").dataset
    store, expression = open_masks(dataset), read_expressions(dataset)[0]
    (tmp_path / "valid/Annotations/valid0/0/00001.png").unlink()
    assert store.annotated(expression).all()
    assert [bool(mask.any()) for mask in store.read(expression, range(3), SIZE)] == [True, False, True]
    shutil.rmtree(tmp_path / "valid/Annotations/valid0/0")
    for ask in (lambda: store.annotated(expression), lambda: store.read(expression, [0], SIZE)):
        with pytest.raises(FileNotFoundError, match=r"long_rvos/valid0/0 are missing; expected the folder .*valid0/0"):
            ask()


def test_a_video_of_groundmore_without_a_folder_of_masks_is_an_error(tmp_path: Path) -> None:
    """One without the file of a frame is not: nothing is annotated there."""
    dataset = write_groundmore(tmp_path, "trainval").dataset
    store, expression = open_masks(dataset), read_expressions(dataset)[0]
    folder = tmp_path / "annotations" / expression.video / "masks"
    (folder / "frame_000008.png").unlink()
    assert [bool(mask.any()) for mask in store.read(expression, [7, 8], SIZE)] == [True, False]
    folder.rename(tmp_path / "elsewhere")
    for ask in (lambda: store.annotated(expression), lambda: store.read(expression, [7], SIZE)):
        with pytest.raises(FileNotFoundError, match=r"clip0_0100_0104/0 are missing; expected the folder .*/masks"):
            ask()
