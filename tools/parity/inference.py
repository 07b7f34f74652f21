"""Passes over a video: every array recorded of a pass gets a row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from glus.config import FramesConfig, FuserGamma, InferenceConfig
from glus.data.chat.llava import LlavaChat
from glus.data.frames import VideoSource, open_video
from glus.data.sampling import context_indices_eval
from glus.inference.predictor import VideoPredictor
from glus.models.glus import Glus
from glus.models.pretrained import LoadedModel
from glus.models.segmenter.sam2 import DecodedMasks
from tools.parity import gates
from tools.parity.arrays import expand_images, map_range, subsample
from tools.parity.fixture import Arrays, Fixture, Record, read_records, unpack
from tools.parity.gates import Gate
from tools.parity.models import Models
from tools.parity.probes import count_probed_steps, replay_probes
from tools.parity.report import Case, Report
from tools.parity.watch import Step, direction_of, watch

log = logging.getLogger(__name__)

CASES_FILE = "cases.json"
TOGETHER = "masks, many frames together"
PROBES_FILE = "probes.npz"


@dataclass(frozen=True)
class Quantity:
    """A recorded array of floats with one entry per step, not a number where there was no [SEG]."""

    title: str
    gate: Gate
    ours: Callable[[Step, DecodedMasks, np.ndarray], np.ndarray | float]
    """(step, its masks, what was recorded of it) -> the same of the replay."""
    scale: Callable[[np.ndarray], np.ndarray] | None = None
    """What was recorded of all steps -> what differences are relative to; None: the largest value."""


FLOATS = {
    "seg_embedding": Quantity(
        "[SEG] embedding", gates.SEG_EMBEDDING, lambda step, masks, recorded: step.embed_C.numpy()
    ),
    "low_res_logits": Quantity(
        "low-resolution logits",
        gates.MASK_LOGITS,
        lambda step, masks, recorded: subsample(masks.logits_Nmm[0], recorded.shape[-1]),
        map_range,
    ),
    "low_res_range": Quantity(
        "range of the logits",
        gates.MASK_LOGITS,
        lambda step, masks, recorded: np.array([masks.logits_Nmm.min(), masks.logits_Nmm.max()]),
        lambda recorded: np.ptp(recorded, axis=-1, keepdims=True),
    ),
    "stability": Quantity("stability score", gates.STABILITY, lambda step, masks, recorded: masks.stability_N.item()),
    "predicted_iou": Quantity(
        "predicted IoU", gates.PREDICTED_IOU, lambda step, masks, recorded: masks.predicted_iou_N4[0].numpy()
    ),
}
EXACT: dict[str, tuple[str, Callable[[Step], int]]] = {
    "next_token": ("next token", lambda step: step.next_token),
    "num_memories": ("memory frames read", lambda step: step.num_memories),
    "used_multimask": (
        "stability fallback",
        lambda step: step.decoded is not None and bool(step.decoded.used_multimask_N[0]),
    ),
}
"""Array -> (title, value of a step); recorded as 0 where there was no [SEG]."""
_OTHER_ARRAYS = ("frame_index", "context_index", "input_ids", "input_offsets", "masks", "near_threshold")


def replay_inference(report: Report, fixture: Fixture, models: Models) -> None:
    """All cases that ``cases.json`` lists, and the probes, which are of the first one.

    Args:
        report: gets the rows.
        fixture: what to replay.
        models: the recorded model.
    """
    folder = fixture.folder / "inference"
    if not folder.is_dir():
        report.case("inference").absent("all cases", "the folder has no inference/")
        return
    with report.case("inference").errors_as_row(CASES_FILE):
        entries = _read_cases(folder / CASES_FILE)
        for path in sorted(folder.glob("*.npz")):
            if path.name != PROBES_FILE and path.stem not in entries:
                report.case(path.stem).error("case", f"{CASES_FILE} does not list it")
        video = open_frames(fixture)
        probes: Path | None = folder / PROBES_FILE
        for name, entry in entries.items():
            _replay_case(report, fixture, models, video, name, entry, probes)
            probes = None


def _read_cases(path: Path) -> dict[str, Record]:
    records = read_records(path)
    entries = {record.get("case", str): record for record in records}
    if not entries or len(entries) != len(records):
        raise ValueError(f"{path}: expected cases with a name of their own, found {len(records)} for {list(entries)}")
    return entries


def _replay_case(
    report: Report,
    fixture: Fixture,
    models: Models,
    video: VideoSource,
    name: str,
    entry: Record,
    probes_path: Path | None,
) -> None:
    """One case, and the probes if ``probes_path`` names their file."""
    log.info("inference: %s", name)
    probes = Arrays(probes_path) if probes_path and probes_path.is_file() else None
    case, probed = report.case(name), report.case(f"probes of {name}")
    with case.errors_as_row("case"):
        model = models.frozen(FuserGamma(entry.get("fuser_gamma", str)))
        arrays = Arrays(fixture.folder / "inference" / f"{name}.npz")
        kept = count_probed_steps(probes) if probes else 0
        steps = run_case(fixture, model, video, entry, arrays, kept)
        compare_case(case, fixture, model, entry, arrays, steps)
        with case.errors_as_row(TOGETHER):
            _compare_masks(case, fixture, arrays, run_together(fixture, model, video, entry, arrays), TOGETHER)
        if probes:
            replay_probes(probed, probes, model.glus, video, arrays, steps)
        elif probes_path:
            probed.absent("all probes", f"the folder has no inference/{PROBES_FILE}")


def open_frames(fixture: Fixture) -> VideoSource:
    """The recorded video.

    Raises:
        FileNotFoundError: it has no frame.
        ValueError: number or size of its frames are others than those of ``fixture.json``.
    """
    video = open_video(fixture.frames)
    if len(video) != fixture.num_frames:
        raise ValueError(f"{fixture.frames} holds {len(video)} frames, fixture.json says {fixture.num_frames}")
    for index, name in enumerate(video.names):
        found, expected = video.read(index).shape[:2], (fixture.height, fixture.width)
        if found != expected:
            raise ValueError(f"{fixture.frames}: frame {name} is {found}, fixture.json says {expected}")
    return video


def run_case(
    fixture: Fixture, model: LoadedModel, video: VideoSource, entry: Record, arrays: Arrays, keep: int
) -> list[Step]:
    """One pass over the video for one sentence, frame by frame.

    Args:
        fixture: numbers of context and query frames.
        model: with the fuser's scale that the case asks for.
        video: all frames.
        entry: of ``cases.json``.
        arrays: what was recorded.
        keep: first steps of which to keep the inner values.

    Raises:
        ValueError, FileNotFoundError: a setting that the pass needs is missing or does not fit.
    """
    order, text = arrays["frame_index"].tolist(), entry.get("expression", str)
    steps: list[Step] = []
    with _predictor(fixture, model, entry, arrays) as predictor:
        for step in watch(predictor, video, text, order):
            steps.append(step if len(steps) < keep else replace(step, inner=None))
    return steps


def run_together(fixture: Fixture, model: LoadedModel, video: VideoSource, entry: Record, arrays: Arrays) -> np.ndarray:
    """The same pass as users run it, many frames at a time: masks (T, H, W)."""
    order = arrays["frame_index"].tolist()
    direction = direction_of(order, len(video))
    with _predictor(fixture, model, entry, arrays) as predictor:
        results = predictor.segment_pass(video, [entry.get("expression", str)], [order[0]], direction)
        return np.concatenate([result.masks_RHW for result in results])


@contextmanager
def _predictor(fixture: Fixture, model: LoadedModel, entry: Record, arrays: Arrays) -> Iterator[VideoPredictor]:
    """The predictor with the settings of a case, which its model has while the context lasts."""
    order = arrays["frame_index"].tolist()
    if entry.get("num_frames", int) != len(order):
        raise ValueError(f"{entry.where}: num_frames is not {len(order)}, as frame_index of {arrays.path.name} says")
    stride = entry.optional("memory_stride", int)
    is_remembering = entry.get("memory", bool)
    if is_remembering and stride is None:
        raise ValueError(f"{entry.where}: memory is on, but there is no memory_stride")
    predictor = VideoPredictor(
        model.glus,
        LlavaChat(model.vocabulary, model.glus.mllm.tokens_per_frame),
        FramesConfig(fixture.num_context, fixture.num_query),
        InferenceConfig() if stride is None else InferenceConfig(memory_stride=stride),
    )
    with _recorded_head(model, entry, arrays.path.parent), _memory(model.glus, is_remembering):
        yield predictor


@contextmanager
def _memory(glus: Glus, enabled: bool) -> Iterator[None]:
    """Memory on or off, as ``model.memory.enabled`` sets it."""
    before, glus.memory_enabled = glus.memory_enabled, enabled
    try:
        yield
    finally:
        glus.memory_enabled = before


@contextmanager
def _recorded_head(model: LoadedModel, entry: Record, folder: Path) -> Iterator[None]:
    """The [SEG] row of the LLM's head that the case was recorded with, if it names one."""
    name = entry.optional("lm_head_seg_row", str)
    if name is None:
        yield
        return
    weight, seg_id = model.glus.mllm.llama.lm_head.weight, model.vocabulary.seg_id
    row = torch.from_numpy(np.load(folder / name))
    if row.shape != weight[seg_id].shape:
        raise ValueError(f"{folder / name} holds {tuple(row.shape)}; a row of the head is {tuple(weight[0].shape)}")
    before = weight[seg_id].detach().clone()
    with torch.no_grad():
        weight[seg_id] = row
    try:
        yield
    finally:
        with torch.no_grad():
            weight[seg_id] = before


def compare_case(
    case: Case, fixture: Fixture, model: LoadedModel, entry: Record, arrays: Arrays, steps: Sequence[Step]
) -> None:
    """A row for every recorded array of a pass.

    Args:
        case: gets the rows.
        fixture: numbers of frames, their size.
        model: its vocabulary and tokens per frame.
        entry: of ``cases.json``.
        arrays: what was recorded.
        steps: the replay.
    """
    _compare_context(case, fixture, arrays)
    with case.errors_as_row("prompt ids"):
        _compare_prompts(case, arrays, steps, model.glus.mllm.tokens_per_frame)
    for name, (title, value) in EXACT.items():
        if name in arrays:
            case.equal(title, [value(step) for step in steps], arrays[name])
        else:
            case.absent(title, f"no array {name}")
    with case.errors_as_row("what follows [SEG]"):
        failed = [number for number, token in enumerate(arrays["next_token"]) if token != model.vocabulary.seg_id]
        _compare_failures(case, entry, steps, model.vocabulary.seg_id)
        for name, quantity in FLOATS.items():
            with case.errors_as_row(quantity.title):
                _compare_floats(case, name, quantity, arrays, steps, failed)
    with case.errors_as_row("masks"):
        _compare_masks(case, fixture, arrays, np.stack([step.mask_HW for step in steps]), "masks")
    for name in set(arrays.names) - {*FLOATS, *EXACT, *_OTHER_ARRAYS}:
        case.error(name, "recorded, but there is nothing to compare it with")


def _compare_context(case: Case, fixture: Fixture, arrays: Arrays) -> None:
    if "context_index" in arrays:
        ours = context_indices_eval(fixture.num_frames, fixture.num_context)
        case.equal("context frames", ours, arrays["context_index"])
    else:
        case.absent("context frames", "no array context_index")


def _compare_prompts(case: Case, arrays: Arrays, steps: Sequence[Step], tokens_per_frame: int) -> None:
    if "input_ids" not in arrays:
        case.absent("prompt ids", "no array input_ids")
        return
    ids, offsets = arrays["input_ids"], arrays["input_offsets"]
    if len(offsets) != len(steps) + 1 or offsets[-1] != len(ids):
        raise ValueError(f"input_offsets {offsets.tolist()} do not cut {len(ids)} ids into {len(steps)} prompts")
    wrong, total, note = 0, 0, ""
    for number, step in enumerate(steps):
        prompt = ids[offsets[number] : offsets[number + 1]]
        recorded = expand_images(prompt, prompt, tokens_per_frame)
        total += len(recorded)
        if len(recorded) != len(step.input_ids_L):
            wrong += len(recorded)
            note = note or f"step {number}: replay has {len(step.input_ids_L)} ids, recorded are {len(recorded)}"
        elif (step.input_ids_L != recorded).any():
            wrong += int((step.input_ids_L != recorded).sum())
            note = note or f"first in step {number}"
    case.differing("prompt ids", wrong, total, note)


def _compare_failures(case: Case, entry: Record, steps: Sequence[Step], seg_id: int) -> None:
    """The steps without [SEG], which ``cases.json`` lists."""
    recorded = entry.optional("failed_steps", list)
    if recorded is None:
        case.absent("steps without [SEG]", f"{CASES_FILE} has no failed_steps")
        return
    ours = [number for number, step in enumerate(steps) if step.next_token != seg_id]
    differing = len(set(ours) ^ set(recorded))
    case.differing("steps without [SEG]", differing, len(steps), f"replay {ours}" if ours else "")


def _compare_floats(
    case: Case, name: str, quantity: Quantity, arrays: Arrays, steps: Sequence[Step], failed: Sequence[int]
) -> None:
    """One array over the steps that the recording answered with [SEG]."""
    if name not in arrays:
        case.absent(quantity.title, f"no array {name}")
        return
    recorded = arrays[name]
    if len(recorded) != len(steps):
        raise ValueError(f"{name} has {len(recorded)} entries for {len(steps)} frames")
    answered = [number for number in range(len(steps)) if number not in failed]
    if not answered:
        case.absent(quantity.title, "no step was answered with [SEG]")
        return
    ours = []
    for number in answered:
        decoded = steps[number].decoded
        if decoded is None:
            raise ValueError(f"step {number}: the replay has no [SEG], the recording has")
        ours.append(quantity.ours(steps[number], decoded, recorded[number]))
    scale = quantity.scale(recorded[answered]) if quantity.scale else None
    note = f"without steps {list(failed)}" if failed else ""
    case.close(quantity.title, np.stack(ours), recorded[answered], quantity.gate, scale, note)


def _compare_masks(case: Case, fixture: Fixture, arrays: Arrays, ours: np.ndarray, name: str) -> None:
    """Pixels outside ``near_threshold`` must be equal."""
    title = f"{name} outside near_threshold"
    if "masks" not in arrays:
        case.absent(title, "no array masks")
        return
    recorded = unpack(arrays["masks"], fixture.width, "masks")
    near = unpack(arrays["near_threshold"], fixture.width, "near_threshold")
    if not ours.shape == recorded.shape == near.shape:
        raise ValueError(f"masks are {recorded.shape}, near_threshold {near.shape}; replay gives {ours.shape}")
    wrong = ours != recorded
    where = [f"step {number}" for number in np.flatnonzero((wrong & ~near).any((1, 2)))]
    note = f"{int((wrong & near).sum())} of {int(near.sum())} pixels near the threshold differ"
    case.differing(title, int((wrong & ~near).sum()), int((~near).sum()), "; ".join([*where[:3], note]))
