"""InternVL and Qwen3-VL against transformers' own classes, and all that LLaVA-GLUS does, with them."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from glus.batch import Batch, TrainSample
from glus.config import FramesConfig, InferenceConfig, ModelConfig, ModelFolderConfig, SegHeadInit, SegState, Window
from glus.data.chat import ChatmlChat
from glus.data.chat.chatml import axis_positions
from glus.data.chat.tree import separate_rows, unpack_conversations
from glus.data.dataset import collate
from glus.data.sampling import draw_turns
from glus.inference.predictor import VideoPredictor, chat_of
from glus.losses.objective import GlusObjective
from glus.models.glus import Glus
from glus.models.pretrained import (
    LoadedModel,
    build_glus,
    load_model,
    load_to_merge,
    save_merged,
)
from glus.tokens import IMAGE_ID, open_vocabulary
from glus.types import ObjectKey, Role
from tests.backbones import FAMILY_NAMES, VOCABULARY_SIZE, backbone_config, write_vocabulary
from tests.models.conftest import TEXTS, save_trained
from tools import convert_weights
from tools.check_backbone import compare_backbone

FRAMES = FramesConfig(2, 3)
SIZE = (40, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def model(request: pytest.FixtureRequest, folder: Path) -> LoadedModel:
    """Every weight moved from its initial value, so that each one matters."""
    sizes = {"context_size": 32, "query_size": 48}
    config = backbone_config(request.param, folder, sizes=sizes, vision={"image_size": [48, 48]})
    config = config if request.param == "internvl" else backbone_config(request.param, folder, sizes=sizes)
    return random_model(config)


def random_model(config: ModelConfig) -> LoadedModel:
    torch.manual_seed(0)
    glus = build_glus(config).eval()
    with torch.no_grad():
        for parameter in glus.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = ModelFolderConfig(config, FRAMES, InferenceConfig(chunk_frames=4))
    return LoadedModel(glus, open_vocabulary(config.llm.tokenizer), folder)


def batch_of(model: LoadedModel, sizes: tuple[tuple[int, int], ...] = (SIZE, (64, 40))) -> Batch:
    """A video of two sentences for each size."""
    rng, glus = np.random.default_rng(0), model.glus
    chat = chat_of(glus, model.vocabulary)

    def sample(video: int, size: tuple[int, int]) -> TrainSample:
        frames = rng.integers(0, 256, (FRAMES.num_context + FRAMES.num_query, *size, 3), dtype=np.uint8)
        context, query = frames[: FRAMES.num_context], frames[FRAMES.num_context :]
        keys = [[ObjectKey("x", str(video), str(row), str(q), frozenset({row})) for q in range(3)] for row in range(2)]
        return TrainSample(
            np.stack([glus.mllm.prepare(frame, Role.context) for frame in context]),
            np.stack([glus.mllm.prepare(frame, Role.query) for frame in query]),
            query,
            [chat.sized(size).train(draw_turns(text, 3, rng), 2, text) for text in TEXTS[:2]],
            [rng.integers(0, 2, (3, *size), dtype=np.uint8) for _ in range(2)],
            keys,
            ["a", "b"],
        )

    return collate([sample(video, size) for video, size in enumerate(sizes)], model.vocabulary.pad_id)


ODD_SIZES: list[tuple[str, dict[str, Any], FramesConfig]] = [
    ("qwen3_vl", {"vision": {"depth": 4, "deepstack_visual_indexes": [0, 1, 3]}, "tied": True,
                  "text": {"num_attention_heads": 6, "num_key_value_heads": 1, "num_hidden_layers": 5},
                  "sizes": {"context_size": 40, "query_size": 72}}, FramesConfig(1, 2)),
    ("qwen3_vl", {"vision": {"deepstack_visual_indexes": []}}, FramesConfig(0, 2)),
    ("qwen2_5_vl", {"vision": {"depth": 4, "window_size": 48, "fullatt_block_indexes": [0, 3]}, "tied": True,
                    "sizes": {"context_size": 40, "query_size": 72}}, FramesConfig(1, 2)),
    ("internvl", {"sizes": {"context_size": 64, "query_size": 64, "pool": 2}, "tied": False}, FramesConfig(2, 2)),
    ("internvl", {"sizes": {"context_size": 32, "query_size": 48}, "text": {"num_key_value_heads": 4}},
     FramesConfig(2, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields", "frames"), ODD_SIZES)
def test_it_is_what_transformers_computes(
    family: str, fields: dict[str, Any], frames: FramesConfig, tmp_path: Path
) -> None:
    """Packed for training and shared at inference, against whole, separate conversations through its own classes."""
    config = backbone_config(family, tmp_path, **fields)
    rows = compare_backbone(config, frames, [(40, 64), (90, 31)], tmp_path, seed=1)
    assert len(rows) == 7
    assert not [row for row in rows if row.status != "pass"]


def test_a_seed_decides_the_compared_weights_too(tmp_path: Path) -> None:
    family, fields, frames = ODD_SIZES[0]
    config = backbone_config(family, tmp_path, **fields)
    first, second = (compare_backbone(config, frames, [(40, 64)], tmp_path, seed=1) for _ in range(2))
    assert first == second


def test_positions_advance_by_the_longer_side_of_a_frame() -> None:
    ids = np.array([5, 6, *[IMAGE_ID] * 6, 7, 8])
    axes = axis_positions(ids, [(2, 3)])
    assert axes[:2].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert axes[2:8].tolist() == [[2, 2 + row, 2 + column] for row in range(2) for column in range(3)]
    assert axes[8:].tolist() == [[5, 5, 5], [6, 6, 6]]


def test_a_sentence_that_spells_special_tokens_stays_text(model: LoadedModel) -> None:
    chat = chat_of(model.glus, model.vocabulary)
    assert isinstance(chat, ChatmlChat)
    special = {chat.vocabulary.id_of(token) for token in ("<|im_end|>", "<|im_start|>")} | {chat.vocabulary.seg_id}
    text = "a <|im_end|> <|im_start|>system [SEG] <IMG_CONTEXT>"
    ids = chat.vocabulary.encode(text)
    assert not special & set(ids)
    window = chat.window(text, 1, 1)
    assert (window.input_ids == chat.vocabulary.seg_id).sum() == 0


def test_visual_tokens_without_their_levels_are_refused(folder: Path) -> None:
    model = random_model(backbone_config("qwen3_vl", folder))
    batch = batch_of(model)
    tokens = model.glus.see(batch)
    assert tokens.shape[1:] == (3, 48) == model.glus.mllm.visual_shape
    for fewer in (tokens[:, 0], tokens[:, :2]):
        with pytest.raises(ValueError, match="deepstack levels included"):
            model.glus.mllm.states(batch.rows, fewer)
    with pytest.raises(ValueError, match="3 levels for an LLM of 2 layers"):
        random_model(backbone_config("qwen3_vl", folder, vision={"deepstack_visual_indexes": [0, 1, 2]},
                                     text={"num_hidden_layers": 2}))  # fmt: skip


def test_a_vocabulary_larger_than_the_tables_is_named(folder: Path) -> None:
    model = random_model(backbone_config("internvl", folder))
    model.glus.mllm.decoder.text.embed_tokens.weight = torch.nn.Parameter(torch.zeros(9, 48))
    with pytest.raises(ValueError, match=r"model\.llm\.vocab_size=9: .* set model\.llm\.vocab_size=\d+"):
        chat_of(model.glus, model.vocabulary)


def states_of(glus: Glus, batch: Batch) -> torch.Tensor:
    with torch.inference_mode():
        return glus.mllm.states(batch.rows, glus.see(batch))[0]


@pytest.fixture(params=[*product(FAMILY_NAMES, (True, False)), ("qwen2_5_vl", True)])
def published(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> tuple[Path, ModelConfig, Any]:
    """What transformers writes, in shards: its folder, settings for it, and the model itself. [SEG] has no row yet."""
    family, tied = request.param
    fewer = backbone_config(family, folder, tied=tied, rows=VOCABULARY_SIZE - 1)
    model = random_model(replace(fewer, llm=replace(fewer.llm, lora_rank=0), trainable=["seg_head"]))
    net: Any = model.glus.mllm.net  # type: ignore[attr-defined]
    net.save_pretrained(tmp_path / "published", max_shard_size="100KB")
    config = backbone_config(family, folder, tied=tied)
    config.llm.weights = str(tmp_path / "published")
    return tmp_path / "published", config, net


def test_a_published_folder_loads_strictly(published: tuple[Path, ModelConfig, Any]) -> None:
    place, config, net = published
    assert len(list(place.glob("*.safetensors"))) > 1
    glus = build_glus(config).eval()
    ours: Any = glus.mllm
    table = net.get_input_embeddings().weight
    grown = ours.decoder.text.embed_tokens.weight
    assert torch.equal(grown[: len(table)], table)
    torch.testing.assert_close(grown[len(table)], table.mean(0))  # the new row, [SEG]'s
    assert (ours.decoder.owner.lm_head.weight is grown) == config.llm.tied
    ids = torch.arange(1, 30)[None]
    theirs = net(input_ids=ids).logits
    torch.testing.assert_close(ours.net(input_ids=ids).logits[..., : len(table)], theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("published", [("qwen2_5_vl", True)], indirect=True)
def test_names_of_before_a_family_had_parts_load_too(published: tuple[Path, ModelConfig, Any]) -> None:
    """Its published folders call the LLM ``model`` and the tower ``visual``."""
    place, config, net = published
    old = {}
    for file in place.glob("*.safetensors"):
        for name, value in load_file(file).items():
            old[re.sub(r"^model\.language_model\.", "model.", re.sub(r"^model\.visual\.", "visual.", name))] = value
        file.unlink()
    assert {name.partition(".")[0] for name in old} == {"model", "visual"}
    (place / "model.safetensors.index.json").unlink()
    save_file(old, place / "model.safetensors", {"format": "pt"})
    ours: Any = build_glus(config).mllm
    expected = net.state_dict()
    assert all(torch.equal(value[: len(expected[name])], expected[name]) for name, value in ours.net.named_parameters()
               if name in expected)  # fmt: skip


def test_a_folder_that_is_otherwise_is_refused(published: tuple[Path, ModelConfig, Any]) -> None:
    place, config, _ = published
    wrong = copy.deepcopy(config)
    wrong.llm.tied = not config.llm.tied
    with pytest.raises(ValueError, match=r"model\.llm\.tied=.*config\.json says"):
        build_glus(wrong)
    wrong = copy.deepcopy(config)
    wrong.llm.architecture["rms_norm_eps"] = 1e-3
    with pytest.raises(ValueError, match=r"model\.llm\.architecture\.rms_norm_eps=0\.001, but .* says 1e-0[56]"):
        build_glus(wrong)
    index = place / "model.safetensors.index.json"
    shard = next(iter(json.loads(index.read_text())["weight_map"].values()))
    (place / shard).unlink()
    with pytest.raises(FileNotFoundError, match=f"names the shard '{shard}'"):
        build_glus(config)


@pytest.mark.parametrize("published", [("internvl", False)], indirect=True)
def test_a_lisa_head_is_not_looked_for_in_it(published: tuple[Path, ModelConfig, Any]) -> None:
    _, config, _ = published
    config.seg_head_init = SegHeadInit.lisa
    with pytest.raises(ValueError, match=r"model\.seg_head_init=lisa: set model\.llm\.weights to the folder of LISA"):
        build_glus(config)


def old_spelling(parameters: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 writes it."""
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "rope_type")}
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": {"type": "mrope", **scaling} if scaling else None}


def test_positions_are_compared_in_any_spelling(published: tuple[Path, ModelConfig, Any]) -> None:
    """No tensor shows them."""
    place, config, net = published
    file, written = place / "config.json", json.loads((place / "config.json").read_text())
    plain = net.config.text_config.rope_parameters
    dynamic = {"type": "dynamic", "factor": 2.0}
    settings = [
        ({"rope_parameters": plain}, True),
        (old_spelling(plain), True),
        ({"rope_scaling": dynamic | {"rope_type": "dynamic"}}, True),
        ({}, True),
        ({"rope_theta": 5e5}, False),
        ({"rope_parameters": plain | {"rope_theta": 5e5}}, False),
        ({"rope_parameters": {"full_attention": plain}}, False),
        ({"rope_parameters": plain | {"partial_rotary_factor": 0.5}}, False),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, False),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, False),
        ({"rope_scaling": {"mrope_section": [1, 2, 3], "type": "mrope"}}, False),
        ({"rope_scaling": 2.0}, False),
    ]
    for fields, is_same in settings:
        text = {key: value for key, value in written["text_config"].items() if not key.startswith("rope_")} | fields
        for content in (written | {"text_config": text}, {"vision_config": written["vision_config"]} | text):
            file.write_text(json.dumps(content))
            if is_same:
                build_glus(config)
                continue
            with pytest.raises(ValueError, match=r"model\.llm\.architecture\.rope_parameters\.\w+=.*config\.json says"):
                build_glus(config)


def test_what_is_written_back_is_what_transformers_reads(
    published: tuple[Path, ModelConfig, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, config, net = published
    model = LoadedModel(build_glus(config).eval(), open_vocabulary(config.llm.tokenizer), ModelFolderConfig(config))
    with torch.no_grad():
        for name, parameter in model.glus.named_parameters():
            if name.endswith("new_rows"):
                parameter.add_(1.0)
    vocabulary = model.vocabulary
    save_trained(tmp_path / "trained", model, model.glus)
    arguments = ["--to-release", "--weights", str(tmp_path / "trained"), "--output", str(tmp_path / "back")]
    with pytest.raises(SystemExit, match=r"--format bin: a folder of the family \w+ holds safetensors"):
        convert_weights.main([*arguments, "--format", "bin"])
    convert_weights.main([*arguments, "--shard-gb", "0.0001"])
    assert re.search(r"^left out: tensors of the \[SEG\] head and SAM2  [1-9]", capsys.readouterr().out, re.MULTILINE)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    other, report = type(net).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    seg = vocabulary.seg_id
    ids = torch.tensor([[1, 2, seg, 5]])
    table, head = other.get_input_embeddings().weight, other.lm_head.weight
    assert not torch.equal(table[seg], net.get_input_embeddings().weight[-1])
    states = other.model(input_ids=ids).last_hidden_state
    ours: Any = model.glus.mllm
    torch.testing.assert_close(states @ head.T, ours.net(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert open_vocabulary(tmp_path / "back").seg_id == seg


def test_model_folders_hold_the_same_model(model: LoadedModel, tmp_path: Path) -> None:
    """What was trained, and a merged export, whose tied head is a table of its own since its new row was trained."""
    weights = replace(model, config=copy.deepcopy(model.config))
    batch = batch_of(model)
    expected = model.glus(batch)
    whole = model.glus.state_dict()
    save_merged(tmp_path / "merged", weights, None, "test")
    merged = load_model(tmp_path / "merged")
    assert not merged.config.model.llm.tied
    torch.testing.assert_close(merged.glus(batch).seg_logits_NQV, expected.seg_logits_NQV, rtol=0, atol=2e-5)
    torch.testing.assert_close(merged.glus(batch).mask_logits_NQmm, expected.mask_logits_NQmm, rtol=0, atol=2e-4)
    fresh = build_glus(model.config.model)
    save_trained(tmp_path / "trained", weights, model.glus)
    torch.manual_seed(0)
    loaded = load_model(tmp_path / "trained")
    trained = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert all(torch.equal(loaded.glus.state_dict()[name], whole[name]) for name in trained)
    assert load_to_merge(tmp_path / "merged").config.model.family == model.config.model.family


class Video:
    """Eight frames of one size; counts how often each is read."""

    reads_in_parallel = True

    def __init__(self, size: tuple[int, int] = SIZE, num_frames: int = 8):
        rng = np.random.default_rng(3)
        self.frames = rng.integers(0, 256, (num_frames, *size, 3), dtype=np.uint8)
        self.names = [str(number) for number in range(num_frames)]
        self.counts: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.frames)

    def read(self, index: int) -> np.ndarray:
        self.counts[index] += 1
        return self.frames[index]


def predict(
    model: LoadedModel, texts: tuple[str, ...], key_frames: list[int] | None = None, **settings: Any
) -> dict[tuple[int, int], np.ndarray]:
    inference = replace(model.config.inference, force_seg=True, **settings)
    predictor = VideoPredictor(model.glus, chat_of(model.glus, model.vocabulary), FRAMES, inference)
    results = predictor.segment(Video(), list(texts), key_frames)
    return {(row, r.frame): mask for r in results for row, mask in zip(r.rows, r.masks_RHW, strict=True)}


@pytest.mark.parametrize("window", Window)
def test_sentences_alone_give_the_masks_of_all_together_in_any_chunk(model: LoadedModel, window: Window) -> None:
    together = predict(model, TEXTS, window=window)
    assert len(together) == 3 * 8
    assert any(mask.any() for mask in together.values())
    others = predict(model, TEXTS, window=window, chunk_frames=3, token_budget=150)
    assert all(np.array_equal(mask, others[place]) for place, mask in together.items())
    alone = predict(model, TEXTS[1:2], window=window)
    assert all(np.array_equal(mask, alone[0, frame]) for (row, frame), mask in together.items() if row == 1)


def test_key_frames_start_each_sentence_where_it_says(model: LoadedModel) -> None:
    masks = predict(model, TEXTS[:2], key_frames=[5, 0])
    alone = predict(model, TEXTS[:1], key_frames=[5])
    assert all(np.array_equal(mask, alone[0, frame]) for (row, frame), mask in masks.items() if row == 0)


def test_each_frame_is_seen_once_and_the_opening_read_once(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in each of the two sizes, those of context and query frames."""
    mllm: Any = model.glus.mllm
    seen, kept = [], []
    see, states = type(mllm).see, type(mllm).states

    def counted_see(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        seen.append((tuple(pixels.shape[2:]), len(pixels)))
        return see(self, pixels)

    def counted_states(self: Any, rows: Any, visual: Any, past: Any = (), keep: bool = False) -> Any:
        kept.append((keep, len(past)))
        return states(self, rows, visual, past, keep)

    monkeypatch.setattr(type(mllm), "see", counted_see)
    monkeypatch.setattr(type(mllm), "states", counted_states)
    predict(model, TEXTS)
    count: Counter[tuple[int, int]] = Counter()
    for size, number in seen:
        count[size] += number
    assert sorted(count.values()) == [FRAMES.num_context, 8]
    assert kept.count((True, 0)) == 1


@pytest.mark.parametrize(("state", "prompts"), [(SegState.at, 1), (SegState.predicting, 2), (SegState.at, 2)])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_seg_states_and_prompts(family: str, state: SegState, prompts: int, folder: Path) -> None:
    """The state at [SEG] is read in the same pass, in training and at inference alike."""
    model = random_model(backbone_config(family, folder, seg_state=state, seg_prompts=prompts))
    batch, glus = batch_of(model), model.glus
    output = glus(batch)
    assert output.seg_embeds_NQC.shape == (4, 3, prompts * glus.segmenter.width)
    conversations = unpack_conversations(batch.rows)
    states = states_of(glus, batch).unflatten(0, (4, 3, -1))
    assert states.shape[2] == glus.reads
    ids = batch.rows.input_ids_BL.flatten()[batch.rows.reads_R].unflatten(0, (4, 3, -1))
    assert bool((ids[..., -1] == model.vocabulary.seg_id).all()) == (state is SegState.at)
    with torch.no_grad():
        torch.testing.assert_close(output.seg_embeds_NQC, glus.seg_head(states[:, :, -1]), rtol=0, atol=1e-6)
        logits = glus.mllm.decoder.logits(states[:, :, 0])
        torch.testing.assert_close(output.seg_logits_NQV, logits, rtol=0, atol=1e-5)
    assert len(conversations) == 4
    together = predict(model, TEXTS)
    alone = predict(model, TEXTS[:1], chunk_frames=2)
    assert all(np.array_equal(mask, alone[0, frame]) for (row, frame), mask in together.items() if row == 0)


def test_a_training_step_reaches_what_is_trained(model: LoadedModel) -> None:
    """With SAM2's own losses its heads learn too; recomputed layers give the same gradients."""
    glus, batch = copy.deepcopy(model.glus).train(), batch_of(model)
    weights = {"seg": 1.0, "bce": 2.0, "dice": 0.5, "mask_iou": 1.0, "object_score": 1.0}
    objective = GlusObjective(weights, model.vocabulary.seg_id)

    def gradients() -> dict[str, torch.Tensor]:
        glus.zero_grad(set_to_none=True)
        losses = objective(glus(batch), batch, objective.counts([batch]), np.random.default_rng(0))
        losses["total"].backward()
        assert all(torch.isfinite(value) for value in losses.values())
        return {name: p.grad.clone() for name, p in glus.named_parameters() if p.grad is not None}

    plain = gradients()
    frozen = [name for name, parameter in glus.named_parameters() if not parameter.requires_grad]
    assert not set(frozen) & plain.keys()
    for key in ("lora_B", "projector" if "internvl" in model.config.model.family else "merger", "new_rows",
                "iou_prediction_head", "pred_obj_score_head", "seg_head"):  # fmt: skip
        assert any(key in name and grad.abs().sum() > 0 for name, grad in plain.items()), key
    glus.mllm.decoder.checkpoint_gradients()
    again = gradients()
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=0, atol=1e-6)


def test_packed_rows_are_those_of_separate_conversations(model: LoadedModel) -> None:
    batch, glus = batch_of(model), model.glus
    conversations = unpack_conversations(batch.rows)
    tokens = glus.see(batch)
    each = [tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]]
    separate = separate_rows(conversations, model.vocabulary.pad_id)
    with torch.inference_mode():
        visual = torch.cat([each[video] for video in batch.video_index.tolist()])
        expected = glus.mllm.states(separate, visual)[0]
    torch.testing.assert_close(states_of(glus, batch), expected, rtol=0, atol=2e-5)
