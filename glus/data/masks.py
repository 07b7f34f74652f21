"""Ground-truth masks: of an expression, in given frames, as 0/1 arrays of the frames' size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from glus.config import DatasetConfig, Layout
from glus.data.rle import Size, decode_rle
from glus.structures import Expression


class MaskStore(Protocol):
    """Where the masks of a split come from."""

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """The union of the expression's objects.

        Args:
            expression: without annotation ids the masks are empty.
            frames: F indices into ``expression.frames``.
            size: (H, W) of the frames; masks of another size are an error.

        Returns:
            (F, H, W) uint8 of 0/1.

        Raises:
            FileNotFoundError: the file with the masks is missing.
            ValueError: a mask has the wrong size, does not decode, or is not listed.
        """


def open_masks(dataset: DatasetConfig) -> MaskStore:
    """The mask store of a split; it reads nothing before the first mask is asked for."""
    is_mevis = dataset.layout is Layout.mevis
    path = Path(dataset.root) / (dataset.masks or f"{dataset.split}/{'mask_dict.json' if is_mevis else 'Annotations'}")
    return RleMasks(dataset.name, path) if is_mevis else PaletteMasks(dataset.name, path)


class RleMasks:
    """MeViS: ``mask_dict.json``, {annotation id: [COCO run-length code or null per frame]}.

    The file (411 MB for MeViS train) is read on first use, once per process.
    """

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path
        self._masks: dict[str, list[dict[str, Any] | None]] | None = None

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.read``; overlapping objects are united, never summed."""
        union = np.zeros((len(frames), *size), np.uint8)
        for annotation_id in expression.annotation_ids:
            codes = self._codes(expression, annotation_id)
            for row, frame in enumerate(frames):
                code = codes[frame]
                if code is not None:  # null: the object is absent in this frame
                    union[row] |= self._decode(code, size, f"{_place(expression, frame)}, annotation {annotation_id}")
        return union

    def _codes(self, expression: Expression, annotation_id: str) -> list[dict[str, Any] | None]:
        if self._masks is None:
            self._masks = self._load()
        if annotation_id not in self._masks:
            raise ValueError(f"masks of {expression.name}: {self.path} has no annotation {annotation_id!r}")
        codes = self._masks[annotation_id]
        if len(codes) != len(expression.frames):
            raise ValueError(
                f"masks of {expression.name}: annotation {annotation_id} in {self.path} has {len(codes)} entries; "
                f"expected one for each of the video's {len(expression.frames)} frames"
            )
        return codes

    def _load(self) -> dict[str, list[dict[str, Any] | None]]:
        if not self.path.is_file():
            raise FileNotFoundError(
                f"dataset {self.name!r} has no masks at {self.path}; a split without public masks cannot be "
                "trained on or scored"
            )
        try:
            masks = json.loads(self.path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path} is not JSON: {error}") from error
        if not isinstance(masks, dict):
            raise ValueError(f"{self.path}: expected {{annotation id: [mask per frame]}}, found {type(masks).__name__}")
        return masks

    def _decode(self, code: Any, size: Size, place: str) -> np.ndarray:
        if not isinstance(code, dict) or "size" not in code or "counts" not in code:
            raise ValueError(f"mask of {place} in {self.path}: expected null or {{size, counts}}, found {code!r:.80}")
        if tuple(code["size"]) != tuple(size):
            raise ValueError(
                f"mask of {place} in {self.path} is {_by(code['size'])}, but the frame is {_by(size)} (height x width)"
            )
        try:
            return decode_rle(code["counts"], size)
        except ValueError as error:
            raise ValueError(f"mask of {place} in {self.path} does not decode: {error}") from error


class PaletteMasks:
    """Ref-YouTube-VOS: ``Annotations/<video>/<frame>.png`` whose pixels are object ids."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.read``."""
        masks = np.zeros((len(frames), *size), np.uint8)
        if not expression.annotation_ids:
            return masks
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"dataset {self.name!r} has no masks at {self.folder}; a split without public masks cannot be "
                "trained on or scored"
            )
        values = [int(annotation_id) for annotation_id in expression.annotation_ids]
        for row, frame in enumerate(frames):
            masks[row] = np.isin(self._read_indices(expression, frame, size), values)
        return masks

    def _read_indices(self, expression: Expression, frame: int, size: Size) -> np.ndarray:
        """(H, W) uint8 palette indices, which a conversion to RGB or grey would lose."""
        path = self.folder / expression.video / f"{expression.frames[frame]}.png"
        place = _place(expression, frame)
        if not path.is_file():
            raise FileNotFoundError(f"mask of {place} is missing; expected {path}")
        try:
            with Image.open(path) as image:
                mode, indices = image.mode, np.array(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"mask of {place} does not decode: {path}: {error}") from error
        if mode not in ("P", "L"):
            raise ValueError(f"mask of {place}: {path} has mode {mode}; expected palette or grey (P, L) of object ids")
        if indices.shape != tuple(size):
            raise ValueError(
                f"mask of {place}: {path} is {_by(indices.shape)}, but the frame is {_by(size)} (height x width)"
            )
        return indices


def _place(expression: Expression, frame: int) -> str:
    return f"{expression.name}, frame {expression.frames[frame]}"


def _by(size: Sequence[int]) -> str:
    return "x".join(str(side) for side in size)
