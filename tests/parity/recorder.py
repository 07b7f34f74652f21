"""Write a folder in the format of the recorded numbers, from a model of ours.

It says nothing about the authors' implementation: with it, tests replay folders of any sizes in a second, and break
them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from glus.config import FramesConfig, FuserGamma, InferenceConfig, LossConfig
from glus.data.chat.llava import LlavaChat
from glus.data.chat.tree import separate_rows, unpack_conversations
from glus.data.frames import VideoSource, open_video
from glus.data.sampling import context_indices_eval, draw_turns
from glus.evaluation.packed import boundary_accuracy, region_similarity
from glus.inference.predictor import VideoPredictor
from glus.losses.contrastive import object_contrastive_loss
from glus.models.glus import Glus, upsample_masks
from glus.models.pretrained import LoadedModel
from glus.models.release import save_release
from glus.tokens import IMAGE_ID
from tools.parity.comparison import Record
from tools.parity.network import (
    Fixture,
    clip_input,
    collect_gradients,
    load_network,
    load_trainable,
    read_fixture,
    sam2_input,
    watch,
)
from tools.parity.recorded_batch import Setup, fill_queue, key_name, read_setup
from tools.parity.replay_training import make_objective

CONTEXT, QUERY = 2, 3
HEIGHT, WIDTH, FRAMES = 37, 50, 6
"""Neither is a multiple of 8."""
TEXTS = ["the red circle", "All shapes."]
KEY_FRAME = 4
MARGIN = 1e-3
"""Share of a frame's logit range within which a pixel is near the threshold."""
SHARD_BYTES = 400_000
FAIL_ROW = "fail_row.npy"
NUM_NEGATIVES = 3
LORA_RANK = 2
VIDEO_SIZES = {"a_1": (30, 44), "b": (41, 33)}
SENTENCES = {"a_1": ["0", "2"], "b": ["1"]}
"""Drawn ones of each training video; the first two name the same object."""
QUEUE = ["mevis_other_3_00010", "mevis_a_1_7_00005", "mevis_x_y_4_00015"]
"""What the contrastive queue holds before the step; the second names that object too."""


@dataclass(frozen=True)
class CaseSettings:
    """One pass to record."""

    name: str
    text: str
    order: Sequence[int]
    stride: int | None = 3
    gamma: str = "identity"
    fails: bool = False


def cases() -> list[CaseSettings]:
    """Of every kind."""
    forward = range(FRAMES)
    return [
        CaseSettings("bank_stride2_exp0", TEXTS[0], forward, 2),
        CaseSettings("no_memory_exp1", TEXTS[1], forward, None),
        CaseSettings("true_gamma_stride1_exp1", TEXTS[1], forward, 1, "checkpoint"),
        CaseSettings("some_fail_exp0", TEXTS[0], forward, 1, fails=True),
        CaseSettings("keyframe_exp0_part0", TEXTS[0], range(KEY_FRAME, FRAMES)),
        CaseSettings("keyframe_exp0_part1", TEXTS[0], range(KEY_FRAME, -1, -1)),
    ]


def write_json(path: Path, content: Any) -> None:
    """Readable."""
    path.write_text(json.dumps(content, indent=1))


def record(folder: Path, model: LoadedModel, overrides: dict[str, Any]) -> None:
    """Write all parts.

    Args:
        folder: to be made.
        model: tiny, without LoRA; its head is changed so that [SEG] is the most likely token.
        overrides: of its SAM2.
    """
    rng = np.random.default_rng(0)
    for part in ("frames", "inference", "training", "preprocess", "metrics"):
        (folder / part).mkdir(parents=True)
    for index in range(FRAMES):
        Image.fromarray(picture(rng, HEIGHT, WIDTH)).save(folder / "frames" / f"{index:05d}.png")
    settings = {"num_context": CONTEXT, "num_query": QUERY, "height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    places = {"checkpoint": "checkpoint", "clip": "checkpoint/clip", "frames": "frames"}
    sam2 = {"config": "sam2.json", "weights": "sam2.pt"}
    write_json(folder / "fixture.json", {**settings, **places, "sam2": sam2, "dtype": "float32"})
    write_json(folder / "sam2.json", {"variant": "sam2_hiera_t", "overrides": overrides})
    torch.save({"model": model.glus.segmenter.sam.state_dict()}, folder / "sam2.pt")
    fail_row = set_heads(model, open_video(folder / "frames"))
    np.save(folder / "inference" / FAIL_ROW, fail_row)
    save_release(folder / "checkpoint", model, None, safetensors=False, shard_bytes=SHARD_BYTES)
    fixture = read_fixture(folder)
    record_inference(folder / "inference", fixture, open_video(folder / "frames"))
    record_preprocess(folder / "preprocess", fixture, rng)
    record_metrics(folder / "metrics", rng)
    record_training(folder / "training", fixture, rng)


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: blocks of random colours."""
    blocks = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]


def predictor(model: LoadedModel, case: CaseSettings, force_seg: bool = False) -> VideoPredictor:
    """For a case."""
    tokenizer = LlavaChat(model.vocabulary, model.glus.mllm.tokens_per_frame)
    inference = InferenceConfig(memory_stride=case.stride or 1, force_seg=force_seg)
    return VideoPredictor(model.glus, tokenizer, FramesConfig(CONTEXT, QUERY), inference)


def set_heads(model: LoadedModel, video: VideoSource) -> np.ndarray:
    """Let [SEG] win in every window, and return a row of the head with which it does in some windows alone."""
    states = {}
    for case in cases():
        steps = watch(predictor(model, case, True), video, case.text, case.order, is_probed=True)
        states[case.name] = torch.stack([torch.from_numpy(step["probes"]["llm_state"]) for step in steps])
    weight, seg = model.glus.mllm.llama.lm_head.weight.detach(), model.vocabulary.seg_id
    direction = torch.cat(list(states.values())).mean(0)

    def needed(states_ND: torch.Tensor) -> torch.Tensor:
        """The lengths of ``direction`` at which [SEG] draws level with the best other token."""
        others = (states_ND @ weight.T).index_fill(1, torch.tensor([seg]), -torch.inf).amax(1)
        return others / (states_ND @ direction)

    fail_row = direction * needed(states["some_fail_exp0"]).sort().values[1:3].mean()
    weight[seg] = direction * needed(torch.cat(list(states.values()))).max() * 1.5
    return fail_row.numpy()


def record_inference(folder: Path, fixture: Fixture, video: VideoSource) -> None:
    """All cases, and the probes of the first."""
    entries = []
    for number, case in enumerate(cases()):
        row = np.load(folder / FAIL_ROW) if case.fails else None
        model, _ = load_network(fixture, FuserGamma(case.gamma), case.stride is not None, row)
        steps = list(watch(predictor(model, case), video, case.text, case.order, is_probed=number == 0))
        failed = [number for number, step in enumerate(steps) if step["next_token"] != model.vocabulary.seg_id]
        entry = {"case": case.name, "expression": case.text, "memory": case.stride is not None}
        entry |= {"memory_stride": case.stride, "fuser_gamma": case.gamma, "num_frames": len(steps)}
        entries.append(entry | {"failed_steps": failed} | ({"lm_head_seg_row": FAIL_ROW} if case.fails else {}))
        np.savez(folder / f"{case.name}.npz", **case_arrays(steps, case, model.glus.mllm.tokens_per_frame))
        if number == 0:
            np.savez(folder / "probes.npz", **probe_arrays(steps))
    write_json(folder / "cases.json", entries)


def case_arrays(steps: Sequence[Record], case: CaseSettings, tokens_per_frame: int) -> dict[str, np.ndarray]:
    """What is recorded of a pass."""
    windows = [step["input_ids"][images_once(step["input_ids"], tokens_per_frame)] for step in steps]
    values = [step_values(step) for step in steps]
    return {
        "frame_index": np.array(case.order, np.int32),
        "context_index": np.array(context_indices_eval(FRAMES, CONTEXT), np.int32),
        "input_ids": np.concatenate(windows).astype(np.int32),
        "input_offsets": np.cumsum([0, *map(len, windows)]).astype(np.int32),
        "next_token": np.array([step["next_token"] for step in steps], np.int32),
        "num_memories": np.array([step["num_memories"] for step in steps], np.int32),
        "masks": np.stack([np.packbits(step["mask"], axis=-1) for step in steps]),
        **{name: np.stack([value[name] for value in values]) for name in values[0]},
    }


def images_once(ids: np.ndarray, tokens_per_frame: int) -> np.ndarray:
    """Which of (L,) tokens are recorded: of each image the first."""
    nth = np.cumsum(ids == IMAGE_ID) - 1
    return (ids != IMAGE_ID) | (nth % tokens_per_frame == 0)


def step_values(step: Record) -> dict[str, np.ndarray]:
    """Not a number, False and empty masks where there was no [SEG]."""
    used = np.array(step["used_multimask"])
    if "seg_embedding" not in step:
        sizes = {"seg_embedding": (32,), "low_res_logits": (4, 4), "low_res_range": (2,), "stability": ()}
        missing = {name: np.full(size, np.nan, np.float32) for name, size in (sizes | {"predicted_iou": 4}).items()}
        near = np.packbits(np.zeros(step["mask"].shape, bool), axis=-1)
        return {**missing, "used_multimask": used, "near_threshold": near}
    logits, (low, high) = step["low_res_logits"], step["low_res_range"].tolist()
    near = upsample_masks(torch.from_numpy(logits)[None], step["mask"].shape)[0].abs() < MARGIN * (high - low)
    return {
        **{name: step[name] for name in ("seg_embedding", "low_res_range", "stability", "predicted_iou")},
        "low_res_logits": logits[::4, ::4],
        "used_multimask": used,
        "near_threshold": np.packbits(near.numpy(), axis=-1),
    }


def probe_arrays(steps: Sequence[Record]) -> dict[str, np.ndarray]:
    """Intermediate values of the first two steps."""
    first, second = (step["probes"] for step in steps[:2])
    return {
        "clip_pixel_values": first["clip_pixel_values"],
        "visual_tokens": first["visual_tokens"],
        "llm_state": np.stack([first["llm_state"], second["llm_state"]]),
        "sam2_input_sub16": first["sam2_input"][:, ::16, ::16],
        "high_res_256_sub4": first["high_res_256"][:, ::4, ::4],
        **{
            f"{name}_sub2": first[name][:, ::2, ::2]
            for name in ("high_res_128", "image_feature_64", "position_64", "dense_position_64")
        },
        "conditioned_64_sub2": np.stack([step["conditioned_64"][:, ::2, ::2] for step in (first, second)]),
        "all_mask_logits_sub4": np.stack([step["all_mask_logits"][:, ::4, ::4] for step in (first, second)]),
        "all_predicted_iou": np.stack([first["all_predicted_iou"], second["all_predicted_iou"]]),
        "memory_features": np.stack([first["memory_features"], second["memory_features"]]),
        "memory_position": first["memory_position"],
    }


def record_preprocess(folder: Path, fixture: Fixture, rng: np.random.Generator) -> None:
    """A wide, a tall and a small picture."""
    glus = load_network(fixture)[0].glus
    arrays = {}
    for number, size in enumerate([(40, 90), (71, 33), (9, 11)]):
        pixels = picture(rng, *size)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        arrays[f"clip_{number}"] = clip_input(glus, pixels)
        arrays[f"sam2_sub16_{number}"] = sam2_input(glus, pixels)[:, 5::16, 3::16]
    np.savez(folder / "inputs.npz", **arrays)


def record_metrics(folder: Path, rng: np.random.Generator) -> None:
    """Random masks."""
    entries, masks = [], {}
    for index, size in enumerate([(20, 30), (1, 7)]):
        pair = rng.integers(0, 2, (2, *size), dtype=np.uint8)
        masks[f"pred_{index:02d}"], masks[f"gt_{index:02d}"] = pair
        scores = [float(measure(pair[:1], pair[1:])[0]) for measure in (region_similarity, boundary_accuracy)]
        entries.append({"index": index, "J": scores[0], "F": scores[1]})
    np.savez(folder / "masks.npz", **masks)
    write_json(folder / "metrics.json", entries)


def record_training(folder: Path, fixture: Fixture, rng: np.random.Generator) -> None:
    """Two videos of different sizes with two sentences and one; a plain step and a contrastive one."""
    torch.save(lora_tensors(load_network(fixture)[0]), folder / "lora.pt")
    model = load_trainable(fixture, folder / "lora.pt", detach=True)
    videos = {name: np.stack([picture(rng, *size) for _ in range(5)]) for name, size in VIDEO_SIZES.items()}
    np.savez(folder / "videos.npz", **videos)
    write_json(folder / "batch.json", [batch_entry(name, exp_ids, rng) for name, exp_ids in SENTENCES.items()])
    masks = [rng.integers(0, 2, (len(SENTENCES[name]), 2, *size)) > 0 for name, size in VIDEO_SIZES.items()]
    arrays = {f"target_masks_{number}": np.packbits(mask, axis=-1) for number, mask in enumerate(masks)}
    np.savez(folder / "batch.npz", **arrays)
    setup = read_setup(folder, model)
    batch = setup.batch
    ids = separate_rows(unpack_conversations(batch.rows), model.vocabulary.pad_id).input_ids_BL.numpy()
    labels = np.where(ids == model.vocabulary.seg_id, ids, -100)
    kept = [images_once(row, model.glus.mllm.tokens_per_frame) for row in ids]
    arrays["input_ids"] = np.stack([row[keep] for row, keep in zip(ids, kept, strict=True)]).astype(np.int32)
    arrays["labels"] = np.stack([row[keep] for row, keep in zip(labels, kept, strict=True)]).astype(np.int32)
    np.savez(folder / "batch.npz", **arrays)
    record_step(setup, "step", None)
    record_step(setup, "step_contrastive", rng)


def lora_tensors(model: LoadedModel) -> dict[str, torch.Tensor]:
    """Random adapters of q_proj and v_proj under PEFT's names."""
    torch.manual_seed(3)
    tensors = {}
    for layer, block in enumerate(model.glus.mllm.llama.model.layers):
        for target in ("q_proj", "v_proj"):
            out_width, in_width = getattr(block.self_attn, target).weight.shape
            name = f"model.layers.{layer}.self_attn.{target}"
            tensors[f"{name}.lora_A.default.weight"] = torch.randn(LORA_RANK, in_width) * 0.2
            tensors[f"{name}.lora_B.default.weight"] = torch.randn(out_width, LORA_RANK) * 0.2
    return tensors


def batch_entry(name: str, exp_ids: list[str], rng: np.random.Generator) -> dict[str, Any]:
    """One context frame, two query frames."""
    texts = [f"The Circle number {exp_id}." for exp_id in exp_ids]
    turns = [draw_turns(text, 2, rng) for text in texts]
    images = "<image>\n"
    return {
        "video": name,
        "context_index": [3],
        "query_index": [1, 2],
        "expressions": exp_ids,
        "str_ids": [f"mevis_{name}_{exp_id}" for exp_id in exp_ids],
        "frames": ["00005", "00010"],
        "questions": [[images + turn.question for turn in row] for row in turns],
        "texts": texts,
        "conversations": ["".join(f"{images}{t.question} ASSISTANT: {t.answer}</s>" for t in row) for row in turns],
        "objects": {"0": [4], "1": [5, 6], "2": [4], "7": [4]},
    }


def record_step(setup: Setup, name: str, rng: np.random.Generator | None) -> None:
    """A step; with the contrastive loss if there is an ``rng`` to draw with."""
    folder, batch, glus = setup.folder, setup.batch, setup.model.glus
    glus.zero_grad(set_to_none=True)
    output = glus(batch)
    content: dict[str, Any] = {}
    embeds = output.seg_embeds_NQC.flatten(0, 1)
    objective = make_objective(None, setup.model.vocabulary.seg_id)
    denominators = objective.counts([batch])
    terms = objective(output, batch, denominators, np.random.default_rng(0))
    losses = {"ce_loss": terms["seg"], "mask_bce_loss": terms["bce"], "mask_dice_loss": terms["dice"]}
    losses["mask_loss"] = terms["bce"] + terms["dice"]
    total = terms["total"]
    if rng is not None:
        content, contrastive = record_contrastive(setup, name, embeds, rng)
        losses["contrastive_loss"] = contrastive
        total = total + contrastive
    losses["loss"] = total
    total.backward()
    np.savez(
        folder / f"{name}.npz",
        seg_embedding=output.seg_embeds_NQC.detach().numpy(),
        low_res_logits=output.mask_logits_NQmm.detach()[..., ::4, ::4].numpy(),
    )
    write_json(
        folder / f"{name}.json",
        content
        | {"losses": {"contrastive_loss": None} | {k: v.item() for k, v in losses.items()}}
        | record_gradients(folder, name, glus),
    )


def record_contrastive(
    setup: Setup, name: str, embeds_RC: torch.Tensor, rng: np.random.Generator
) -> tuple[dict[str, Any], torch.Tensor]:
    """Queue, draws and the weighted loss."""
    content = {"queue_size": 8, "temperature": 0.07, "num_negatives": NUM_NEGATIVES, "queue_before": QUEUE}
    objective = make_objective(Record(content, name), setup.model.vocabulary.seg_id)
    queue = objective.queue
    assert queue is not None
    before = rng.standard_normal((len(QUEUE), embeds_RC.shape[1])).astype(np.float32)
    fill_queue(queue, Record(content, name), before, setup.videos)
    keys = [key for keys in setup.batch.object_keys for key in keys]
    queue.push(keys, embeds_RC)
    entries, terms, draws = torch.stack([entry.embed for entry in queue.entries]), [], []
    for row, (key, candidates) in enumerate(zip(keys, queue.candidates(keys), strict=True)):
        draws.append({"anchor": key_name(key), "loss": None})
        if candidates is not None:
            positive = int(rng.choice(candidates.positive))
            negatives = rng.choice(candidates.negative, NUM_NEGATIVES).tolist()
            pair = entries[[positive]], entries[negatives][None]
            terms.append(object_contrastive_loss(embeds_RC[[row]], *pair, objective.temperature)[0])
            draws[-1] |= {"positive": positive, "negatives": negatives, "loss": terms[-1].item()}
            draws[-1]["num_positive_candidates"] = len(candidates.positive)
    np.savez(setup.folder / f"{name}_queue.npz", before=before, after=entries.numpy())
    content |= {"draws": draws, "queue_after": [key_name(entry.key) for entry in queue.entries]}
    return content, LossConfig().weights["contrastive"] * torch.stack(terms).mean()


def record_gradients(folder: Path, name: str, glus: Glus) -> dict[str, Any]:
    """Norms for the step's JSON; the gradients of LoRA and projector in a file."""
    gradients, without = collect_gradients(glus)
    norms = {key: float(value.double().norm()) for key, value in gradients.items()}
    full = {key: value.numpy() for key, value in gradients.items() if "lora_" in key or "mm_projector" in key}
    np.savez(folder / f"{name}_gradients.npz", **full)
    groups = ("lora_A", "mm_projector", "sam_mask_decoder")
    return {
        "gradient_norm": norms,
        "gradient_norm_total": math.hypot(*norms.values()),
        "gradient_norm_by_group": {g: math.hypot(*(norms[key] for key in norms if g in key)) for g in groups},
        "trainable_without_gradient": sorted(without),
    }
