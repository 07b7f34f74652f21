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

import numpy as np

from glus.data.compiled import njit
from glus.data.mask_store import MaskStore, RleMasks
from glus.data.png import UnusablePrediction
from glus.data.predictions import RlePredictions, VideoPredictions
from glus.data.rle import Size
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
        _pack_dense(np.ascontiguousarray(pixels_THW).view(np.uint8), masks.words_TWh)
        return masks

    @classmethod
    def from_rle(cls, codes: Sequence[Sequence[str | bytes]], size: Size) -> BitMasks:
        """Pack COCO's compressed run-length codes without making pixels of them.

        Args:
            codes: for each frame the codes to be united; none for an empty mask.
            size: (H, W).

        Raises:
            ValueError: a code is none, or its runs do not make up H x W pixels; names the frame by its index.
        """
        masks = cls.empty(len(codes), size)
        num_pixels = size[0] * size[1]
        for frame, texts in enumerate(codes):
            for text in texts:
                data = np.frombuffer(text.encode("utf-8") if isinstance(text, str) else text, np.uint8)
                covered = _unite_code(data, masks.height, masks.words_TWh[frame])
                if covered != num_pixels:
                    reason = f"its runs cover {covered} pixels instead of {num_pixels} ({size[0]}x{size[1]})"
                    reason = reason if covered >= 0 else "it is not a compressed run-length code"
                    raise ValueError(f"mask of frame index {frame} does not decode: {reason}")
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


def compare(prediction: BitMasks, target: BitMasks, void: BitMasks | None = None) -> JFScores:
    """J and F of each frame, equal to the last bit to the official procedure (tools/benchmark_scoring.py).

    Args:
        prediction: T masks.
        target: as many of the same size.
        void: pixels that are taken out of both masks before anything else.

    Raises:
        ValueError: the numbers of frames or the sizes differ.
    """
    prediction, target = _without_void(prediction, target, void)
    counts_4T = region_counts(prediction, target)
    return JFScores(_region_scores(counts_4T), _boundary_scores(_boundary_counts(prediction, target)), *counts_4T)


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
    return _region_scores(region_counts(*_packed(prediction_THW, target_THW, void_THW)))


def boundary_accuracy(
    prediction_THW: np.ndarray, target_THW: np.ndarray, void_THW: np.ndarray | None = None
) -> np.ndarray:
    """F: harmonic mean of precision and recall of the boundary pixels in each frame.

    A boundary pixel matches if a boundary pixel of the other mask lies within ``boundary_radius`` of it. Arguments and
    errors as in ``region_similarity``.

    Returns:
        (T,) float64 in [0, 1]; 1 where neither mask has a boundary, 0 where only one has.
    """
    return _boundary_scores(_boundary_counts(*_packed(prediction_THW, target_THW, void_THW)))


def region_counts(prediction: BitMasks, target: BitMasks) -> np.ndarray:
    """(4, T) int64: pixels in both masks, in one or both, in the prediction, in the target."""
    return _count_pixels(prediction.words_TWh, target.words_TWh).T


def boundary_radius(height: int, width: int) -> int:
    """Matching distance of F in pixels for an image of this size: 8 at 480x854, 12 at 720x1280."""
    return math.ceil(BOUNDARY_TOLERANCE * math.sqrt(height * height + width * width))


def _packed(
    prediction_THW: np.ndarray, target_THW: np.ndarray, void_THW: np.ndarray | None
) -> tuple[BitMasks, BitMasks]:
    void = None if void_THW is None else BitMasks.from_dense(void_THW)
    return _without_void(BitMasks.from_dense(prediction_THW), BitMasks.from_dense(target_THW), void)


def _without_void(prediction: BitMasks, target: BitMasks, void: BitMasks | None) -> tuple[BitMasks, BitMasks]:
    """Both masks without the void pixels; ValueError unless all have the same frames and size."""
    if prediction.shape != target.shape:
        raise ValueError(f"masks to compare: expected two of one shape, got {prediction.shape}, {target.shape}")
    if void is None:
        return prediction, target
    if void.shape != target.shape:
        raise ValueError(f"void mask: expected {target.shape} like the masks, got {void.shape}")
    first, second = (BitMasks(masks.words_TWh & ~void.words_TWh, masks.height) for masks in (prediction, target))
    return first, second


def _region_scores(counts_4T: np.ndarray) -> np.ndarray:
    """J, (T,) float64."""
    intersection_T, union_T = counts_4T[:2]
    return np.divide(intersection_T, union_T, out=np.ones(union_T.shape), where=union_T > 0)


def _boundary_counts(prediction: BitMasks, target: BitMasks) -> np.ndarray:
    """(4, T) int64: boundary pixels of the prediction and of the target; the prediction's that lie within
    ``boundary_radius`` of one of the target's, and the other way round (0 where either has no boundary)."""
    lengths_r = _disk_columns(boundary_radius(*target.shape[1:]))
    return _count_boundaries(prediction.words_TWh, target.words_TWh, target.height, lengths_r).T


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


@njit(cache=True, nogil=True)
def _popcount(word: np.uint64) -> np.uint64:
    """Bits set in a word; LLVM turns this textbook sum into the processor's instruction."""
    word = word - ((word >> ONE) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit(cache=True, nogil=True)
def _count_bits(words_Tkx: np.ndarray) -> np.ndarray:
    """(T,) int64: bits set in each (k, x) of words."""
    counts_T = np.zeros(len(words_Tkx), np.int64)
    for t in range(len(words_Tkx)):
        count = np.uint64(0)
        for word in words_Tkx[t].ravel():
            count += _popcount(word)
        counts_T[t] = count
    return counts_T


@njit(cache=True, nogil=True)
def _count_pixels(prediction_TWh: np.ndarray, target_TWh: np.ndarray) -> np.ndarray:
    """(T, 4) int64: |P & G|, |P or G|, |P|, |G| of each frame, in one pass over the words."""
    counts_T4 = np.empty((len(prediction_TWh), 4), np.int64)
    for t in range(len(prediction_TWh)):
        prediction, target = prediction_TWh[t].ravel(), target_TWh[t].ravel()
        both = in_prediction = in_target = np.uint64(0)
        for i in range(prediction.size):
            both += _popcount(prediction[i] & target[i])
            in_prediction += _popcount(prediction[i])
            in_target += _popcount(target[i])
        counts_T4[t, 0], counts_T4[t, 1] = both, in_prediction + in_target - both
        counts_T4[t, 2], counts_T4[t, 3] = in_prediction, in_target
    return counts_T4


@njit(cache=True, nogil=True)
def _pack_dense(masks_THW: np.ndarray, words_TWh: np.ndarray) -> None:
    """Set the bits of the non-zero pixels (uint8, C-contiguous) in words of zeros."""
    num_frames, height, width = masks_THW.shape
    eight_W = np.empty(width, np.uint8)
    word_W = np.empty(width, np.uint64)
    for t in range(num_frames):
        for k in range(words_TWh.shape[2]):
            word_W[:] = 0
            is_empty = True
            for first in range(WORD_BITS * k, min(WORD_BITS * (k + 1), height), 8):
                if _pack_eight_rows(masks_THW[t, first : min(first + 8, height)], eight_W):
                    is_empty = False
                    shift = np.uint64(first - WORD_BITS * k)
                    for x in range(width):
                        word_W[x] |= np.uint64(eight_W[x]) << shift
            if not is_empty:
                for x in range(width):
                    words_TWh[t, x, k] = word_W[x]


@njit(cache=True, nogil=True)
def _pack_eight_rows(rows_8W: np.ndarray, eight_W: np.ndarray) -> bool:
    """Row i of up to eight becomes bit i of ``eight_W`` (bytes, which vectorise best); False if no pixel is set."""
    eight_W[:] = 0
    for i in range(rows_8W.shape[0]):
        bit = np.uint8(1 << i)
        row_W = rows_8W[i]
        for x in range(row_W.size):
            eight_W[x] |= np.uint8(row_W[x] != 0) * bit  # a conditional here costs 8 times as much
    any_bit = np.uint8(0)
    for x in range(eight_W.size):
        any_bit |= eight_W[x]
    return any_bit != 0


@njit(cache=True, nogil=True)
def _unite_code(text: np.ndarray, height: int, words_Wh: np.ndarray) -> int:
    """Add the pixels of a compressed run-length code (see ``glus.data.rle``) to a mask.

    Returns:
        The pixels covered (more than there are: a run is too long), -1 if it is no such code.
    """
    num_pixels = height * words_Wh.shape[0]
    position, num_runs = 0, 0
    before, last = 0, 0  # the lengths of the two runs before this one
    run, shift = 0, 0
    for character in text:
        group = int(character) - 48
        if group < 0 or group > 63 or shift > 55:
            return -1
        run |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            run -= 1 << shift
        if num_runs > 2:
            run += before
        if run < 0:
            return -1
        if position + run > num_pixels:
            return position + run
        if num_runs % 2:
            _fill(words_Wh, position, position + run, height)
        position += run
        before, last = last, run
        num_runs += 1
        run, shift = 0, 0
    return -1 if shift or num_runs == 0 else position


@njit(cache=True, nogil=True)
def _fill(words_Wh: np.ndarray, start: int, end: int, height: int) -> None:
    """Set the pixels ``start`` to ``end``, counted down the columns."""
    while start < end:
        x, y = start // height, start % height
        k = y // WORD_BITS
        count = min(end - start, height - y, WORD_BITS * (k + 1) - y)  # to the end of the run, column or word
        words_Wh[x, k] |= (ALL_BITS >> np.uint64(WORD_BITS - count)) << np.uint64(y - WORD_BITS * k)
        start += count


@njit(cache=True, nogil=True)
def _count_boundaries(
    prediction_TWh: np.ndarray, target_TWh: np.ndarray, height: int, lengths_r: np.ndarray
) -> np.ndarray:
    """(T, 4) int64, see ``_boundary_counts``.

    Only the bounding box of the union is looked at, one word and column wider up and left, where its boundary pixels
    lie. It needs no margin for the disk, because the dilated boundary is read at the other boundary's pixels alone.
    """
    counts_T4 = np.zeros((len(prediction_TWh), 4), np.int64)
    for t in range(len(prediction_TWh)):
        box = _union_box(prediction_TWh[t], target_TWh[t])
        if box[1] == 0:
            continue
        both_2kx = np.zeros((2, box[3] - box[2] + 2, box[1] - box[0] + 2), np.uint64)
        _draw_boundary(prediction_TWh[t], height, box, both_2kx[0])
        _draw_boundary(target_TWh[t], height, box, both_2kx[1])
        counts_T4[t, :2] = _count_bits(both_2kx)
        if counts_T4[t, 0] and counts_T4[t, 1]:
            around_prediction, around_target = _dilate(both_2kx[0], lengths_r), _dilate(both_2kx[1], lengths_r)
            both_2kx[0] &= around_target
            both_2kx[1] &= around_prediction
            counts_T4[t, 2:] = _count_bits(both_2kx)
    return counts_T4


@njit(cache=True, nogil=True)
def _union_box(prediction_Wh: np.ndarray, target_Wh: np.ndarray) -> tuple[int, int, int, int]:
    """Columns [left, right) and words [top, bottom) that hold the boundaries of both; right is 0 if both are empty."""
    width, num_words = prediction_Wh.shape
    left, right, top, bottom = width, 0, num_words, 0
    for x in range(width):
        for k in range(num_words):
            if prediction_Wh[x, k] | target_Wh[x, k]:
                left, right = min(left, x), x + 1
                top, bottom = min(top, k), max(bottom, k + 1)
    return max(left - 1, 0), right, max(top - 1, 0), bottom


@njit(cache=True, nogil=True)
def _draw_boundary(words_Wh: np.ndarray, height: int, box: tuple[int, int, int, int], boundary_kx: np.ndarray) -> None:
    """The pixels of a box that differ from their right, lower or lower right neighbour; neighbours outside the image
    are not compared.

    Args:
        words_Wh: the mask.
        height: H.
        box: columns and words, see ``_union_box``.
        boundary_kx: zeros, written: words x columns, with one word and one column of zeros around the box; the words
            of a row lie side by side here, so that operations on a row vectorise.
    """
    left, right, top, bottom = box
    width, num_words = words_Wh.shape
    pixels_kx = np.zeros((bottom - top + 1, right - left + 1), np.uint64)  # one more below and to the right
    pixels_kx[:-1, :-1] = words_Wh[left:right, top:bottom].T
    if right == width:
        pixels_kx[:, -1] = pixels_kx[:, -2]  # the last column has no right neighbour: equal to itself
    own_kx, right_kx = pixels_kx[:-1, :-1], pixels_kx[:-1, 1:]
    south_kx = (pixels_kx[:-1] >> ONE) | (pixels_kx[1:] << LAST_BIT)
    vertical_kx = (own_kx ^ south_kx[:, :-1]) | (own_kx ^ south_kx[:, 1:])
    if bottom == num_words:  # the last row of the image has no lower neighbour
        vertical_kx[-1] &= (ALL_BITS >> np.uint64(WORD_BITS * num_words - height)) >> ONE
    boundary_kx[1:-1, 1:-1] = (own_kx ^ right_kx) | vertical_kx


@njit(cache=True, nogil=True)
def _dilate(boundary_kx: np.ndarray, lengths_r: np.ndarray) -> np.ndarray:
    """The pixels in the disk around those of a boundary; the words and columns around the box stay 0.

    disk = union over dx of the columns at -dx..dx of half height lengths_r[dx], for those shrink with dx. So, from the
    outermost dx inwards: widen what there is by one column on both sides, let ``grown`` (the boundary, grown up and
    down one pixel at a time) reach lengths_r[dx], and add it.
    """
    grown, spare = boundary_kx.copy(), np.zeros_like(boundary_kx)
    disk, wider = np.zeros_like(boundary_kx), np.zeros_like(boundary_kx)
    length = 0
    for dx in range(lengths_r.size - 1, -1, -1):
        while length < lengths_r[dx]:
            _grow_vertically(grown, spare)
            grown, spare = spare, grown
            length += 1
        _widen_and_add(disk, grown, wider)
        disk, wider = wider, disk
    return disk


@njit(cache=True, nogil=True)
def _grow_vertically(words_kx: np.ndarray, grown_kx: np.ndarray) -> None:
    """Add the pixels above and below; rows in a loop of their own vectorise, whole arrays in an expression do not."""
    for k in range(1, words_kx.shape[0] - 1):
        above_x, own_x, below_x, grown_x = words_kx[k - 1], words_kx[k], words_kx[k + 1], grown_kx[k]
        for x in range(own_x.size):
            down, up = above_x[x] >> LAST_BIT, below_x[x] << LAST_BIT
            grown_x[x] = own_x[x] | (own_x[x] << ONE) | down | (own_x[x] >> ONE) | up


@njit(cache=True, nogil=True)
def _widen_and_add(words_kx: np.ndarray, added_kx: np.ndarray, wider_kx: np.ndarray) -> None:
    """Words with those of both neighbouring columns, and the added ones."""
    for k in range(1, words_kx.shape[0] - 1):
        own_x, added_x, wider_x = words_kx[k], added_kx[k], wider_kx[k]
        for x in range(1, own_x.size - 1):
            wider_x[x] = own_x[x - 1] | own_x[x] | own_x[x + 1] | added_x[x]


class TargetReader:
    """The ground truth of some frames of one video; remembers what it has read.

    Args:
        masks: the mask store of the split; where it holds run-length codes they are packed as they are.
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
            self._read[key] = self._pack(expression, chosen)
        return self._read[key]

    def ignored(self, expression: Expression, frames: Sequence[int]) -> BitMasks | None:
        """The pixels whose truth is unknown, see ``MaskStore.ignore``."""
        pixels_FHW = self.masks.ignore(expression, frames, self.size)
        return None if pixels_FHW is None else BitMasks.from_dense(pixels_FHW)

    def _pack(self, expression: Expression, frames: Sequence[int]) -> BitMasks:
        if isinstance(self.masks, RleMasks):
            codes = self.masks.codes(expression, frames, self.size)
            try:
                return BitMasks.from_rle(codes, self.size)
            except ValueError:
                pass  # reading them as pixels says which one is damaged
        return BitMasks.from_dense(self.masks.read(expression, frames, self.size))


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
