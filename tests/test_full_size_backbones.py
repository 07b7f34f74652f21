"""The other families at full size, without memory for their values: sizes, tokens, what a batch costs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from glus.config import InferenceConfig, Precision, TrainConfig, load_config
from glus.data.chat.chatml import ChatmlChat
from glus.data.chat.llava import LlavaChat
from glus.data.chat.tree import pack_conversations
from glus.data.sampling import draw_turns
from glus.inference.asking import Pass, Prompter, merge_prefixes
from glus.models.glus import Glus
from glus.models.pretrained import build_glus
from glus.train.plan import count_parameters, example_batch, measure_sizes, trace_micro_batch
from glus.types import Role
from tools.benchmarks.plain import StandInVocabulary

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = {
    "glus_internvl3_2b": ("internvl", "InternVLForConditionalGeneration"),
    "glus_internvl3_8b": ("internvl", "InternVLForConditionalGeneration"),
    "glus_qwen2_5_vl_3b": ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "glus_qwen3_vl_2b": ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "glus_qwen3_vl_4b": ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "glus_qwen3_vl_8b": ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
}


def _compose(*overrides: str) -> TrainConfig:
    ConfigStore.instance().store("schema", TrainConfig)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return load_config(TrainConfig, compose("train", list(overrides)))


def _build(config: TrainConfig) -> Glus:
    with torch.device("meta"):
        return build_glus(config.model, load_weights=False)


@pytest.mark.parametrize("name", MODELS)
def test_it_has_the_parameters_of_transformers_own_class(name: str) -> None:
    """Of that class, built from its own config classes."""
    import transformers

    family, class_name = MODELS[name]
    config = _compose(f"model={name}")
    model = config.model
    assert (model.family, model.precision) == (family, Precision.bf16)
    config.model.llm.lora_rank = 0
    config.model.trainable = ["seg_head", "projector", "mask_decoder"]
    glus = _build(config)
    tables = {"vocab_size": model.llm.vocab_size, "tie_word_embeddings": model.llm.tied}
    kind = {"model_type": "qwen2"} if family == "internvl" else {}
    class_config = getattr(transformers, class_name.replace("ForConditionalGeneration", "Config"))(
        vision_config=model.vision.architecture,
        text_config={**kind, **model.llm.architecture, **tables},
        tie_word_embeddings=model.llm.tied,
    )
    with torch.device("meta"):
        theirs = getattr(transformers, class_name)(class_config)
    mllm: Any = glus.mllm
    assert mllm.net.num_parameters() == theirs.num_parameters()
    assert {name: p.shape for name, p in mllm.net.named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()
    }
    counts = count_parameters(glus)
    assert sum(total for total, _ in counts.values()) == sum(p.numel() for p in glus.parameters())


@pytest.mark.parametrize(
    ("name", "size", "context", "query"),
    [
        ("glus_internvl3_8b", (720, 1280), (8, 8), (8, 8)),
        ("glus_qwen3_vl_4b", (448, 448), (7, 7), (14, 14)),
        ("glus_qwen3_vl_4b", (256, 448), (5, 9), (8, 14)),
        ("glus_qwen3_vl_4b", (720, 1280), (5, 9), (10, 18)),
    ],
)
def test_a_frame_is_seen_in_so_many_tokens(
    name: str, size: tuple[int, int], context: tuple[int, int], query: tuple[int, int]
) -> None:
    mllm = _build(_compose(f"model={name}")).mllm
    assert (mllm.grid(size, Role.context), mllm.grid(size, Role.query)) == (context, query)
    prepared = mllm.prepare(np.zeros((*size, 3), np.uint8), Role.query)
    if mllm.chat.has_axes:
        assert prepared.shape == (32 * query[0], 32 * query[1], 3)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["glus_a_internvl3_8b", "glus_a_qwen3_vl_4b"])
def test_a_recipe_can_be_planned(experiment: str) -> None:
    """Its micro-batch runs, forwards and backwards, on the meta device."""
    config = _compose(f"experiment={experiment}")
    assert config.recipe is None  # ours, with no result to compare with
    sizes = measure_sizes(_build(config))
    assert 0 < sizes.trained < sizes.total
    assert sizes.projections > sizes.total // 2
    trace = trace_micro_batch(config, num_videos=1, checkpointing=True)
    assert trace.flops["LLM"] > trace.flops["vision tower"] > 0
    batch = example_batch(config, _build(config).mllm, 1)
    assert trace.tokens == batch.rows.input_ids_BL.numel()


SIZE = (720, 1280)
SENTENCES = [f"the {word} animal that is walking to the left" for word in "abcdefghijklmnop"]


class FourLetters(StandInVocabulary):
    """A token for four letters and one for each special token; the families' own files are not at hand."""

    strips_before_seg = False

    def id_of(self, token: str) -> int:
        return 31900 + sum(token.encode()) % 100


def chat_and_frames(experiment: str) -> tuple[Any, Any, Any]:
    config = _compose(f"experiment={experiment}")
    mllm, vocabulary = _build(config).mllm, FourLetters()
    if config.model.family == "llava":
        return LlavaChat(vocabulary, mllm.tokens_per_frame), config.frames, mllm  # type: ignore[arg-type, attr-defined]
    return ChatmlChat(vocabulary, mllm.chat, mllm.grid).sized(SIZE), config.frames, mllm  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "packed", "separate"),
    [("glus_a", 1383, 2159), ("glus_a_internvl3_8b", 1389, 2109), ("glus_a_qwen3_vl_4b", 2658, 3832)],
)
def test_tokens_of_a_sample_of_three_sentences(experiment: str, packed: int, separate: int) -> None:
    chat, frames, _ = chat_and_frames(experiment)
    rng = np.random.default_rng(0)
    turns = [draw_turns(text, frames.num_query, rng) for text in SENTENCES[:3]]
    conversations = [chat.train(own, frames.num_context, "sentence") for own in turns]
    rows = pack_conversations([conversations], pad_id=0)
    assert rows.paths_NC is not None
    counts = len(rows.paths_NC.unique()), sum(len(one.input_ids) for one in conversations)
    assert counts == (packed, separate)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "read", "plain"),
    [("glus_a", 383410, 856704), ("glus_a_internvl3_8b", 396006, 836016), ("glus_a_qwen3_vl_4b", 805365, 1514880)],
)
def test_tokens_of_a_video_of_75_frames_and_16_sentences(experiment: str, read: int, plain: int) -> None:
    """What the LLM reads, padding not counted, against a prompt for each frame of each sentence."""
    chat, frames, mllm = chat_and_frames(experiment)
    inference, counts = InferenceConfig(), [0, 0]
    one = Pass(dict.fromkeys(range(len(SENTENCES)), 0), 75, 1)

    def states(rows: Any, visual: torch.Tensor, past: Any = (), keep: bool = False) -> tuple[torch.Tensor, Any]:
        counts[0] += int((rows.input_ids_BL != 0).sum())
        return torch.zeros(len(rows.reads_R), 1), SimpleNamespace(of_rows=lambda rows: None)

    glus: Any = SimpleNamespace(
        mllm=SimpleNamespace(states=states, visual_shape=(1,), dtype=torch.float32),
        answer=lambda states: (states, torch.zeros(len(states), FourLetters.size)),
        expect_iou=lambda states: None,
    )
    visual = {role: torch.zeros(int(np.prod(mllm.grid(SIZE, role))), 1) for role in Role}
    context = [visual[Role.context]] * frames.num_context
    prompter = Prompter(glus, chat, SENTENCES, context, inference, torch.device("cpu"))
    for begin in range(0, 75, inference.chunk_frames):
        windows = [
            (row, one.window(row, frame, frames, inference.window))
            for frame in one.order[begin : begin + inference.chunk_frames]
            for row in range(len(SENTENCES))
        ]
        counts[1] += sum(
            len(chat.window(SENTENCES[row], frames.num_context, len(shown)).input_ids) for row, shown in windows
        )
        prompter.ask(merge_prefixes(windows), dict.fromkeys(range(75), visual[Role.query]))
    assert counts == [read, plain]
