"""Ground-truth masks as run-length codes, one file for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glus.data.mask_pack import Code, MaskCache, MaskFile
from glus.data.mask_store import by, place
from glus.data.rle import Size, encode_rle
from glus.types import Expression


class RleMasks:
    """MeViS: ``mask_dict.json``, {annotation id: [COCO run-length code or null per frame]}.

    Args:
        name: of the dataset, for messages.
        path: of the file.
    """

    def __init__(self, name: str, path: Path):
        self.file = MaskFile(name, path)

    def read(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray:
        """See ``MaskStore.read``; overlapping objects are united, never summed."""
        union = np.zeros((len(frames), *size), np.uint8)
        for row, counts, name in self._each(expression, frames, size):
            union[row] |= self.file.decode(counts, size, name)
        return union

    def ignore(self, expression: Expression, frames: Sequence[int], size: Size) -> None:
        """See ``MaskStore.ignore``: these layouts have no such pixels."""
        return None

    def annotated(self, expression: Expression) -> np.ndarray:
        """See ``MaskStore.annotated``: every frame; null is an empty mask."""
        return np.ones(len(expression.frames), bool)

    def codes(self, expression: Expression, frames: Sequence[int], size: Size) -> list[list[bytes]]:
        """The same masks as compressed run-length codes: for each frame, those of the objects in sight.

        The codes are of masks of ``size``, but are not decoded here: one may be corrupt.

        Raises:
            FileNotFoundError, ValueError: as ``read``.
        """
        codes: list[list[bytes]] = [[] for _ in frames]
        for row, counts, _ in self._each(expression, frames, size):
            codes[row].append(counts)
        return codes

    def _each(self, expression: Expression, frames: Sequence[int], size: Size) -> Iterator[tuple[int, bytes, str]]:
        """(row of ``frames``, compressed code, how to call it) of every mask there is."""
        for annotation_id in expression.annotation_ids:
            masks = self._check_annotation(expression, annotation_id)
            for row, frame in enumerate(frames):
                entry = masks.entry(annotation_id, frame)
                if entry is not None:  # null: the object is absent in this frame
                    name = f"{place(expression, frame)}, annotation {annotation_id}"
                    yield row, self._check_code(entry, size, name), name

    def _check_annotation(self, expression: Expression, annotation_id: str) -> MaskCache:
        """The masks, which have one entry of this annotation for each frame."""
        masks = self.file.open_with(expression, annotation_id)
        length = masks.length(annotation_id)
        if length != len(expression.frames):
            raise ValueError(
                f"masks of {expression.name}: annotation {annotation_id} in {self.file.path} has {length} entries; "
                f"expected one for each of the video's {len(expression.frames)} frames"
            )
        return masks

    def _check_code(self, entry: Any, size: Size, name: str) -> bytes:
        """The compressed code of an entry, which is of the right size."""
        if isinstance(entry, Code):
            found, counts = entry.size, entry.counts
        elif (
            isinstance(entry, dict)
            and isinstance(entry.get("counts"), str | list)
            and isinstance(entry.get("size"), list)
        ):
            found, counts = entry["size"], entry["counts"]
        else:
            raise ValueError(
                f"mask of {name} in {self.file.path}: expected null or {{size, counts}}, found {entry!r:.80}"
            )
        if list(found) != list(size):
            raise ValueError(
                f"mask of {name} in {self.file.path} is {by(found)}, but the frame is {by(size)} (height x width)"
            )
        return counts if isinstance(counts, bytes) else encode_rle(self.file.decode(counts, size, name)).encode("ascii")
