"""What inference gives for the recorded model: its tensors, its inputs, passes over a video, scores of masks."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from glus.config import FuserGamma, InferenceConfig
from glus.data.frames import VideoSource, open_video, read_image
from glus.data.sampling import context_indices_eval
from glus.evaluation.packed import boundary_accuracy, region_similarity
from glus.inference.predictor import VideoPredictor
from glus.models.glus import Glus
from glus.models.pretrained import LoadedModel
from glus.models.weights import read_tensors
from glus.tokens import IMAGE_ID
from tools.parity.comparison import (
    CLIP_INPUT,
    MASK_LOGITS,
    PREDICTED_IOU,
    PROBE,
    SAM2_INPUT,
    SEG_EMBEDDING,
    STABILITY,
    Case,
    Gate,
    Record,
    Row,
    map_range,
    read_arrays,
    read_records,
    thin_out,
    unpack,
)
from tools.parity.network import (
    Fixture,
    clip_input,
    direction_of,
    load_network,
    make_chat,
    make_predictor,
    sam2_input,
    sam2_tensors,
    watch,
)

log = logging.getLogger(__name__)

PICTURE_INPUT = re.compile(r"(?:clip|sam2_sub(\d+))_(.+)")
"""Arrays of ``preprocess/inputs.npz``: of CLIP's input or of every Nth row and column of SAM2's; the picture."""
SAM2_ROW, SAM2_COLUMN = 5, 3
"""First row and column that is recorded of SAM2's input."""
CASES_FILE, PROBES_FILE = "cases.json", "probes.npz"
TOGETHER = "masks, many frames together"
EXACT_ARRAYS = {
    "next_token": "next token",
    "num_memories": "memory frames read",
    "used_multimask": "stability fallback",
}
"""One entry per step; recorded as 0 where there was no [SEG]."""
Scale = Callable[[np.ndarray], np.ndarray]
FLOAT_ARRAYS: dict[str, tuple[str, Gate, Scale | None]] = {
    "seg_embedding": ("[SEG] embedding", SEG_EMBEDDING, None),
    "low_res_logits": ("low-resolution logits", MASK_LOGITS, map_range),
    "low_res_range": ("range of the logits", MASK_LOGITS, lambda values: np.ptp(values, axis=-1, keepdims=True)),
    "stability": ("stability score", STABILITY, None),
    "predicted_iou": ("predicted IoU", PREDICTED_IOU, None),
}
"""Likewise, not a number where there was no [SEG]: (title, gate, what differences are relative to)."""
OTHER_ARRAYS = ("frame_index", "context_index", "input_ids", "input_offsets", "masks", "near_threshold")
EACH_PROBE = ("llm_state", "conditioned_64", "all_mask_logits", "all_predicted_iou", "memory_features")
"""Recorded of the first steps, as many as the array has entries."""
FIRST_PROBE = (
    *("sam2_input", "high_res_256", "high_res_128", "image_feature_64", "position_64", "dense_position_64"),
    *("memory_position", "visual_tokens", "clip_pixel_values"),
)
"""Recorded of the first step."""


def replay_checkpoint(rows: list[Row], fixture: Fixture) -> None:
    """That the checkpoint loads, whole, and that its SAM2 is the one that the folder also holds by itself."""
    case = Case(rows, "checkpoint")
    with case.errors_as_row("tensors"):
        model, reports = load_network(fixture)
        for what, loaded in reports.items():
            problems = sum(len(names) for names in loaded.problems.values())
            case.count(f"tensors of {what}", problems, loaded.matched + problems, str(loaded))
        sam2 = Record(fixture.settings["sam2"], "sam2 in fixture.json")
        if case.holds("SAM2's own file", sam2, "weights"):
            ours, recorded = sam2_tensors(model.glus), read_tensors(fixture.folder / sam2["weights"])
            differing = {name for name in ours.keys() & recorded.keys() if not torch.equal(ours[name], recorded[name])}
            differing |= ours.keys() ^ recorded.keys()
            case.count("SAM2's own file", len(differing), len(ours), ", ".join(sorted(differing)[:3]))


def replay_preprocess(rows: list[Row], fixture: Fixture) -> None:
    """Every picture of ``preprocess/``, as CLIP and as SAM2 are given it."""
    folder, everything = fixture.folder / "preprocess", Case(rows, "preprocess")
    if not folder.is_dir():
        everything.absent("all pictures", "the folder has no preprocess/")
        return
    with everything.errors_as_row("inputs.npz"):
        arrays, glus = read_arrays(folder / "inputs.npz"), load_network(fixture)[0].glus
        inputs: dict[str, list[tuple[str, str | None]]] = {path.stem: [] for path in folder.glob("*.png")}
        for name in arrays:
            if match := PICTURE_INPUT.fullmatch(name):
                inputs.setdefault(match[2], []).append((name, match[1]))
            else:
                everything.error(name, "recorded, but there is nothing to compare it with")
        for picture, names in sorted(inputs.items()):
            case = Case(rows, f"preprocess {picture}")
            with case.errors_as_row("picture"):
                pixels = read_image(folder / f"{picture}.png", f"preprocess/{picture}.png")
                _compare_inputs(case, glus, pixels, names, arrays)


def _compare_inputs(
    case: Case, glus: Glus, pixels_HW3: np.ndarray, names: Sequence[tuple[str, str | None]], arrays: Record
) -> None:
    """``names``: array -> N of "every Nth row and column"; None for CLIP's input."""
    note = "x".join(map(str, pixels_HW3.shape[:2]))
    for name, step in names:
        if step is None:
            case.compare("input of CLIP", clip_input(glus, pixels_HW3), arrays[name], CLIP_INPUT, note=note)
        else:
            ours = sam2_input(glus, pixels_HW3)[:, SAM2_ROW :: int(step), SAM2_COLUMN :: int(step)]
            case.compare("input of SAM2", ours, arrays[name], SAM2_INPUT, note=note)
    for model, is_missing in (("CLIP", all(step for _, step in names)), ("SAM2", not any(step for _, step in names))):
        if is_missing:
            case.absent(f"input of {model}", "not in inputs.npz")


def replay_metrics(rows: list[Row], folder: Path) -> None:
    """J and F of every pair of masks of ``metrics/``, which must be equal to the last bit."""
    folder, case = folder / "metrics", Case(rows, "metrics")
    if not folder.is_dir():
        case.absent("J, F", "the folder has no metrics/")
        return
    with case.errors_as_row("metrics.json"):
        entries, masks = read_records(folder / "metrics.json"), read_arrays(folder / "masks.npz")
        pairs = [(f"pred_{entry['index']:02d}", f"gt_{entry['index']:02d}") for entry in entries]
        for title, score in (("J", region_similarity), ("F", boundary_accuracy)):
            ours = [float(score(masks[prediction][None], masks[target][None])[0]) for prediction, target in pairs]
            case.compare(title, ours, [entry[title] for entry in entries])
        for name in sorted(masks.keys() - {name for pair in pairs for name in pair}):
            case.error(name, "metrics.json does not list it")


def replay_inference(rows: list[Row], fixture: Fixture) -> None:
    """All cases that ``cases.json`` lists, and the probes, which are of the first one."""
    folder, everything = fixture.folder / "inference", Case(rows, "inference")
    if not folder.is_dir():
        everything.absent("all cases", "the folder has no inference/")
        return
    with everything.errors_as_row(CASES_FILE):
        entries = read_records(folder / CASES_FILE)
        names = [entry["case"] for entry in entries]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{folder / CASES_FILE}: expected cases with a name of their own, found {names}")
        for path in sorted(folder.glob("*.npz")):
            if path.name != PROBES_FILE and path.stem not in names:
                Case(rows, path.stem).error("case", f"{CASES_FILE} does not list it")
        video = open_frames(fixture)
        for name, entry in zip(names, entries, strict=True):
            log.info("inference: %s", name)
            case = Case(rows, name)
            with case.errors_as_row("case"):
                replay_case(case, fixture, entry, video, has_probes=name == names[0])


def open_frames(fixture: Fixture) -> VideoSource:
    """The recorded video.

    Raises:
        FileNotFoundError: it has no frame.
        ValueError: number or size of its frames are others than those of ``fixture.json``.
    """
    settings, video = fixture.settings, open_video(fixture.path("frames"))
    if len(video) != settings["num_frames"]:
        raise ValueError(f"{len(video)} frames in {fixture.path('frames')}, fixture.json says {settings['num_frames']}")
    expected = settings["height"], settings["width"]
    for index, name in enumerate(video.names):
        if video.read(index).shape[:2] != expected:
            raise ValueError(f"frame {name} is {video.read(index).shape[:2]}, fixture.json says {expected}")
    return video


def replay_case(case: Case, fixture: Fixture, entry: Record, video: VideoSource, has_probes: bool = False) -> None:
    """One pass over the video for one sentence: frame by frame, and many frames together as users run it.

    Args:
        case: gets the rows.
        fixture: numbers of frames, their size, the model.
        entry: of ``cases.json``.
        video: all frames.
        has_probes: its intermediate values are recorded too, if any are.

    Raises:
        ValueError, FileNotFoundError: a setting that the pass needs is missing or does not fit.
    """
    folder = fixture.folder / "inference"
    arrays = read_arrays(folder / f"{entry['case']}.npz")
    probes = read_arrays(folder / PROBES_FILE) if has_probes and (folder / PROBES_FILE).is_file() else None
    model, predictor = load_case(fixture, entry, arrays)
    text, order = entry["expression"], arrays["frame_index"].tolist()
    steps = list(watch(predictor, video, text, order, count_probed_steps(probes) if probes else 0))
    compare_case(case, fixture, model, entry, arrays, steps)
    with case.errors_as_row(TOGETHER):
        results = predictor.segment_pass(video, [text], [order[0]], direction_of(order, video))
        _compare_masks(case, fixture, arrays, np.concatenate([result.masks_RHW for result in results]), TOGETHER)
    probed = Case(case.rows, f"probes of {case.name}")
    if probes:
        compare_probes(probed, probes, steps)
    elif has_probes:
        probed.absent("all probes", f"the folder has no inference/{PROBES_FILE}")


def load_case(fixture: Fixture, entry: Record, arrays: Record) -> tuple[LoadedModel, VideoPredictor]:
    """The model and the predictor with the settings of a case.

    Raises:
        ValueError, FileNotFoundError: one of them is missing or does not fit.
    """
    if entry["num_frames"] != len(arrays["frame_index"]):
        raise ValueError(f"{entry.where}: num_frames is not {len(arrays['frame_index'])}, as {arrays.where} says")
    stride = entry.get("memory_stride")
    if entry["memory"] and stride is None:
        raise ValueError(f"{entry.where}: memory is on, but there is no memory_stride")
    row_file = entry.get("lm_head_seg_row")
    seg_row_D = np.load(fixture.folder / "inference" / row_file) if row_file else None
    model, _ = load_network(fixture, FuserGamma(entry["fuser_gamma"]), entry["memory"], seg_row_D)
    inference = InferenceConfig() if stride is None else InferenceConfig(memory_stride=stride)
    return model, make_predictor(model, fixture, inference)


def compare_case(
    case: Case, fixture: Fixture, model: LoadedModel, entry: Record, arrays: Record, steps: Sequence[Record]
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
    if case.holds("context frames", arrays, "context_index"):
        ours = context_indices_eval(fixture.settings["num_frames"], fixture.settings["num_context"])
        case.compare("context frames", ours, arrays["context_index"])
    with case.errors_as_row("prompt ids"):
        if case.holds("prompt ids", arrays, "input_ids"):
            _compare_prompts(case, arrays, steps, make_chat(model).tokens_per_frame)
    for name, title in EXACT_ARRAYS.items():
        if case.holds(title, arrays, name):
            case.compare(title, [step[name] for step in steps], arrays[name])
    with case.errors_as_row("what follows [SEG]"):
        seg_id = model.vocabulary.seg_id
        if case.holds("steps without [SEG]", entry, "failed_steps"):
            ours = [number for number, step in enumerate(steps) if step["next_token"] != seg_id]
            num_wrong = len(set(ours) ^ set(entry["failed_steps"]))
            case.count("steps without [SEG]", num_wrong, len(steps), f"replay {ours}" if ours else "")
        is_answered = arrays["next_token"] == seg_id
        for name, (title, _, _) in FLOAT_ARRAYS.items():
            with case.errors_as_row(title):
                if case.holds(title, arrays, name):
                    _compare_answers(case, name, arrays[name], is_answered, steps)
    with case.errors_as_row("masks"):
        _compare_masks(case, fixture, arrays, np.stack([step["mask"] for step in steps]), "masks")
    for name in arrays.keys() - {*FLOAT_ARRAYS, *EXACT_ARRAYS, *OTHER_ARRAYS}:
        case.error(name, "recorded, but there is nothing to compare it with")


def expand_images(values_L: np.ndarray, ids_L: np.ndarray, tokens_per_frame: int) -> np.ndarray:
    """One value per recorded id, where an image is one, -> one per token as the model takes them: an image has many."""
    return np.repeat(values_L, np.where(ids_L == IMAGE_ID, tokens_per_frame, 1))


def _compare_prompts(case: Case, arrays: Record, steps: Sequence[Record], tokens_per_frame: int) -> None:
    """A prompt of another length counts as wrong as a whole."""
    ids, offsets = arrays["input_ids"], arrays["input_offsets"]
    if len(offsets) != len(steps) + 1 or offsets[-1] != len(ids):
        raise ValueError(f"input_offsets {offsets.tolist()} do not cut {len(ids)} ids into {len(steps)} prompts")
    num_wrong, compared, note = 0, 0, ""
    for number, (step, prompt) in enumerate(zip(steps, np.split(ids, offsets[1:-1]), strict=True)):
        recorded, ours = expand_images(prompt, prompt, tokens_per_frame), step["input_ids"]
        is_as_long = len(ours) == len(recorded)
        wrong = int((ours != recorded).sum()) if is_as_long else len(recorded)
        if wrong and not note:
            note = f"first in step {number}: replay has {len(ours)} ids, recorded are {len(recorded)}"
        num_wrong, compared = num_wrong + wrong, compared + len(recorded)
    case.count("prompt ids", num_wrong, compared, note)


def _compare_answers(
    case: Case, name: str, recorded: np.ndarray, is_answered: np.ndarray, steps: Sequence[Record]
) -> None:
    """One array over the steps that the recording answered with [SEG]."""
    if not len(recorded) == len(is_answered) == len(steps):
        raise ValueError(f"{name} has {len(recorded)} entries for {len(steps)} frames")
    if not is_answered.any():
        case.absent(FLOAT_ARRAYS[name][0], "no step was answered with [SEG]")
        return
    ours = np.stack([step[name] for step, is_used in zip(steps, is_answered, strict=True) if is_used])
    failed = np.flatnonzero(~is_answered).tolist()
    compare_floats(case, name, ours, recorded[is_answered], f"without steps {failed}" if failed else "")


def compare_floats(case: Case, name: str, ours: np.ndarray, recorded: np.ndarray, note: str = "") -> None:
    """A row for one of ``FLOAT_ARRAYS``; maps are compared where they were recorded."""
    title, gate, scale = FLOAT_ARRAYS[name]
    ours = thin_out(ours, recorded) if scale is map_range else ours
    case.compare(title, ours, recorded, gate, scale(recorded) if scale else None, note)


def _compare_masks(case: Case, fixture: Fixture, arrays: Record, ours: np.ndarray, name: str) -> None:
    """Pixels outside ``near_threshold`` must be equal."""
    title, width = f"{name} outside near_threshold", fixture.settings["width"]
    if not case.holds(title, arrays, "masks"):
        return
    recorded, near = (unpack(arrays[part], width, part) for part in ("masks", "near_threshold"))
    if not ours.shape == recorded.shape == near.shape:
        raise ValueError(f"masks are {recorded.shape}, near_threshold {near.shape}; replay gives {ours.shape}")
    wrong = ours != recorded
    where = [f"step {number}" for number in np.flatnonzero((wrong & ~near).any((1, 2)))]
    note = f"{int((wrong & near).sum())} of {int(near.sum())} pixels near the threshold differ"
    case.count(title, int((wrong & ~near).sum()), int((~near).sum()), "; ".join([*where[:3], note]))


def count_probed_steps(probes: Record) -> int:
    """Steps whose intermediate values the probes are of."""
    return max([1, *(len(values) for name, values in probes.items() if _without_sub(name) in EACH_PROBE)])


def compare_probes(case: Case, probes: Record, steps: Sequence[Record]) -> None:
    """A row for every intermediate value of the first steps: where two implementations begin to part.

    Args:
        case: gets the rows.
        probes: what was recorded; a name may end in ``_subN``: every Nth row and column.
        steps: the replay, the first ones with their intermediate values.
    """
    for name, recorded in probes.items():
        with case.errors_as_row(name):
            base = _without_sub(name)
            if base in EACH_PROBE:
                ours = np.stack([step[base] for step in steps[: len(recorded)]])
            elif base in FIRST_PROBE:
                ours = steps[0][base]
            else:
                raise ValueError("recorded, but there is nothing to compare it with")
            case.compare(name, thin_out(ours, recorded), recorded, PROBE)
    for name in sorted({*EACH_PROBE, *FIRST_PROBE} - {_without_sub(name) for name in probes}):
        case.absent(name, f"no such array in {PROBES_FILE}")


def _without_sub(name: str) -> str:
    return re.sub(r"_sub\d+$", "", name)
