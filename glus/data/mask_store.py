"""What every store of ground-truth masks can do, and how its messages call a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from glus.data.rle import Size
from glus.types import Expression


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

    def ignore(self, expression: Expression, frames: Sequence[int], size: Size) -> np.ndarray | None:
        """Pixels whose truth is unknown: areas that ReasonSeg labels "ignore", void (255) of Ref-DAVIS17.

        A protocol that knows such pixels takes them out of prediction and truth before it counts anything. They are
        never part of what ``read`` returns. Ref-DAVIS17's protocol B scores as if there were none.

        Args:
            expression: as in ``read``.
            frames: as in ``read``.
            size: as in ``read``.

        Returns:
            (F, H, W) bool; None where the layout has no such pixels.

        Raises:
            FileNotFoundError, ValueError: as ``read``.
        """

    def annotated(self, expression: Expression) -> np.ndarray:
        """Frames for which there is a truth, be it an empty mask; ``read`` may not be asked for others.

        All of them, but for masks that lie in one folder per object or sentence (ReasonVOS, Ref-YouTube-VOS valid),
        where only the frames with a file are (ReasonVOS' official script scores just these), and for a picture of
        ReasonSeg without outlines (two of test).

        Returns:
            (T,) bool.

        Raises:
            FileNotFoundError: the folder of the masks is missing.
        """


def place(expression: Expression, frame: int) -> str:
    """How messages call a mask."""
    return f"{expression.name}, frame {expression.frames[frame]}"


def by(size: Sequence[int]) -> str:
    """Height x width."""
    return "x".join(str(side) for side in size)


def no_masks(name: str, path: object) -> FileNotFoundError:
    """The error of a split whose masks are not where they should be."""
    return FileNotFoundError(
        f"dataset {name!r} has no masks at {path}; a split without public masks cannot be trained on or scored"
    )
