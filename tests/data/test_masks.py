import json
import pickle

import numpy as np
import pytest
from PIL import Image

from glus.config import DatasetConfig, Layout
from glus.data.benchmarks.index import open_masks
from glus.data.masks import encode_rle, unpack_runs
from glus.types import Expression

SIZE = (6, 9)


def expression(annotation_ids, dataset="d"):
    return Expression(dataset, "v", "0", "text", ("00000", "00005"), (0,) * len(annotation_ids), annotation_ids)


def box(top, left, bottom, right, size=SIZE):
    mask = np.zeros(size, np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def rle(mask):
    return {"size": list(mask.shape), "counts": encode_rle(mask)}


def rle_store(root, masks):
    (root / "train").mkdir()
    (root / "train" / "mask_dict.json").write_text(json.dumps(masks))
    return open_masks(DatasetConfig(name="d", layout=Layout.mevis, root=str(root), split="train"))


def palette_store(root, frames, mode="P"):
    folder = root / "train" / "Annotations" / "v"
    folder.mkdir(parents=True)
    for name, indices in frames.items():
        image = Image.fromarray(indices)
        if mode == "P":
            image.putpalette([value for i in range(256) for value in (255 - i, i, 7)])
        image.convert(mode).save(folder / f"{name}.png")
    return open_masks(DatasetConfig(name="d", layout=Layout.ref_youtube_vos, root=str(root), split="train"))


def test_overlapping_objects_are_united_and_null_is_absent(tmp_path):
    first, second = box(0, 0, 3, 4), box(2, 2, 5, 8)
    store = rle_store(tmp_path, {"7": [rle(first), None], "8": [rle(second), rle(second)]})
    masks = store.read(expression(("7", "8")), [0, 1], SIZE)
    assert masks.dtype == np.uint8
    np.testing.assert_array_equal(masks, [first | second, second])
    np.testing.assert_array_equal(store.read(expression(("7",)), [1, 0], SIZE), [np.zeros(SIZE), first])


def test_run_lengths_are_those_to_be_united(tmp_path):
    first, second = rle(box(0, 0, 3, 4)), rle(box(2, 2, 5, 8))
    plain = {"size": list(SIZE), "counts": unpack_runs(second["counts"], SIZE).tolist()}
    store = rle_store(tmp_path, {"7": [first, None], "8": [second, plain]})
    expected = [[unpack_runs(code["counts"], SIZE).tolist() for code in frame] for frame in ([first, second], [second])]
    parts = store.parts(expression(("7", "8")), [0, 1, 0], SIZE)
    assert [[runs.tolist() for runs in frame] for frame in parts] == [*expected, expected[0]]
    with pytest.raises(ValueError, match=r"frame 00005, annotation 8 .* is 6x9, but the frame is 6x8"):
        store.parts(expression(("8",)), [1], (6, 8))


def test_a_store_is_sent_closed_to_other_processes(tmp_path):
    store = rle_store(tmp_path, {"1": [rle(box(0, 0, 3, 4)), None]})
    masks = store.read(expression(("1",)), [0, 1], SIZE)
    sent = pickle.dumps(store)
    assert len(sent) < 500
    np.testing.assert_array_equal(pickle.loads(sent).read(expression(("1",)), [0, 1], SIZE), masks)


@pytest.mark.parametrize("layout", list(Layout))
def test_no_annotation_gives_empty_masks_without_reading_any_file(tmp_path, layout):
    store = open_masks(DatasetConfig(name="d", layout=layout, root=str(tmp_path), split="train"))
    masks = store.read(expression(()), [0, 1, 1], SIZE)
    assert masks.shape == (3, *SIZE)
    assert not masks.any()


@pytest.mark.parametrize("layout", list(Layout))
def test_a_split_without_masks_is_named(tmp_path, layout):
    store = open_masks(DatasetConfig(name="d", layout=layout, root=str(tmp_path), split="valid"))
    with pytest.raises(FileNotFoundError, match=r"'d' has no masks at .*(valid|[Aa]nno|mask_|inst).*cannot be tr"):
        store.read(expression(("1",)), [0], SIZE)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([rle(box(0, 0, 2, 2, (6, 8))), None], "d/v/0, frame 00000, annotation 1 .* is 6x8, but the frame is 6x9"),
        ([rle(box(0, 0, 2, 2))], "d/v/0: annotation 1 .* has 1 entries; expected .* 2 frames"),
        ([{"size": list(SIZE), "counts": "00"}, None], "d/v/0, frame 00000, .* does not decode: .* instead of 54"),
        ([7, None], "d/v/0, frame 00000.*expected null or {size, counts}, found 7"),
        ([{"size": list(SIZE), "counts": None}, None], "d/v/0, frame 00000.*expected null or {size, counts}, found"),
        ([{"size": list(SIZE), "counts": [50, 3]}, None], "d/v/0, frame 00000, .* does not decode: .* 53 pixels"),
    ],
)
def test_bad_run_length_entries_name_expression_and_frame(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        rle_store(tmp_path, {"1": entry}).read(expression(("1",)), [0], SIZE)


def test_an_annotation_that_is_not_listed_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"d/v/0: .*mask_dict.json has no annotation '9'"):
        rle_store(tmp_path, {"1": []}).read(expression(("9",)), [0], SIZE)


@pytest.mark.parametrize("mode", ["P", "L"])
def test_palette_pixels_are_object_ids(tmp_path, mode):
    first = box(0, 0, 3, 4) * 2 + box(4, 4, 6, 9)
    store = palette_store(tmp_path, {"00000": first, "00005": box(1, 1, 2, 2) * 2}, mode)
    np.testing.assert_array_equal(store.read(expression(("2",)), [0, 1], SIZE), [first == 2, box(1, 1, 2, 2)])
    np.testing.assert_array_equal(store.read(expression(("1", "2")), [0], SIZE), [first > 0])


def test_bad_palette_files_name_expression_and_frame(tmp_path):
    store = palette_store(tmp_path, {"00000": box(0, 0, 3, 4)})
    with pytest.raises(ValueError, match=r"d/v/0, frame 00000: .* is 6x9, but the frame is 6x10"):
        store.read(expression(("1",)), [0], (6, 10))
    with pytest.raises(FileNotFoundError, match=r"d/v/0, frame 00005 is missing; expected .*00005.png"):
        store.read(expression(("1",)), [1], SIZE)
    (tmp_path / "train" / "Annotations" / "v" / "00005.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"d/v/0, frame 00005 does not decode"):
        store.read(expression(("1",)), [1], SIZE)


def test_a_colour_picture_is_no_mask(tmp_path):
    with pytest.raises(ValueError, match=r"mode RGB; expected palette or grey"):
        palette_store(tmp_path, {"00000": box(0, 0, 3, 4)}, "RGB").read(expression(("1",)), [0], SIZE)
