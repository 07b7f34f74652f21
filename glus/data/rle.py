"""COCO's run-length code of a mask, in its compressed form (text) or plain (a list of runs).

Runs alternate between 0 and 1, starting with 0, down the columns. The compressed form holds each run in groups of five
bits, least significant first, as characters from "0" on; the sixth bit says that another follows, and from the fourth
run on it is the difference from the run two before (cocoapi's ``maskApi.c``).
"""

from __future__ import annotations

import numpy as np
from pycocotools import mask as coco

Size = tuple[int, int]
"""Height and width in pixels."""


def encode_rle(mask_HW: np.ndarray) -> str:
    """The compressed code of a mask, character for character that of pycocotools.

    Args:
        mask_HW: (H, W) of any type; whatever is not zero is foreground.
    """
    return coco.encode(np.asfortranarray(mask_HW != 0).view(np.uint8))["counts"].decode("ascii")


def decode_rle(counts: str | bytes | list[int], size: Size) -> np.ndarray:
    """A mask from its code, with the checks that pycocotools leaves out (a short code).

    Args:
        counts: compressed (text) or plain (list) run lengths.
        size: (H, W).

    Returns:
        (H, W) uint8 of 0/1.

    Raises:
        ValueError: the runs do not make up H x W pixels.
    """
    runs = np.asarray(counts, np.int64) if isinstance(counts, list) else unpack_runs(counts)
    height, width = size
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"its runs cover {int(runs.sum())} pixels instead of {height * width}")
    values = (np.arange(len(runs)) % 2).astype(np.uint8)
    return np.repeat(values, runs).reshape(width, height).T


def unpack_runs(counts: str | bytes) -> np.ndarray:
    """(n,) int64 run lengths in pixels from their compressed text; they may be negative where the text is corrupt.

    Raises:
        ValueError: the text holds other characters, ends within a run, or has one longer than any image.
    """
    text = counts.encode("utf-8") if isinstance(counts, str) else counts
    chars = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    is_last = (chars & 0x20) == 0
    if chars.size == 0 or chars.min() < 0 or chars.max() > 63 or not is_last[-1]:
        raise ValueError("it is not a compressed run-length code")
    starts = np.flatnonzero(np.concatenate([[True], is_last[:-1]]))
    lengths = np.diff(np.append(starts, chars.size))
    if lengths.max() > 12:
        raise ValueError("a run is longer than any image")
    shifts = 5 * (np.arange(chars.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((chars & 0x1F) << shifts, starts)
    is_negative = (chars[is_last] & 0x10) != 0
    runs -= np.where(is_negative, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
