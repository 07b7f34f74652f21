"""The recorded model and what goes on inside it: the only file of the replay that knows the network's parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from glus.batch import Batch, GlusOutput
from glus.config import FramesConfig, FuserGamma, InferenceConfig, ModelConfig, SegmenterConfig
from glus.data.chat.llava import LlavaChat
from glus.data.frames import VideoSource
from glus.inference.predictor import VideoPredictor, chat_of
from glus.models.glus import Glus
from glus.models.mllm.llava import llava_of
from glus.models.pretrained import LoadedModel
from glus.models.release import ReleaseCheckpoint, build_release, read_release
from glus.models.release_layout import GLUS_KEYS
from glus.models.segmenter.sam2 import Sam2Segmenter
from glus.models.weight_files import Tensors
from glus.models.weights import IN_MEMORY, LoadReport, load_into, read_tensors
from glus.types import FrameResult
from tools.benchmarks.plain import silence_dropout
from tools.parity.comparison import Record, read_record

DTYPE = "float32"
"""The gates hold for it alone."""
SIZES = ("num_context", "num_query", "height", "width", "num_frames")
HEAD, SAM2 = "mllm.llama.lm_head.weight", "segmenter.sam."


@dataclass(frozen=True)
class Fixture:
    """A folder of recorded numbers and the settings under which they were recorded."""

    folder: Path
    settings: Record
    """``fixture.json``."""
    segmenter: SegmenterConfig
    """SAM2's architecture."""

    def path(self, name: str) -> Path:
        """Where one of the parts lies that ``fixture.json`` names."""
        return self.folder / self.settings[name]


def read_fixture(folder: Path) -> Fixture:
    """Read ``fixture.json`` and the SAM2 architecture it names.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a setting is missing or of another type, or the numbers are not float32.
    """
    settings = read_record(folder / "fixture.json")
    if settings["dtype"] != DTYPE:
        raise ValueError(f"{settings.where}: dtype is {settings['dtype']}; the gates hold for {DTYPE} alone")
    for name in SIZES:
        if type(settings[name]) is not int:
            raise ValueError(f"{settings.where}: {name!r} is {settings[name]!r}; expected int")
    sam2 = read_record(folder / settings.part("sam2")["config"])
    return Fixture(folder, settings, SegmenterConfig(sam2["variant"], sam2["overrides"]))


def load_network(
    fixture: Fixture,
    gamma: FuserGamma = FuserGamma.checkpoint,
    has_memory: bool = True,
    seg_row_D: np.ndarray | None = None,
) -> tuple[LoadedModel, dict[str, LoadReport]]:
    """The recorded model for inference, loaded as any published checkpoint is.

    Args:
        fixture: names the checkpoint, CLIP and SAM2's architecture.
        gamma: layer scale of the memory encoder's fuser.
        has_memory: off, every frame is segmented by itself.
        seg_row_D: what the row of [SEG] in the LLM's head is replaced by.

    Returns:
        The model, and for each of its files what was loaded.

    Raises:
        FileNotFoundError, ValueError: a file is missing or does not fit.
        RuntimeError: the row is of another length.
    """
    checkpoint = _read_checkpoint(fixture)
    checkpoint.config.segmenter = replace(fixture.segmenter, fuser_gamma=gamma)
    checkpoint.config.memory.enabled = has_memory
    model, reports = build_release(checkpoint)
    if seg_row_D is not None:
        model.glus.get_parameter(HEAD).data[model.vocabulary.seg_id] = torch.from_numpy(seg_row_D)
    return model, reports


def load_trainable(fixture: Fixture, lora: Path, detach: bool) -> LoadedModel:
    """The recorded model in training mode, as released: true gamma, LoRA with the recorded matrices; but no dropout.

    Args:
        fixture: see ``load_network``.
        lora: LoRA matrices under PEFT's names; rank and adapted projections are those of this file.
        detach: memories carry no gradient.

    Raises:
        FileNotFoundError, ValueError: a file is missing or does not fit.
    """
    adapters = GLUS_KEYS.source(lora, read_tensors(lora))
    checkpoint = _read_checkpoint(fixture)
    config = checkpoint.config
    config.llm.lora_rank, config.llm.lora_targets = _lora_shape(adapters.tensors, lora)
    config.trainable = ModelConfig().trainable
    config.memory.detach = detach
    model, _ = build_release(checkpoint)
    names = [name for name in model.glus.state_dict() if ".lora_" in name]
    load_into(model.glus, lambda: replace(adapters, only=names), IN_MEMORY)
    silence_dropout(model.glus.train())
    return model


def _read_checkpoint(fixture: Fixture) -> ReleaseCheckpoint:
    return read_release(fixture.path("checkpoint"), fixture.segmenter, str(fixture.path("clip")))


def _lora_shape(adapters: Tensors, path: Path) -> tuple[int, list[str]]:
    """Rank of adapters, and the projections they adapt."""
    matches = {name: re.search(r"\.(\w+)\.lora_A\.", name) for name in adapters}
    ranks = {adapters[name].shape[0] for name, match in matches.items() if match}
    if len(ranks) != 1:
        raise ValueError(f"{path}: expected LoRA matrices of one rank, found ranks {sorted(ranks)}")
    return ranks.pop(), sorted({match[1] for match in matches.values() if match})


def sam2_tensors(glus: Glus) -> dict[str, torch.Tensor]:
    """State dict of SAM2 under sam2's own names."""
    return {name[len(SAM2) :]: tensor for name, tensor in glus.state_dict().items() if name.startswith(SAM2)}


def make_chat(model: LoadedModel) -> LlavaChat:
    """The tokenizer that expands images as the model does."""
    chat = chat_of(model.glus, model.vocabulary)
    assert isinstance(chat, LlavaChat)
    return chat


def make_predictor(model: LoadedModel, fixture: Fixture, inference: InferenceConfig) -> VideoPredictor:
    """The predictor with the recorded numbers of context and query frames."""
    frames = FramesConfig(fixture.settings["num_context"], fixture.settings["num_query"])
    return VideoPredictor(model.glus, make_chat(model), frames, inference)


class Call(NamedTuple):
    """One call of an observed method."""

    arguments: tuple[Any, ...]
    result: Any


@contextmanager
def observed(**methods: tuple[object, str]) -> Iterator[dict[str, list[Call]]]:
    """Record every call of some methods, in order, while the context lasts; what they do is not changed.

    Args:
        methods: label -> (object, name of its method); ``forward`` of a module stands for calling it. Only positional
            arguments are kept.

    Yields:
        Label -> the calls so far; clear a list to let go of its tensors.
    """
    calls: dict[str, list[Call]] = {label: [] for label in methods}
    with ExitStack() as stack:
        for label, (owner, name) in methods.items():
            stack.enter_context(mock.patch.object(owner, name, _noting(getattr(owner, name), calls[label])))
        yield calls


def _noting(method: Callable[..., Any], calls: list[Call]) -> Callable[..., Any]:
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        calls.append(Call(arguments, method(*arguments, **keywords)))
        return calls[-1].result

    return wrapper


def clip_crops(glus: Glus, frames_FHW3: np.ndarray) -> np.ndarray:
    """(F, s, s, 3) uint8: what of frames is given to the model for CLIP to see."""
    return np.stack([glus.mllm.prepare(frame) for frame in frames_FHW3])


def clip_input(glus: Glus, picture_HW3: np.ndarray) -> np.ndarray:
    """What reaches the vision tower when the model sees a picture: (3, s, s) float32."""
    crops_1Css = torch.from_numpy(clip_crops(glus, picture_HW3[None])).permute(0, 3, 1, 2)
    with observed(tower=(llava_of(glus).clip.vision_model.embeddings, "forward")) as calls, torch.inference_mode():
        glus.mllm.see(crops_1Css)
    return calls["tower"][0].arguments[0][0].numpy()


def sam2_input(glus: Glus, picture_HW3: np.ndarray) -> np.ndarray:
    """SAM2's input of a picture: (3, S, S) float32."""
    return glus.segmenter.prepare_frames(torch.from_numpy(picture_HW3)[None])[0].numpy()


def run_pass(predictor: VideoPredictor, video: VideoSource, text: str, order: Sequence[int]) -> Iterator[FrameResult]:
    """Segment one sentence from the first frame of ``order`` up to the last one of the video or down to the first."""
    return predictor.segment_pass(video, [text], [order[0]], -1 if order[-1] < order[0] else 1)


def watch(
    predictor: VideoPredictor, video: VideoSource, text: str, order: Sequence[int], is_probed: bool = False
) -> Iterator[Record]:
    """Run the predictor for one sentence over ``order``, frame by frame, and tell what its model did in each step.

    Args:
        predictor: with the recorded model and settings.
        video: all frames.
        text: the sentence.
        order: frames, see ``run_pass``.
        is_probed: tell the intermediate values too.

    Yields:
        Values of a step under their recorded names, those within the model below "probes"; without [SEG] those that
        follow from it are missing.
    """
    glus, segmenter = predictor.glus, predictor.glus.segmenter
    inference = replace(predictor.inference, chunk_frames=1)
    stepwise = VideoPredictor(glus, predictor.chat, predictor.frames, inference)
    verbs = ("prepare_frames", "encode_frames", "condition", "decode", "memorize")
    with observed(
        states=(glus.mllm, "states"), answer=(glus, "answer"), **{verb: (segmenter, verb) for verb in verbs}
    ) as calls:
        opening: Call | None = None  # what the prompts of all steps begin with; each step reads on from there
        for number, result in enumerate(run_pass(stepwise, video, text, order)):
            opening = opening or calls["states"].pop(0)
            values = _step_values(opening, calls) | {"mask": result.masks_RHW[0]}
            if is_probed and calls["decode"]:
                crop = clip_input(glus, video.read(result.frame))
                values["probes"] = _probed_values(opening, calls, glus) | {"clip_pixel_values": crop}
            yield Record(values, f"step {number} of the replay")
            for made in calls.values():
                made.clear()


def _step_values(opening: Call, calls: dict[str, list[Call]]) -> dict[str, Any]:
    embeds_1C, logits_1V = _only(calls, "answer").result
    prompt = [part.arguments[0].input_ids_BL[0] for part in (opening, _only(calls, "states"))]
    values = {"input_ids": torch.cat(prompt).numpy(), "next_token": int(logits_1V[0].argmax())}
    if not calls["decode"]:
        return values | {"num_memories": 0, "used_multimask": False}
    memories_1TChw, decoded = _only(calls, "condition").arguments[1], _only(calls, "decode").result
    logits_mm = decoded.logits_Nmm[0].numpy()
    return values | {
        "num_memories": 0 if memories_1TChw is None else memories_1TChw.shape[1],
        "used_multimask": bool(decoded.used_multimask_N[0]),
        "seg_embedding": embeds_1C[0].numpy(),
        "low_res_logits": logits_mm,
        "low_res_range": np.array([logits_mm.min(), logits_mm.max()]),
        "stability": decoded.stability_N[0].numpy(),
        "predicted_iou": decoded.predicted_iou_N4[0].numpy(),
    }


def _probed_values(opening: Call, calls: dict[str, list[Call]], glus: Glus) -> dict[str, np.ndarray]:
    shown = [part.arguments[:2] for part in (opening, _only(calls, "states"))]
    visual_MD = torch.cat([visual_TD[rows.visual_index_M] for rows, visual_TD in shown])
    segmenter = glus.segmenter
    assert isinstance(segmenter, Sam2Segmenter)
    features, decoded = _only(calls, "encode_frames").result, _only(calls, "decode").result
    values = {
        "visual_tokens": visual_MD.unflatten(0, (-1, llava_of(glus).tokens_per_frame)),
        "llm_state": _only(calls, "answer").arguments[0][0],
        "sam2_input": _only(calls, "prepare_frames").result[0],
        "high_res_256": features.high_NChw[0][0],
        "high_res_128": features.high_NChw[1][0],
        "image_feature_64": features.image_NChw[0],
        "position_64": features.position_1Chw[0],
        "dense_position_64": features.dense_position_1Chw[0],
        "conditioned_64": _only(calls, "condition").result.image_NChw[0],
        "all_mask_logits": decoded.all_logits_N4mm[0],
        "all_predicted_iou": decoded.predicted_iou_N4[0],
    }
    for _, memory in calls["memorize"]:
        values |= {"memory_features": memory[0], "memory_position": segmenter.memory_position(memory)[0]}
    return {name: value.numpy() for name, value in values.items()}


def _only(calls: dict[str, list[Call]], label: str) -> Call:
    if len(calls[label]) != 1:
        raise ValueError(f"expected one call of {label!r} per frame and sentence, observed {len(calls[label])}")
    return calls[label][0]


def forward_with_memories(glus: Glus, batch: Batch) -> tuple[GlusOutput, dict[str, list[torch.Tensor]]]:
    """A forward pass, and its tensors through which gradients may flow from frame to frame and will be kept.

    Returns:
        The output; "memory": each memory as the memory encoder made it, "memory attention": each output of that.
    """
    with observed(memorize=(glus.segmenter, "memorize"), condition=(glus.segmenter, "condition")) as calls:
        output: GlusOutput = glus(batch)
    memories = [call.result for call in calls["memorize"]]
    read = [call.result.image_NChw for call in calls["condition"] if call.arguments[1] is not None]
    for tensor in (*memories, *read):
        if tensor.requires_grad:
            tensor.retain_grad()
    return output, {"memory": memories, "memory attention": read}


def collect_gradients(glus: Glus) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Gradients of the trained tensors, under their names in the release, and the names of those that have none.

    They are the model's own: a next backward pass would add to them.
    """
    trained = {GLUS_KEYS.label(name): p for name, p in glus.named_parameters() if p.requires_grad}
    found = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    return found, trained.keys() - found.keys()
