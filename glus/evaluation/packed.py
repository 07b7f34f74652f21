"""Masks of 64 pixels a word, and J and F counted on them: exact, and many times faster than on pixels.

J and F (``region_similarity``, ``boundary_accuracy``) are ratios of pixel counts, so any way to count gives the same
scores bit for bit. Here counting is and, or, shift and popcount on words; boundaries are matched only where there are
some.
The loops are compiled by numba at the first call and kept on disk after it; they release the GIL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from glus.data.masks import MaskStore, Parts, Size
from glus.data.parallel import njit
from glus.data.predictions import VideoPredictions
from glus.types import Expression

BOUNDARY_TOLERANCE = 0.008
"""Distance, as a share of the image diagonal, within which two boundaries match (davis2017-evaluation)."""
WORD_BITS = 64
ONE, LAST_BIT = np.uint64(1), np.uint64(63)
ALL_BITS = np.uint64(0xFFFFFFFFFFFFFFFF)


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
    def empty(cls, num_frames: int, size: Size) -> BitMasks:
        """Masks without foreground; ValueError for a size without pixels."""
        height, width = size
        if height < 1 or width < 1:
            raise ValueError(f"masks to pack: expected a size of at least 1x1, got {height}x{width}")
        return cls(np.zeros((num_frames, width, -(-height // WORD_BITS)), np.uint64), height)

    @classmethod
    def from_dense(cls, masks_THW: np.ndarray) -> BitMasks:
        """Pack pixels.

        Args:
            masks_THW: any dtype; any non-zero pixel is foreground.

        Raises:
            ValueError: the array is not (T, H, W) or has no pixels.
        """
        if masks_THW.ndim != 3:
            raise ValueError(f"masks to pack: expected (T, H, W), got {masks_THW.shape}")
        num_frames, height, width = masks_THW.shape
        masks = cls.empty(num_frames, (height, width))
        pixels_THW = masks_THW if masks_THW.itemsize == 1 else masks_THW != 0
        bytes_TWb, rows_bW = masks.words_TWh.view(np.uint8), np.empty((-(-height // 8), width), np.uint8)
        for bytes_Wb, pixels_HW in zip(bytes_TWb, np.ascontiguousarray(pixels_THW).view(np.uint8), strict=True):
            _fold_rows(pixels_HW, rows_bW)
            if height % 8:
                rows_bW[-1] = np.packbits(pixels_HW[height // 8 * 8 :], axis=0, bitorder="little")
            bytes_Wb[:, : len(rows_bW)] = cv2.transpose(rows_bW)  # numpy's takes six times as long
        return masks

    @classmethod
    def united(cls, parts: Parts, size: Size) -> BitMasks:
        """Pack the union of each frame's masks of this size, (H, W); run lengths without making pixels of them."""
        masks = cls.empty(len(parts), size)
        for words_Wh, of_frame in zip(masks.words_TWh, parts, strict=True):
            for part in of_frame:
                if part.ndim == 1:
                    _fill_runs(part, masks.height, words_Wh)
                else:
                    words_Wh |= cls.from_dense(part[None]).words_TWh[0]
        return masks

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, H, W)."""
        return self.words_TWh.shape[0], self.height, self.words_TWh.shape[1]

    def to_dense(self) -> np.ndarray:
        """(T, H, W) uint8 of 0/1."""
        pixels_TWH = np.unpackbits(self.words_TWh.view(np.uint8), axis=2, count=self.height, bitorder="little")
        return np.ascontiguousarray(pixels_TWH.transpose(0, 2, 1))


@dataclass(frozen=True)
class JFScores:
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

    @property
    def jf_T(self) -> np.ndarray:
        """J&F, the mean of both."""
        return (self.j_T + self.f_T) / 2


def compare(prediction: BitMasks, target: BitMasks, void: BitMasks | None = None) -> JFScores:
    """J and F of each frame, equal to the last bit to the official procedure (tools/benchmark_scoring.py).

    Args:
        prediction: T masks.
        target: as many of the same size.
        void: pixels that are taken out of both masks before anything else.

    Raises:
        ValueError: the numbers of frames or the sizes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"masks to compare: expected two of one shape, got {prediction.shape}, {target.shape}")
    words = prediction.words_TWh, target.words_TWh
    if void is not None:
        if void.shape != target.shape:
            raise ValueError(f"void mask: expected {target.shape} like the masks, got {void.shape}")
        words = words[0] & ~void.words_TWh, words[1] & ~void.words_TWh
    counts_T4, boxes_T4 = np.split(_count_regions(*words), 2, axis=1)
    lengths_r = _disk_columns(boundary_radius(*target.shape[1:]))
    f_T = _boundary_scores(_count_boundaries(*words, boxes_T4, target.height, lengths_r).T)
    intersection_T, union_T = counts_T4.T[:2]
    j_T = np.divide(intersection_T, union_T, out=np.ones(union_T.shape), where=union_T > 0)
    return JFScores(j_T, f_T, *counts_T4.T)


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
    return _compare_dense(prediction_THW, target_THW, void_THW).j_T


def boundary_accuracy(
    prediction_THW: np.ndarray, target_THW: np.ndarray, void_THW: np.ndarray | None = None
) -> np.ndarray:
    """F: harmonic mean of precision and recall of the boundary pixels in each frame.

    A boundary pixel matches if a boundary pixel of the other mask lies within ``boundary_radius`` of it. Arguments and
    errors as in ``region_similarity``.

    Returns:
        (T,) float64 in [0, 1]; 1 where neither mask has a boundary, 0 where only one has.
    """
    return _compare_dense(prediction_THW, target_THW, void_THW).f_T


def region_counts(prediction: BitMasks, target: BitMasks) -> np.ndarray:
    """(4, T) int64: pixels in both masks, in one or both, in the prediction, in the target."""
    return _count_regions(prediction.words_TWh, target.words_TWh)[:, :4].T


def boundary_radius(height: int, width: int) -> int:
    """Matching distance of F in pixels for an image of this size: 8 at 480x854, 12 at 720x1280."""
    return math.ceil(BOUNDARY_TOLERANCE * math.sqrt(height * height + width * width))


def _compare_dense(prediction_THW: np.ndarray, target_THW: np.ndarray, void_THW: np.ndarray | None) -> JFScores:
    void = None if void_THW is None else BitMasks.from_dense(void_THW)
    return compare(BitMasks.from_dense(prediction_THW), BitMasks.from_dense(target_THW), void)


def _boundary_scores(counts_4T: np.ndarray) -> np.ndarray:
    """F, (T,) float64."""
    num_prediction_T, num_target_T, prediction_matched_T, target_matched_T = counts_4T
    precision_T = prediction_matched_T / np.maximum(num_prediction_T, 1)
    recall_T = target_matched_T / np.maximum(num_target_T, 1)
    total_T = precision_T + recall_T
    f_T = np.divide(2 * precision_T * recall_T, total_T, out=np.zeros(total_T.shape), where=total_T > 0)
    return np.where((num_prediction_T == 0) & (num_target_T == 0), 1.0, f_T)


@cache
def _disk_columns(radius: int) -> np.ndarray:
    """Half the height of each column dx = 0..radius of the disk x^2 + y^2 <= radius^2, (radius + 1,) int64."""
    return np.array([math.isqrt(radius * radius - dx * dx) for dx in range(radius + 1)], np.int64)


@njit
def _popcount(word: np.uint64) -> np.uint64:
    """Bits set in a word; LLVM turns this textbook sum into the processor's instruction."""
    word = word - ((word >> ONE) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit
def _count_bits(words_kx: np.ndarray) -> np.int64:
    """Bits set in an array."""
    count = np.uint64(0)
    for word in words_kx.ravel():
        count += _popcount(word)
    return np.int64(count)


@njit
def _fold_rows(pixels_HW: np.ndarray, rows_bW: np.ndarray) -> None:
    """Eight rows of pixels each (uint8, not 0: set) as the bits of a row of bytes; one term, or it is no SIMD code."""
    for k in range(pixels_HW.shape[0] // 8):
        a, b, c, d = pixels_HW[8 * k], pixels_HW[8 * k + 1], pixels_HW[8 * k + 2], pixels_HW[8 * k + 3]
        e, f, g, h = pixels_HW[8 * k + 4], pixels_HW[8 * k + 5], pixels_HW[8 * k + 6], pixels_HW[8 * k + 7]
        row_W = rows_bW[k]
        for x in range(row_W.size):
            row_W[x] = (
                np.uint8(a[x] != 0)
                | np.uint8(b[x] != 0) << np.uint8(1)
                | np.uint8(c[x] != 0) << np.uint8(2)
                | np.uint8(d[x] != 0) << np.uint8(3)
                | np.uint8(e[x] != 0) << np.uint8(4)
                | np.uint8(f[x] != 0) << np.uint8(5)
                | np.uint8(g[x] != 0) << np.uint8(6)
                | np.uint8(h[x] != 0) << np.uint8(7)
            )


@njit
def _fill_runs(runs: np.ndarray, height: int, words_Wh: np.ndarray) -> None:
    """Set the pixels of every second run, down the columns; the runs make up the mask (``unpack_runs``)."""
    x, y = 0, 0
    for number in range(runs.size):
        below = y + runs[number]
        while below > height:  # divisions by a variable take longer
            if number % 2:
                _fill_column(words_Wh[x], y, height)
            x, y, below = x + 1, 0, below - height
        if number % 2:
            _fill_column(words_Wh[x], y, below)
        y = below


@njit
def _fill_column(words_h: np.ndarray, start: int, end: int) -> None:
    """Set the pixels of the rows from ``start`` to before ``end``."""
    if start < end:
        first, last = start // WORD_BITS, (end - 1) // WORD_BITS
        from_start = ALL_BITS << np.uint64(start % WORD_BITS)
        to_end = ALL_BITS >> np.uint64(-end % WORD_BITS)
        if first == last:
            words_h[first] |= from_start & to_end
        else:
            words_h[first] |= from_start
            for k in range(first + 1, last):
                words_h[k] = ALL_BITS
            words_h[last] |= to_end


@njit
def _count_regions(prediction_TWh: np.ndarray, target_TWh: np.ndarray) -> np.ndarray:
    """Count pixels, and find the box around both masks, in one pass over the words.

    Returns:
        (T, 8) int64: |P & G|, |P or G|, |P|, |G|; first and last column (exclusive), first and last word (exclusive) of
        the pixels of both and of those to the left and above, which are boundary pixels; all 0 if both are empty.
    """
    num_frames, width, num_words = prediction_TWh.shape
    found_T8 = np.zeros((num_frames, 8), np.int64)
    for t in range(num_frames):
        union_h = np.zeros(num_words, np.uint64)
        left, right = width, 0
        both = in_prediction = in_target = np.uint64(0)
        for x in range(width):
            union = np.uint64(0)
            for k in range(num_words):
                union |= prediction_TWh[t, x, k] | target_TWh[t, x, k]
            if not union:
                continue
            left, right = min(left, x), x + 1
            for k in range(num_words):
                prediction, target = prediction_TWh[t, x, k], target_TWh[t, x, k]
                union_h[k] |= prediction | target
                both += _popcount(prediction & target)
                in_prediction += _popcount(prediction)
                in_target += _popcount(target)
        if right:
            top, bottom = np.flatnonzero(union_h)[np.array([0, -1])]
            top -= 1 if top and union_h[top] & ONE else 0
            found_T8[t, 4:] = max(left - 1, 0), right, top, bottom + 1
        found_T8[t, :4] = both, in_prediction + in_target - both, in_prediction, in_target
    return found_T8


@njit
def _count_boundaries(
    prediction_TWh: np.ndarray, target_TWh: np.ndarray, boxes_T4: np.ndarray, height: int, lengths_r: np.ndarray
) -> np.ndarray:
    """(T, 4) int64: boundary pixels of the prediction and of the target; the prediction's that lie in the disk around
    one of the target's, and the other way round (0 where either has no boundary).

    Only the box around both masks is looked at. It needs no margin for the disk, because the dilated boundary is read
    at the other boundary's pixels alone.
    """
    counts_T4 = np.zeros((len(prediction_TWh), 4), np.int64)
    for t in range(len(prediction_TWh)):
        left, right, top, bottom = boxes_T4[t]
        if right == 0:
            continue
        both_2kx = np.zeros((2, bottom - top + 2, right - left + 2), np.uint64)
        for masks_TWh, boundary_kx in ((prediction_TWh, both_2kx[0]), (target_TWh, both_2kx[1])):
            _draw_boundary(masks_TWh[t], height, (left, right, top, bottom), boundary_kx)
        counts_T4[t, 0], counts_T4[t, 1] = _count_bits(both_2kx[0]), _count_bits(both_2kx[1])
        if counts_T4[t, 0] and counts_T4[t, 1]:
            around_prediction, around_target = _dilate(both_2kx[0], lengths_r), _dilate(both_2kx[1], lengths_r)
            counts_T4[t, 2] = _count_bits(both_2kx[0] & around_target)
            counts_T4[t, 3] = _count_bits(both_2kx[1] & around_prediction)
    return counts_T4


@njit
def _draw_boundary(words_Wh: np.ndarray, height: int, box: tuple[int, int, int, int], boundary_kx: np.ndarray) -> None:
    """The pixels of a box that differ from their right, lower or lower right neighbour; neighbours outside the image
    are not compared.

    Args:
        words_Wh: the mask.
        height: H.
        box: columns and words, see ``_count_regions``.
        boundary_kx: zeros, written: words x columns, with one word and one column of zeros around the box; the words
            of a row lie side by side here, so that operations on a row vectorise.
    """
    left, right, top, bottom = box
    width, num_words = words_Wh.shape
    pixels_kx = np.zeros((bottom - top + 1, right - left + 1), np.uint64)  # one more below and to the right
    pixels_kx[:-1, :-1] = words_Wh[left:right, top:bottom].T
    if right == width:
        pixels_kx[:, -1] = pixels_kx[:, -2]  # the last column has no right neighbour: equal to itself
    for k in range(bottom - top):
        own_x, below_x, boundary_x = pixels_kx[k], pixels_kx[k + 1], boundary_kx[k + 1]
        compared = ALL_BITS  # with a lower neighbour: not the last row of the image
        if top + k + 1 == num_words:
            compared = (ALL_BITS >> np.uint64(-height % WORD_BITS)) >> ONE
        for x in range(own_x.size - 1):
            own, east = own_x[x], own_x[x + 1]
            south, south_east = (own >> ONE) | (below_x[x] << LAST_BIT), (east >> ONE) | (below_x[x + 1] << LAST_BIT)
            boundary_x[x + 1] = (own ^ east) | (((own ^ south) | (own ^ south_east)) & compared)


@njit
def _dilate(boundary_kx: np.ndarray, lengths_r: np.ndarray) -> np.ndarray:
    """The pixels in the disk around those of a boundary; the words and columns around the box stay 0.

    disk = union over dx of the columns at -dx and dx of half height lengths_r[dx]. So, from the outermost dx inwards:
    move what there is by one column to both sides, let ``grown`` (the boundary, grown up and down one pixel at a time)
    reach lengths_r[dx], and add it.
    """
    grown, spare = boundary_kx.copy(), np.zeros_like(boundary_kx)
    disk, wider = np.zeros_like(boundary_kx), np.zeros_like(boundary_kx)
    length = 0
    for dx in range(lengths_r.size - 1, -1, -1):
        while length < lengths_r[dx]:
            _grow_vertically(grown, spare)
            grown, spare = spare, grown
            length += 1
        _move_and_add(disk, grown, wider)
        disk, wider = wider, disk
    return disk


@njit
def _grow_vertically(words_kx: np.ndarray, grown_kx: np.ndarray) -> None:
    """Add the pixels above and below; rows in a loop of their own vectorise, whole arrays in an expression do not."""
    for k in range(1, words_kx.shape[0] - 1):
        above_x, own_x, below_x, grown_x = words_kx[k - 1], words_kx[k], words_kx[k + 1], grown_kx[k]
        for x in range(own_x.size):
            down, up = above_x[x] >> LAST_BIT, below_x[x] << LAST_BIT
            grown_x[x] = own_x[x] | (own_x[x] << ONE) | down | (own_x[x] >> ONE) | up


@njit
def _move_and_add(words_kx: np.ndarray, added_kx: np.ndarray, moved_kx: np.ndarray) -> None:
    """The words of both neighbouring columns, and the added ones."""
    for k in range(1, words_kx.shape[0] - 1):
        own_x, added_x, moved_x = words_kx[k], added_kx[k], moved_kx[k]
        for x in range(1, own_x.size - 1):
            moved_x[x] = own_x[x - 1] | own_x[x + 1] | added_x[x]


class TargetReader:
    """The ground truth of some frames of one video; remembers what it has read.

    Args:
        masks: the mask store of the split.
        frames: indices into the frames of an expression.
        size: (H, W).
    """

    def __init__(self, masks: MaskStore, frames: Sequence[int], size: Size):
        self.masks, self.frames, self.size = masks, frames, size
        self._read: dict[tuple[tuple[str, ...], tuple[int, ...]], BitMasks] = {}

    def __call__(self, expression: Expression, frames: Sequence[int] | None = None) -> BitMasks:
        """The union of the expression's objects in all the frames, or in these; errors as ``MaskStore.read``."""
        chosen = tuple(self.frames if frames is None else frames)
        key = expression.annotation_ids, chosen
        if key not in self._read:
            self._read[key] = BitMasks.united(self.masks.parts(expression, chosen, self.size), self.size)
        return self._read[key]

    def ignored(self, expression: Expression, frames: Sequence[int]) -> BitMasks | None:
        """The pixels whose truth is unknown, see ``MaskStore.ignore``."""
        pixels_FHW = self.masks.ignore(expression, frames, self.size)
        return None if pixels_FHW is None else BitMasks.from_dense(pixels_FHW)


def read_packed(
    predictions: VideoPredictions, expression: Expression, frames: Sequence[int], size: Size
) -> tuple[BitMasks, dict[int, str]]:
    """The predicted masks of some frames, empty where they are unusable; see ``VideoPredictions.parts``."""
    parts, unusable = predictions.parts(expression, frames, size)
    return BitMasks.united(parts, size), unusable


def read_complete(predictions: VideoPredictions, expression: Expression, frames: Sequence[int], size: Size) -> BitMasks:
    """The predicted masks of some frames; ValueError if one is missing or unusable."""
    masks, unusable = read_packed(predictions, expression, frames, size)
    if unusable:
        raise ValueError(f"{next(iter(unusable.values()))} (this needs complete predictions: see score.py)")
    return masks
