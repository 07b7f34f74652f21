"""Compiled loops over bit-packed masks: packing, counting, matching boundaries. ``bits.py`` is their interface.

A mask of H x W pixels is W columns of ceil(H / 64) words; bit i of word k of a column is the pixel in row 64 k + i, and
bits below the image are 0. Down the columns because COCO's runs go that way: a run is a few words filled.

Compiled by numba at the first call and kept on disk after it; every kernel releases the GIL. Only integers are counted
here, so nothing is rounded.
"""

from __future__ import annotations

import numpy as np
from numba import njit

WORD_BITS = 64
ONE, LAST_BIT = np.uint64(1), np.uint64(63)
ALL_BITS = np.uint64(0xFFFFFFFFFFFFFFFF)
BITS_1, BITS_2, BITS_4 = (
    np.uint64(pattern) for pattern in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F)
)
BYTES_1 = np.uint64(0x0101010101010101)


@njit(cache=True, nogil=True)
def _popcount(word: np.uint64) -> int:
    """Bits set in a word; LLVM turns this textbook sum into the processor's instruction."""
    word = word - ((word >> ONE) & BITS_1)
    word = (word & BITS_2) + ((word >> np.uint64(2)) & BITS_2)
    word = (word + (word >> np.uint64(4))) & BITS_4
    return int(np.int64((word * BYTES_1) >> np.uint64(56)))


@njit(cache=True, nogil=True)
def pack_dense(masks_THW: np.ndarray, words_TWh: np.ndarray) -> None:
    """Set the bits of the non-zero pixels.

    Args:
        masks_THW: uint8, C-contiguous.
        words_TWh: uint64 zeros (T, W, ceil(H / 64)), written.
    """
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
def pack_runs(
    text: np.ndarray, ends_N: np.ndarray, frames_N: np.ndarray, height: int, words_TWh: np.ndarray
) -> tuple[int, int]:
    """Unite COCO's compressed run-length codes in the frames they belong to.

    The code (see ``glus.data.rle``): runs alternate between 0 and 1, down the columns; each is written in groups of
    five bits, least significant first, as characters from "0" on, whose sixth bit says that another group follows; from
    the fourth run on it is the difference from the run two before.

    Args:
        text: uint8, the characters of N codes one after another.
        ends_N: int64, where each code ends in ``text``.
        frames_N: int64, the frame of each code.
        height: H.
        words_TWh: uint64, to which the bits are added.

    Returns:
        The first bad code or -1, and the pixels that its runs cover, or -1 if it is not a run-length code at all.
    """
    start = 0
    for n in range(ends_N.size):
        covered = _pack_one_code(text[start : ends_N[n]], height, words_TWh[frames_N[n]])
        if covered != height * words_TWh.shape[1]:
            return n, covered
        start = ends_N[n]
    return -1, 0


@njit(cache=True, nogil=True)
def _pack_one_code(text: np.ndarray, height: int, words_Wh: np.ndarray) -> int:
    """Add one code's bits; returns the pixels covered (more than there are: a run is too long), -1 for nonsense."""
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
    x = start // height
    y = start - x * height
    while start < end:
        stop = min(y + end - start, height)
        start += stop - y
        while y < stop:
            k = y // WORD_BITS
            next_y = min(WORD_BITS * (k + 1), stop)
            bits = ALL_BITS >> np.uint64(WORD_BITS - (next_y - y))
            words_Wh[x, k] |= bits << np.uint64(y - WORD_BITS * k)
            y = next_y
        x, y = x + 1, 0


@njit(cache=True, nogil=True)
def count_pixels(prediction_TWh: np.ndarray, target_TWh: np.ndarray, counts_T4: np.ndarray) -> None:
    """Count |P & G|, |P or G|, |P|, |G| of each frame into ``counts_T4`` (int64)."""
    num_frames, width, num_words = prediction_TWh.shape
    for t in range(num_frames):
        prediction, target = prediction_TWh[t].reshape(width * num_words), target_TWh[t].reshape(width * num_words)
        both = in_prediction = in_target = 0
        for i in range(prediction.size):
            both += _popcount(prediction[i] & target[i])
            in_prediction += _popcount(prediction[i])
            in_target += _popcount(target[i])
        counts_T4[t, 0], counts_T4[t, 1] = both, in_prediction + in_target - both
        counts_T4[t, 2], counts_T4[t, 3] = in_prediction, in_target


@njit(cache=True, nogil=True)
def count_boundaries(
    prediction_TWh: np.ndarray, target_TWh: np.ndarray, height: int, lengths_r: np.ndarray, counts_T4: np.ndarray
) -> None:
    """Count the boundary pixels of both masks, and those within the disk of one of the other's.

    Only the bounding box of the union is looked at, one row and column wider up and left, where its boundary pixels
    lie. It needs no margin for the disk, because the widened boundary is read at the other boundary's pixels alone.

    Args:
        prediction_TWh: uint64, C-contiguous.
        target_TWh: likewise.
        height: H.
        lengths_r: int64 (radius + 1,), half the height of the disk's column dx, see ``bits.disk_columns``.
        counts_T4: int64, written: prediction's and target's boundary pixels, prediction's and target's matched ones.
    """
    for t in range(prediction_TWh.shape[0]):
        counts_T4[t] = 0
        left, right, top, bottom = _union_box(prediction_TWh[t], target_TWh[t])
        if left == right:
            continue
        prediction_kx = np.zeros((bottom - top + 2, right - left + 2), np.uint64)
        target_kx = np.zeros_like(prediction_kx)
        counts_T4[t, 0] = _draw_boundary(prediction_TWh[t], height, left, top, prediction_kx)
        counts_T4[t, 1] = _draw_boundary(target_TWh[t], height, left, top, target_kx)
        if counts_T4[t, 0] and counts_T4[t, 1]:
            counts_T4[t, 2] = _count_matched(prediction_kx, target_kx, lengths_r)
            counts_T4[t, 3] = _count_matched(target_kx, prediction_kx, lengths_r)


@njit(cache=True, nogil=True)
def _union_box(prediction_Wh: np.ndarray, target_Wh: np.ndarray) -> tuple[int, int, int, int]:
    """Columns [left, right) and words [top, bottom) of the union's boundary pixels; left == right if it is empty."""
    width, num_words = prediction_Wh.shape
    rows_h = np.zeros(num_words, np.uint64)
    left, right = width, 0
    for x in range(width):
        any_bit = np.uint64(0)
        for k in range(num_words):
            word = prediction_Wh[x, k] | target_Wh[x, k]
            rows_h[k] |= word
            any_bit |= word
        if any_bit:
            left, right = min(left, x), x + 1
    if right == 0:
        return 0, 0, 0, 0
    top, bottom = 0, num_words
    while not rows_h[top]:
        top += 1
    while not rows_h[bottom - 1]:
        bottom -= 1
    if rows_h[top] & ONE and top > 0:
        top -= 1
    return max(left - 1, 0), right, top, bottom


@njit(cache=True, nogil=True)
def _draw_boundary(words_Wh: np.ndarray, height: int, left: int, top: int, boundary_kx: np.ndarray) -> int:
    """The pixels of a box that differ from their right, lower or lower right neighbour; neighbours outside the image
    are not compared.

    Args:
        words_Wh: the mask.
        height: H.
        left: first column of the box.
        top: its first word.
        boundary_kx: zeros, written: words x columns, with one word and one column of zeros around the box; the words
            of a row lie side by side here, so that the loops over a row vectorise.

    Returns:
        How many they are.
    """
    width, num_words = words_Wh.shape
    count = 0
    below = ALL_BITS >> np.uint64(WORD_BITS * num_words - height)  # in the last word, rows of the image ...
    for column in range(1, boundary_kx.shape[1] - 1):
        x = left + column - 1
        right_x = min(x + 1, width - 1)  # the last column has no right neighbour: equal to itself
        for row in range(1, boundary_kx.shape[0] - 1):
            k = top + row - 1
            own, right = words_Wh[x, k], words_Wh[right_x, k]
            is_last = k + 1 == num_words
            own_next = np.uint64(0) if is_last else words_Wh[x, k + 1]
            right_next = np.uint64(0) if is_last else words_Wh[right_x, k + 1]
            south = (own >> ONE) | (own_next << LAST_BIT)
            south_east = (right >> ONE) | (right_next << LAST_BIT)
            vertical = (own ^ south) | (own ^ south_east)
            if is_last:
                vertical &= below >> ONE  # ... but the last, which has no lower neighbour
            word = (own ^ right) | vertical
            boundary_kx[row, column] = word
            count += _popcount(word)
    return count


@njit(cache=True, nogil=True)
def _count_matched(boundary_kx: np.ndarray, other_kx: np.ndarray, lengths_r: np.ndarray) -> int:
    """Pixels of a boundary that lie in the disk around a pixel of the other.

    disk = union over dx of the columns at -dx..dx of half height lengths_r[dx], for those shrink with dx. So, from the
    outermost dx inwards: widen what there is by one column on both sides, let ``grown`` (the other boundary, grown up
    and down one pixel at a time) reach lengths_r[dx], and add it.
    """
    grown, spare = other_kx.copy(), np.zeros_like(other_kx)
    disk, wider = np.zeros_like(other_kx), np.zeros_like(other_kx)
    length = 0
    for dx in range(lengths_r.size - 1, -1, -1):
        while length < lengths_r[dx]:
            _grow_vertically(grown, spare)
            grown, spare = spare, grown
            length += 1
        _widen_and_add(disk, grown, wider)
        disk, wider = wider, disk
    matched = 0
    for row in range(1, disk.shape[0] - 1):
        own_x, disk_x = boundary_kx[row], disk[row]
        for x in range(own_x.size):
            matched += _popcount(own_x[x] & disk_x[x])
    return matched


@njit(cache=True, nogil=True)
def _grow_vertically(words_kx: np.ndarray, grown_kx: np.ndarray) -> None:
    """Add the pixels above and below; the words around the box stay 0."""
    for row in range(1, words_kx.shape[0] - 1):
        above_x, own_x, below_x, grown_x = words_kx[row - 1], words_kx[row], words_kx[row + 1], grown_kx[row]
        for x in range(own_x.size):
            down = (own_x[x] << ONE) | (above_x[x] >> LAST_BIT)
            up = (own_x[x] >> ONE) | (below_x[x] << LAST_BIT)
            grown_x[x] = own_x[x] | down | up


@njit(cache=True, nogil=True)
def _widen_and_add(words_kx: np.ndarray, added_kx: np.ndarray, wider_kx: np.ndarray) -> None:
    """Words with those of both neighbouring columns, and the added ones; the columns around the box stay 0."""
    for row in range(1, words_kx.shape[0] - 1):
        own_x, added_x, wider_x = words_kx[row], added_kx[row], wider_kx[row]
        for x in range(1, own_x.size - 1):
            wider_x[x] = own_x[x - 1] | own_x[x] | own_x[x + 1] | added_x[x]
