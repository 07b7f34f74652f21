"""Ground-truth masks of a whole split in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from glus.data.json_stream import iterate_members
from glus.data.mask_cache import MaskCache, ReadMembers
from glus.data.mask_store import no_masks
from glus.data.rle import Size, decode_rle
from glus.structures import Expression


class MaskFile:
    """Masks by annotation id, read through a packed copy that all processes map into their memory (``mask_cache``).

    Args:
        name: of the dataset, for messages.
        path: of the file.
        read: for a file of another form than MeViS', see ``MaskCache``.
    """

    def __init__(self, name: str, path: Path, read: ReadMembers = iterate_members):
        self.path = path
        self._name, self._read = name, read
        self._opened: MaskCache | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A worker process opens the file itself."""
        return {**vars(self), "_opened": None}

    def open(self) -> MaskCache:
        """The masks; opened on first use.

        Raises:
            FileNotFoundError: there is no file of masks.
            ValueError: it is malformed.
            OSError: its packed copy can be written nowhere.
        """
        if self._opened is None:
            if not self.path.is_file():
                raise no_masks(self._name, self.path)
            self._opened = MaskCache(self.path, self._read)
        return self._opened

    def open_with(self, expression: Expression, annotation_id: str) -> MaskCache:
        """The masks, with this annotation of ``expression`` among them.

        Raises:
            FileNotFoundError, ValueError, OSError: as ``open``; or the annotation is not there.
        """
        masks = self.open()
        if annotation_id not in masks:
            raise ValueError(f"masks of {expression.name}: {self.path} has no annotation {annotation_id!r}")
        return masks

    def decode(self, counts: str | bytes | list[int], size: Size, name: str) -> np.ndarray:
        """(H, W) uint8 of 0/1 of a run-length code of this file; ``name`` is how messages call the mask.

        Raises:
            ValueError: it is no code of a mask of this size.
        """
        try:
            return decode_rle(counts, size)
        except ValueError as error:
            raise ValueError(f"mask of {name} in {self.path} does not decode: {error}") from error
