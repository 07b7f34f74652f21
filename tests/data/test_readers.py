"""Every layout, written to disk by ``tests/layouts.py``, is read back exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from glus.config import Layout
from glus.data.frames import FrameStore
from glus.data.index import read_expressions
from glus.data.masks import open_masks
from tests.layouts import SIZE, WRITERS, Written

SPLITS = {
    Layout.mevis: ("train", "valid_u", "valid"),
    Layout.mevis_v2: ("train", "valid_u", "valid"),
    Layout.ref_youtube_vos: ("train",),
    Layout.ref_youtube_vos_valid: ("valid",),
    Layout.ref_davis17: ("train", "valid"),
    Layout.revos: ("train", "valid"),
    Layout.reason_vos: ("valid",),
    Layout.lvvis: ("train",),
    Layout.long_rvos: ("train", "valid", "test"),
    Layout.refcoco: ("train", "val", "testA", "testB", "test"),
    Layout.reason_seg: ("train", "val", "test"),
}


@pytest.mark.parametrize(("layout", "split"), [(layout, split) for layout in Layout for split in SPLITS[layout]])
def test_a_split_is_read_back_exactly(tmp_path: Path, layout: Layout, split: str) -> None:
    check_reading(WRITERS[layout](tmp_path / "here", split))


def check_reading(written: Written) -> None:
    """Expressions in order with their fields; masks, ignored pixels and frames of each."""
    dataset = written.dataset
    expressions = read_expressions(dataset)
    masks, frames = open_masks(dataset), FrameStore(dataset)
    assert [(e.video, e.exp_id) for e in expressions] == list(written.truth)
    for expression in expressions:
        truth = written.truth[expression.video, expression.exp_id]
        assert (expression.text, expression.group, expression.folder) == (truth.text, truth.group, truth.folder)
        assert (expression.object_ids, expression.frames) == (truth.object_ids, written.frames[expression.video])
        assert frames.size(expression.video, expression.frames[-1]) == SIZE
        every = range(len(expression.frames))
        assert masks.annotated(expression).all()
        read = masks.read(expression, every, SIZE)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, truth.masks_THW)
        if expression.annotation_ids:
            ignored = masks.ignore(expression, every, SIZE)
            assert (ignored is None) == (truth.ignore_THW is None)
            if ignored is not None:
                assert ignored.dtype == bool
                np.testing.assert_array_equal(ignored, truth.ignore_THW)
