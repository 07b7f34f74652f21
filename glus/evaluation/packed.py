"""Masks of 64 pixels a word, and J and F counted on them: exact, and many times faster than on pixels.

J and F are ratios of pixel counts (see ``reference.py`` for the definition), so any way to count gives the same scores
bit for bit. Here counting is and, or, shift and popcount on words; boundaries are matched only where there are some.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from glus.data.mask_store import MaskStore, RleMasks
from glus.data.png import UnusablePrediction
from glus.data.predictions import RlePredictions, VideoPredictions
from glus.data.rle import Size
from glus.evaluation.kernels import WORD_BITS, count_boundaries, count_pixels, pack_dense, pack_runs
from glus.types import Expression

BOUNDARY_TOLERANCE = 0.008
"""Distance, as a share of the image diagonal, within which two boundaries match (davis2017-evaluation)."""


@dataclass(frozen=True)
class BitMasks:
    """Masks of T frames of one size.

    Words lie frame by frame, column by column (as COCO's runs do), down each column: bit i of ``words_TWh[t, x, k]`` is
    the pixel in row 64 k + i, column x. Bits below the image are 0. A 720x1280 mask takes 123 kB.

    ``masks.words_TWh`` may be combined with ``&``, ``|`` and indexed by frame; a new ``BitMasks`` of it costs nothing.
    """

    words_TWh: np.ndarray
    """(T, W, ceil(H / 64)) uint64, C-contiguous."""
    height: int
    """H in pixels."""

    @classmethod
    def from_dense(cls, masks_THW: np.ndarray) -> BitMasks:
        """Pack pixels.

        Args:
            masks_THW: any dtype; any non-zero pixel is foreground. uint8 and bool are the fastest.

        Raises:
            ValueError: the array is not (T, H, W) or has no pixels.
        """
        if masks_THW.ndim != 3:
            raise ValueError(f"masks to pack: expected (T, H, W), got {masks_THW.shape}")
        pixels_THW = masks_THW if masks_THW.itemsize == 1 else masks_THW != 0
        words_TWh = _no_words(len(masks_THW), masks_THW.shape[1:])
        pack_dense(np.ascontiguousarray(pixels_THW).view(np.uint8), words_TWh)
        return cls(words_TWh, masks_THW.shape[1])

    @classmethod
    def from_rle(cls, codes: Sequence[Sequence[str | bytes]], size: tuple[int, int]) -> BitMasks:
        """Pack COCO's compressed run-length codes without making pixels of them.

        Args:
            codes: for each frame the codes to be united; none for an empty mask.
            size: (H, W).

        Raises:
            ValueError: a code is none, or its runs do not make up H x W pixels; names the frame by its index.
        """
        texts = [code.encode("utf-8") if isinstance(code, str) else code for frame in codes for code in frame]
        text = np.frombuffer(b"".join(texts), np.uint8)
        ends_N = np.cumsum([len(code) for code in texts], dtype=np.int64)
        frames_N = np.repeat(np.arange(len(codes)), [len(frame) for frame in codes])
        words_TWh = _no_words(len(codes), size)
        bad, covered = pack_runs(text, ends_N, frames_N, size[0], words_TWh)
        if bad >= 0:
            reason = "it is not a compressed run-length code"
            if covered >= 0:
                reason = f"its runs cover {covered} pixels instead of {size[0] * size[1]} ({size[0]}x{size[1]})"
            raise ValueError(f"mask of frame index {frames_N[bad]} does not decode: {reason}")
        return cls(words_TWh, size[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, H, W)."""
        return self.words_TWh.shape[0], self.height, self.words_TWh.shape[1]

    def to_dense(self) -> np.ndarray:
        """(T, H, W) uint8 of 0/1."""
        num_frames, height, width = self.shape
        bytes_TWb = self.words_TWh.astype("<u8", copy=False).view(np.uint8)
        pixels_TWH = np.unpackbits(bytes_TWb, axis=2, count=height, bitorder="little")
        return np.ascontiguousarray(pixels_TWH.transpose(0, 2, 1)).reshape(num_frames, height, width)


@dataclass(frozen=True)
class FrameScores:
    """J and F of T frames, and the pixel counts that J is made of."""

    j_T: np.ndarray
    """Region similarity, float64 in [0, 1]; 1 where both masks are empty."""
    f_T: np.ndarray
    """Boundary accuracy, float64 in [0, 1]; 1 where neither mask has a boundary, 0 where only one has."""
    intersection_T: np.ndarray
    """int64: pixels in both masks; void pixels count nowhere."""
    union_T: np.ndarray
    """int64: pixels in one mask or both."""
    prediction_T: np.ndarray
    """int64: pixels of the prediction."""
    target_T: np.ndarray
    """int64: pixels of the target."""


def score_frames(prediction: BitMasks, target: BitMasks, void: BitMasks | None = None) -> FrameScores:
    """J and F of each frame, equal to the last bit to ``reference.py``.

    Args:
        prediction: T masks.
        target: as many of the same size.
        void: pixels that are taken out of both masks before anything else.

    Raises:
        ValueError: the numbers of frames or the sizes differ.
    """
    prediction, target = without_void(prediction, target, void)
    counts_4T = region_counts(prediction, target)
    return FrameScores(region_scores(counts_4T), boundary_scores(boundary_counts(prediction, target)), *counts_4T)


def without_void(prediction: BitMasks, target: BitMasks, void: BitMasks | None) -> tuple[BitMasks, BitMasks]:
    """Both masks without the void pixels; ValueError unless all have the same frames and size."""
    if prediction.shape != target.shape:
        raise ValueError(f"masks to compare: expected two (T, H, W), got {prediction.shape}, {target.shape}")
    if void is None:
        return prediction, target
    if void.shape != target.shape:
        raise ValueError(f"void mask: expected {target.shape} like the masks, got {void.shape}")
    first, second = (BitMasks(masks.words_TWh & ~void.words_TWh, masks.height) for masks in (prediction, target))
    return first, second


def region_counts(prediction: BitMasks, target: BitMasks) -> np.ndarray:
    """(4, T) int64: pixels in both masks, in one or both, in the prediction, in the target."""
    counts_T4 = np.empty((len(target.words_TWh), 4), np.int64)
    count_pixels(prediction.words_TWh, target.words_TWh, counts_T4)
    return counts_T4.T


def region_scores(counts_4T: np.ndarray) -> np.ndarray:
    """J from ``region_counts``, (T,) float64."""
    intersection_T, union_T = counts_4T[:2]
    return np.divide(intersection_T, union_T, out=np.ones(union_T.shape), where=union_T > 0)


def boundary_counts(prediction: BitMasks, target: BitMasks) -> np.ndarray:
    """(4, T) int64: boundary pixels of the prediction and of the target; the prediction's that lie within
    ``boundary_radius`` of one of the target's, and the other way round (0 where either has no boundary)."""
    counts_T4 = np.empty((len(target.words_TWh), 4), np.int64)
    lengths_r = disk_columns(boundary_radius(*target.shape[1:]))
    count_boundaries(prediction.words_TWh, target.words_TWh, target.height, lengths_r, counts_T4)
    return counts_T4.T


def boundary_scores(counts_4T: np.ndarray) -> np.ndarray:
    """F from ``boundary_counts``, (T,) float64."""
    num_prediction_T, num_target_T, prediction_matched_T, target_matched_T = counts_4T
    precision_T = prediction_matched_T / np.maximum(num_prediction_T, 1)
    recall_T = target_matched_T / np.maximum(num_target_T, 1)
    total_T = precision_T + recall_T
    f_T = np.divide(2 * precision_T * recall_T, total_T, out=np.zeros(total_T.shape), where=total_T > 0)
    return np.where((num_prediction_T == 0) & (num_target_T == 0), 1.0, f_T)


def boundary_radius(height: int, width: int) -> int:
    """Matching distance of F in pixels for an image of this size: 8 at 480x854, 12 at 720x1280."""
    return math.ceil(BOUNDARY_TOLERANCE * math.sqrt(height * height + width * width))


@cache
def disk_columns(radius: int) -> np.ndarray:
    """Half the height of each column dx = 0..radius of the disk x^2 + y^2 <= radius^2, (radius + 1,) int64."""
    return np.array([math.isqrt(radius * radius - dx * dx) for dx in range(radius + 1)], np.int64)


def _no_words(num_frames: int, size: tuple[int, ...]) -> np.ndarray:
    """Words of empty masks (T, W, ceil(H / 64))."""
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"masks to pack: expected a size of at least 1x1, got {height}x{width}")
    return np.zeros((num_frames, width, -(-height // WORD_BITS)), np.uint64)


def region_similarity(
    prediction_THW: np.ndarray, target_THW: np.ndarray, void_THW: np.ndarray | None = None
) -> np.ndarray:
    """J: intersection over union of the two masks in each frame.

    Args:
        prediction_THW: (T, H, W), any dtype; any non-zero pixel is foreground.
        target_THW: same shape and meaning.
        void_THW: same shape; non-zero pixels are taken out of both masks.

    Returns:
        (T,) float64 in [0, 1]; 1 where both masks are empty.

    Raises:
        ValueError: the shapes differ or are not (T, H, W).
    """
    return region_scores(region_counts(*_packed(prediction_THW, target_THW, void_THW)))


def boundary_accuracy(
    prediction_THW: np.ndarray, target_THW: np.ndarray, void_THW: np.ndarray | None = None
) -> np.ndarray:
    """F: harmonic mean of precision and recall of the boundary pixels in each frame.

    A boundary pixel matches if a boundary pixel of the other mask lies within ``bits.boundary_radius`` of it.

    Args:
        prediction_THW: (T, H, W), any dtype; any non-zero pixel is foreground.
        target_THW: same shape and meaning.
        void_THW: same shape; non-zero pixels are taken out of both masks before their boundaries are drawn.

    Returns:
        (T,) float64 in [0, 1]; 1 where neither mask has a boundary, 0 where only one has.

    Raises:
        ValueError: the shapes differ or are not (T, H, W).
    """
    return boundary_scores(boundary_counts(*_packed(prediction_THW, target_THW, void_THW)))


def _packed(
    prediction_THW: np.ndarray, target_THW: np.ndarray, void_THW: np.ndarray | None
) -> tuple[BitMasks, BitMasks]:
    """Both masks without void pixels."""
    if prediction_THW.ndim != 3 or prediction_THW.shape != target_THW.shape:
        raise ValueError(f"masks to compare: expected two (T, H, W), got {prediction_THW.shape}, {target_THW.shape}")
    if void_THW is not None and void_THW.shape != target_THW.shape:
        raise ValueError(f"void mask: expected {target_THW.shape} like the masks, got {void_THW.shape}")
    void = None if void_THW is None else BitMasks.from_dense(void_THW)
    return without_void(BitMasks.from_dense(prediction_THW), BitMasks.from_dense(target_THW), void)


class TargetReader:
    """The ground truth of some frames of one video; remembers what it has read.

    Args:
        masks: the mask store of the split; where it holds run-length codes they are packed as they are.
        frames: indices into the frames of an expression.
        size: (H, W).
    """

    def __init__(self, masks: MaskStore, frames: Sequence[int], size: Size):
        self._masks, self._frames, self._size = masks, frames, size
        self._read: dict[tuple[tuple[str, ...], tuple[int, ...]], BitMasks] = {}

    def __call__(self, expression: Expression, frames: Sequence[int] | None = None) -> BitMasks:
        """The union of the expression's objects in all the frames, or in these; errors as ``MaskStore.read``."""
        chosen = tuple(self._frames if frames is None else frames)
        key = expression.annotation_ids, chosen
        if key not in self._read:
            self._read[key] = self._pack(expression, chosen)
        return self._read[key]

    def ignored(self, expression: Expression, frames: Sequence[int]) -> BitMasks | None:
        """The pixels whose truth is unknown, see ``MaskStore.ignore``."""
        pixels_FHW: np.ndarray | None = self._masks.ignore(expression, frames, self._size)
        return None if pixels_FHW is None else BitMasks.from_dense(pixels_FHW)

    def _pack(self, expression: Expression, frames: Sequence[int]) -> BitMasks:
        if isinstance(self._masks, RleMasks):
            codes = self._masks.codes(expression, frames, self._size)
            try:
                return BitMasks.from_rle(codes, self._size)
            except ValueError:
                pass  # reading them as pixels says which one is damaged
        return BitMasks.from_dense(self._masks.read(expression, frames, self._size))


def read_packed(
    predictions: VideoPredictions, expression: Expression, frames: Sequence[int], size: Size
) -> tuple[BitMasks, dict[int, str]]:
    """The predicted masks of some frames, see ``VideoPredictions.read``; run-length codes are packed as they are."""
    if isinstance(predictions, RlePredictions):
        try:
            return BitMasks.from_rle(predictions.codes(expression, frames, size), size), {}
        except (UnusablePrediction, ValueError):
            pass  # reading them as pixels says which ones cannot be used
    masks_FHW, unusable = predictions.read(expression, frames, size)
    return BitMasks.from_dense(masks_FHW), unusable


def read_complete(
    predictions: VideoPredictions, expression: Expression, frames: Sequence[int], size: Size, hint: str
) -> BitMasks:
    """The predicted masks of some frames; ValueError, with a hint, if one is missing or unusable."""
    masks, unusable = read_packed(predictions, expression, frames, size)
    if unusable:
        raise ValueError(f"{next(iter(unusable.values()))} ({hint})")
    return masks
