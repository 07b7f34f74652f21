"""The training stream on two small datasets, one in each layout."""

import json
from itertools import count

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from glus.config import DataConfig, DatasetConfig, FramesConfig, Layout, MixtureItem, QuerySampling
from glus.data.chat.llava import LlavaChat, train_vocabulary
from glus.data.loader import build_loader, build_mixture
from glus.models.mllm.llava import clip_crop
from glus.tokens import Vocabulary
from tests.edits import edit_json

H, W, T, CLIP = 16, 24, 6, 8


def frame_pixels(video, index):
    """A frame that tells its video and number: red is the number, green the video, blue fixed."""
    frame = np.zeros((H, W, 3), np.uint8)
    frame[..., 0], frame[..., 1] = 10 * index, 40 * video
    return frame


def object_mask(index, top):
    mask = np.zeros((H, W), np.uint8)
    mask[top : top + 4, 2 * index : 2 * index + 4] = 1
    return mask


def write_frames(folder, video, length=T):
    folder.mkdir(parents=True)
    for index in range(length):
        Image.fromarray(frame_pixels(video, index)).save(folder / f"{index:05d}.png")


def write_mevis(root):
    """Two videos, each with four expressions: two objects alone, both, none."""
    videos, masks = {}, {}
    for video in range(2):
        write_frames(root / "train" / "JPEGImages" / f"m{video}", video)
        for number, top in enumerate((0, 8)):
            codes = [coco.encode(np.asfortranarray(object_mask(i, top))) for i in range(T)]
            masks[str(2 * video + number)] = [{"size": c["size"], "counts": c["counts"].decode()} for c in codes]
        ids = [[0], [1], [0, 1], []]
        expressions = {
            str(i): {"exp": f"object {i}.", "obj_id": objects, "anno_id": [2 * video + o for o in objects]}
            for i, objects in enumerate(ids)
        }
        videos[f"m{video}"] = {"frames": [f"{i:05d}" for i in range(T)], "expressions": expressions}
    (root / "train" / "meta_expressions.json").write_text(json.dumps({"videos": videos}))
    (root / "train" / "mask_dict.json").write_text(json.dumps(masks))
    return DatasetConfig(name="mevis", layout=Layout.mevis, root=str(root), split="train")


def write_ref_youtube_vos(root):
    """One video of six frames and one that is too short to train on."""
    videos = {}
    for video, (name, length) in enumerate((("r0", T), ("short", 2)), start=3):
        write_frames(root / "train" / "JPEGImages" / name, video, length)
        folder = root / "train" / "Annotations" / name
        folder.mkdir(parents=True)
        for index in range(length):
            Image.fromarray(object_mask(index, 0) * 5).save(folder / f"{index:05d}.png")
        frames = [f"{i:05d}" for i in range(length)]
        videos[name] = {"frames": frames, "expressions": {"0": {"exp": "It", "obj_id": "5"}}}
    path = root / "meta_expressions" / "train" / "meta_expressions.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"videos": videos}))
    return DatasetConfig(name="rytvos", layout=Layout.ref_youtube_vos, root=str(root), split="train")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    train_vocabulary(folder, ["object it"] * 5, 400)
    return LlavaChat(Vocabulary(folder), 2)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return write_mevis(tmp_path_factory.mktemp("mevis")), write_ref_youtube_vos(tmp_path_factory.mktemp("rytvos"))


def mixture_of(tokenizer, *datasets, weights=None, num_context=2, num_query=3, seed=0, sentences=3, **frames):
    weights = weights or [1.0] * len(datasets)
    items = {d.name: MixtureItem(dataset=d, weight=w) for d, w in zip(datasets, weights, strict=True)}
    data = DataConfig(mixture=items, expressions_per_video=sentences)
    want, prepare = FramesConfig(num_context, num_query, **frames), (lambda frame, role: clip_crop(frame, CLIP))
    return build_mixture(data, want, tokenizer, prepare, seed)


def same(first, second):
    return (
        first.names == second.names
        and first.object_keys == second.object_keys
        and np.array_equal(first.query_frames, second.query_frames)
        and np.array_equal(first.context_pixels, second.context_pixels)
        and all(
            np.array_equal(a.input_ids, b.input_ids)
            for a, b in zip(first.conversations, second.conversations, strict=True)
        )
    )


def test_a_sample_is_a_pure_function_of_seed_and_number(tokenizer, configs):
    first, again = mixture_of(tokenizer, *configs), mixture_of(tokenizer, *configs)
    numbers = [0, 1, 2, first.epoch_length, 1000]
    for number in reversed(numbers):
        assert same(first[number], again[number])
        again[7]
    assert not all(same(first[number], first[number + 1]) for number in numbers)
    assert not all(same(first[n], mixture_of(tokenizer, *configs, seed=1)[n]) for n in numbers)
    assert not all(same(first[n], first[n + first.epoch_length]) for n in numbers)


def test_masks_are_packed_before_loader_processes_start(tokenizer, tmp_path):
    """Packing takes much memory, which every process would take at the same time."""
    dataset = write_mevis(tmp_path)
    mixture_of(tokenizer, dataset)
    assert (tmp_path / "train" / "mask_dict.json.packed").is_file()


def test_frames_masks_and_keys_of_a_sample_belong_together(tokenizer, configs):
    mixture = mixture_of(tokenizer, configs[0], sentences=4)
    for number in range(10):
        sample = mixture[number]
        assert sample.context_pixels.shape == (2, CLIP, CLIP, 3)
        assert sample.query_frames.shape == (3, H, W, 3)
        assert sorted(name.split("/")[-1] for name in sample.names) == ["0", "1", "2", "3"]
        indices = [int(frame[0, 0, 0]) // 10 for frame in sample.query_frames]
        assert indices == list(range(indices[0], indices[0] + 3))
        assert {int(frame[0, 0, 1]) for frame in sample.query_frames} == {40 * int(sample.names[0].split("/")[1][1])}
        np.testing.assert_array_equal(sample.query_pixels[:, 0, 0], sample.query_frames[:, 0, 0])
        for name, masks, keys in zip(sample.names, sample.target_masks, sample.object_keys, strict=True):
            objects = {"0": [0], "1": [1], "2": [0, 1], "3": []}[name.split("/")[-1]]
            expected = [sum((object_mask(i, 8 * o) for o in objects), np.zeros((H, W), np.uint8)) for i in indices]
            np.testing.assert_array_equal(masks, expected)
            assert [int(key.frame) for key in keys] == indices
            assert {key.object_ids for key in keys} == {frozenset(objects)}
            assert {f"{key.dataset}/{key.video}/{key.exp_id}" for key in keys} == {name}


def test_sentences_are_drawn_without_replacement_and_asked_in_different_words(tokenizer, configs):
    mixture = mixture_of(tokenizer, configs[0], sentences=2)
    samples = [mixture[number] for number in range(30)]
    assert all(len(set(sample.names)) == 2 for sample in samples)
    assert len({name for sample in samples for name in sample.names}) == 8
    assert len({c.input_ids.tobytes() for sample in samples for c in sample.conversations}) > 30


def test_weights_decide_the_share_of_each_dataset_and_short_videos_are_left_out(tokenizer, configs):
    mixture = mixture_of(tokenizer, *configs, weights=[1.0, 3.0])
    assert mixture.epoch_length == 3
    names = [mixture[number].names[0].rsplit("/", 1)[0] for number in range(200)]
    assert set(names) == {"mevis/m0", "mevis/m1", "rytvos/r0"}
    assert 0.65 < names.count("rytvos/r0") / 200 < 0.85


@pytest.mark.parametrize("num_context", [0, 8])
@pytest.mark.parametrize("query_sampling", list(QuerySampling))
def test_counts_of_frames_are_free(tokenizer, configs, num_context, query_sampling):
    sample = mixture_of(tokenizer, configs[1], num_context=num_context, num_query=1, query_sampling=query_sampling)[0]
    assert sample.context_pixels.shape == (num_context, CLIP, CLIP, 3)
    assert [len(c.seg_positions) for c in sample.conversations] == [1]


def test_loader_gives_the_asked_samples_in_order_with_any_number_of_workers(tokenizer, configs):
    mixture = mixture_of(tokenizer, *configs)
    state = torch.get_rng_state()
    alone = build_loader(mixture, [[4, 9], [2, 7], [0, 1]], 0, pad_id=0)
    with_workers = build_loader(mixture, ([4, 9] if i == 0 else [2, 7] if i == 1 else [0, 1] for i in count()), 2, 0)
    for numbers in ([4, 9], [2, 7], [0, 1]):
        expected = [name for number in numbers for name in mixture[number].names]
        first, second = next(alone), next(with_workers)
        assert first.names == second.names == expected
        torch.testing.assert_close(first.rows.input_ids_BL, second.rows.input_ids_BL)
        torch.testing.assert_close(first.query_pixels, second.query_pixels)
    assert torch.equal(state, torch.get_rng_state())


def drain(mixture):
    for number in range(30):
        mixture[number]


def test_a_frame_that_does_not_decode_stops_training_and_is_named(tokenizer, tmp_path):
    config = write_mevis(tmp_path)
    (tmp_path / "train" / "JPEGImages" / "m1" / "00002.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"mevis/m1/00002 does not decode"):
        drain(mixture_of(tokenizer, config))
    loader = build_loader(mixture_of(tokenizer, config), [[n] for n in range(30)], 1, 0)
    with pytest.raises(ValueError, match=r"mevis/m1/00002 does not decode"):
        list(loader)


def test_a_frame_of_another_size_is_named(tokenizer, tmp_path):
    config = write_mevis(tmp_path)
    Image.new("RGB", (W, H + 1)).save(tmp_path / "train" / "JPEGImages" / "m0" / "00003.png")
    with pytest.raises(ValueError, match=r"mevis/m0: frame .* is \d+x24, but frame .* one size per video"):
        drain(mixture_of(tokenizer, config))


def test_a_mask_of_another_size_is_named(tokenizer, tmp_path):
    config = write_ref_youtube_vos(tmp_path)
    Image.new("L", (W, H - 1)).save(tmp_path / "train" / "Annotations" / "r0" / "00003.png")
    with pytest.raises(ValueError, match=r"rytvos/r0/0, frame 00003: .* is 15x24, but the frame is 16x24"):
        drain(mixture_of(tokenizer, config))


def test_a_missing_folder_is_named(tokenizer, tmp_path):
    config = DatasetConfig(name="mevis", layout=Layout.mevis, root=str(tmp_path / "gone"), split="train")
    with pytest.raises(FileNotFoundError, match=r"'mevis'.*gone/train/meta_expressions.json"):
        mixture_of(tokenizer, config)


def test_an_unannotated_split_stops_before_the_first_step(tokenizer, tmp_path):
    config = write_mevis(tmp_path)

    def keep_texts(content):
        for video in content["videos"].values():
            video["expressions"] = {key: {"exp": value["exp"]} for key, value in video["expressions"].items()}

    edit_json(tmp_path / "train" / "meta_expressions.json", keep_texts)
    with pytest.raises(ValueError, match=r"'mevis', split 'train'.*cannot be trained on"):
        mixture_of(tokenizer, config)


def test_a_mixture_of_nothing_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"data.mixture is empty"):
        mixture_of(tokenizer)
