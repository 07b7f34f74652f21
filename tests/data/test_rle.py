"""COCO's run-length codes, against pycocotools and by hand."""

import numpy as np
import pytest
from pycocotools import mask as coco

from glus.data.masks import decode_rle, encode_rle, unpack_runs


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (60, 83), (300, 400)])
def test_codes_are_those_of_pycocotools(density, size):
    mask = (np.random.default_rng(0).random(size) < density).astype(np.uint8)
    code = coco.encode(np.asfortranarray(mask))
    assert encode_rle(mask) == encode_rle(mask == 1) == encode_rle(mask * 255) == code["counts"].decode()
    decoded = decode_rle(code["counts"], size)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, coco.decode(code))
    np.testing.assert_array_equal(decoded, mask)


def test_runs_go_down_the_columns_and_start_with_background():
    mask = [[0, 1, 0], [1, 0, 0]]
    np.testing.assert_array_equal(decode_rle([1, 2, 3], (2, 3)), mask)
    np.testing.assert_array_equal(unpack_runs(encode_rle(np.array(mask)), (2, 3)), [1, 2, 3])
    np.testing.assert_array_equal(unpack_runs(encode_rle(np.ones((2, 3))), (2, 3)), [0, 6])


@pytest.mark.parametrize("counts", ["", "xx", "\x01", "é", [1, 2], [-1, 55], "o" * 20 + "0"])
def test_corrupt_run_lengths_do_not_decode(counts):
    with pytest.raises(ValueError, match=r"its runs cover|not a compressed|negative length"):
        decode_rle(counts, (6, 9))
