"""What inference gives for the recorded model: its tensors, its inputs, passes over a video, scores of masks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

from glus.config import FuserGamma, InferenceConfig
from glus.data.frames import VideoSource, open_video, read_image
from glus.data.sampling import context_indices_eval
from glus.evaluation.packed import boundary_accuracy, region_similarity
from glus.inference.predictor import VideoPredictor
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
    NotRecorded,
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
    load_network,
    make_chat,
    make_predictor,
    run_pass,
    sam2_input,
    sam2_tensors,
    watch,
)

PICTURE_INPUT = re.compile(r"(?:clip|sam2_sub(\d+))_(.+)")
"""Arrays of ``preprocess/inputs.npz``: of CLIP's input or of every Nth row and column of SAM2's; the picture."""
SAM2_ROW, SAM2_COLUMN = 5, 3
"""First row and column that is recorded of SAM2's input."""
CASES_FILE, PROBES_FILE = "cases.json", "probes.npz"
TOGETHER = "masks, many frames together"
NOTHING_OF_OURS = "recorded, but there is nothing to compare it with"
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


def replay_checkpoint(rows: list[Row], fixture: Fixture) -> None:
    """That the checkpoint loads, whole, and that its SAM2 is the one that the folder also holds by itself."""
    case = Case(rows, "checkpoint")
    with case.row("tensors"):
        model, reports = load_network(fixture)
        for what, loaded in reports.items():
            problems = sum(len(names) for names in loaded.problems.values())
            with case.row(f"tensors of {what}") as row:
                row.count(problems, loaded.matched + problems, str(loaded))
        with case.row("SAM2's own file") as row:
            file = fixture.folder / fixture.settings.part("sam2").optional("weights")
            ours, recorded = sam2_tensors(model.glus), read_tensors(file)
            differing = {name for name in ours.keys() & recorded.keys() if not torch.equal(ours[name], recorded[name])}
            differing |= ours.keys() ^ recorded.keys()
            row.count(len(differing), len(ours), ", ".join(sorted(differing)[:3]))


def replay_preprocess(rows: list[Row], fixture: Fixture) -> None:
    """Every picture of ``preprocess/``, as CLIP and as SAM2 are given it."""
    folder, everything = fixture.folder / "preprocess", Case(rows, "preprocess")
    with everything.row("inputs.npz"):
        arrays, glus = read_arrays(folder / "inputs.npz"), load_network(fixture)[0].glus
        known = [match for name in arrays if (match := PICTURE_INPUT.fullmatch(name))]
        for name in arrays.keys() - {match[0] for match in known}:
            everything.error(name, NOTHING_OF_OURS)
        steps = {match[2]: match[1] for match in known if match[1]}
        for picture in sorted({match[2] for match in known} | {path.stem for path in folder.glob("*.png")}):
            case = Case(rows, f"preprocess {picture}")
            with case.row("picture"):
                pixels = read_image(folder / f"{picture}.png", f"preprocess/{picture}.png")
                note = "x".join(map(str, pixels.shape[:2]))
                with case.row("input of CLIP") as row:
                    row.compare(clip_input(glus, pixels), arrays.optional(f"clip_{picture}"), CLIP_INPUT, note=note)
                with case.row("input of SAM2") as row:
                    recorded = arrays.optional(f"sam2_sub{steps.get(picture)}_{picture}")
                    every = slice(SAM2_ROW, None, int(steps[picture])), slice(SAM2_COLUMN, None, int(steps[picture]))
                    row.compare(sam2_input(glus, pixels)[:, *every], recorded, SAM2_INPUT, note=note)


def replay_metrics(rows: list[Row], fixture: Fixture) -> None:
    """J and F of every pair of masks of ``metrics/``, which must be equal to the last bit."""
    folder, case = fixture.folder / "metrics", Case(rows, "metrics")
    with case.row("metrics.json"):
        entries, masks = read_records(folder / "metrics.json"), read_arrays(folder / "masks.npz")
        pairs = [(f"pred_{entry['index']:02d}", f"gt_{entry['index']:02d}") for entry in entries]
        for title, score in (("J", region_similarity), ("F", boundary_accuracy)):
            with case.row(title) as row:
                ours = [float(score(*(masks[name][None] for name in pair))[0]) for pair in pairs]
                row.compare(ours, [entry[title] for entry in entries])
        for name in sorted(masks.keys() - {name for pair in pairs for name in pair}):
            case.error(name, "metrics.json does not list it")


def replay_inference(rows: list[Row], fixture: Fixture) -> None:
    """All cases that ``cases.json`` lists, and the probes, which are of the first one."""
    folder = fixture.folder / "inference"
    with Case(rows, "inference").row(CASES_FILE):
        entries = read_records(folder / CASES_FILE)
        names = [entry["case"] for entry in entries]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{folder / CASES_FILE}: expected cases with a name of their own, found {names}")
        for path in sorted(folder.glob("*.npz")):
            if path.name != PROBES_FILE and path.stem not in names:
                Case(rows, path.stem).error("case", f"{CASES_FILE} does not list it")
        video = open_frames(fixture)
        for name, entry in zip(names, entries, strict=True):
            case = Case(rows, name)
            with case.row("case"):
                replay_case(case, fixture, entry, video, has_probes=name == names[0])


def open_frames(fixture: Fixture) -> VideoSource:
    """The recorded video.

    Raises:
        FileNotFoundError: it has no frame.
        ValueError: number or size of its frames are others than those of ``fixture.json``.
    """
    settings, video = fixture.settings, open_video(fixture.path("frames"))
    found = len(video), {video.read(index).shape[:2] for index in range(len(video))}
    expected = settings["num_frames"], {(settings["height"], settings["width"])}
    if found != expected:
        raise ValueError(f"{fixture.path('frames')}: number and sizes of frames are {found}, expected {expected}")
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
    model, predictor = load_case(fixture, entry, arrays)
    text, order = entry["expression"], arrays["frame_index"].tolist()
    steps = list(watch(predictor, video, text, order, has_probes))
    compare_case(case, fixture, model, entry, arrays, steps)
    with case.row(f"{TOGETHER} outside near_threshold") as row:
        masks = [result.masks_RHW for result in run_pass(predictor, video, text, order)]
        _compare_masks(row, fixture, arrays, np.concatenate(masks))
    if has_probes:
        probed = Case(case.rows, f"probes of {case.name}")
        if (folder / PROBES_FILE).is_file():
            compare_probes(probed, read_arrays(folder / PROBES_FILE), steps)
        else:
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
    with case.row("context frames") as row:
        ours = context_indices_eval(fixture.settings["num_frames"], fixture.settings["num_context"])
        row.compare(ours, arrays.optional("context_index"))
    with case.row("prompt ids") as row:
        _compare_prompts(row, arrays, steps, make_chat(model).tokens_per_frame)
    for name, title in EXACT_ARRAYS.items():
        with case.row(title) as row:
            row.compare([step[name] for step in steps], arrays.optional(name))
    seg_id = model.vocabulary.seg_id
    with case.row("steps without [SEG]") as row:
        ours = [number for number, step in enumerate(steps) if step["next_token"] != seg_id]
        num_wrong = len(set(ours) ^ set(entry.optional("failed_steps")))
        row.count(num_wrong, len(steps), f"replay {ours}" if ours else "")
    for name, (title, _, _) in FLOAT_ARRAYS.items():
        with case.row(title) as row:
            _compare_answers(row, name, arrays.optional(name), arrays["next_token"] == seg_id, steps)
    with case.row("masks outside near_threshold") as row:
        _compare_masks(row, fixture, arrays, np.stack([step["mask"] for step in steps]))
    for name in arrays.keys() - {*FLOAT_ARRAYS, *EXACT_ARRAYS, *OTHER_ARRAYS}:
        case.error(name, NOTHING_OF_OURS)


def expand_images(values_L: np.ndarray, ids_L: np.ndarray, tokens_per_frame: int) -> np.ndarray:
    """One value per recorded id, where an image is one, -> one per token as the model takes them: an image has many."""
    return np.repeat(values_L, np.where(ids_L == IMAGE_ID, tokens_per_frame, 1))


def _compare_prompts(row: Row, arrays: Record, steps: Sequence[Record], tokens_per_frame: int) -> None:
    """A prompt of another length counts as wrong as a whole."""
    ids, offsets = arrays.optional("input_ids"), arrays["input_offsets"]
    num_wrong, compared, note = 0, 0, ""
    for number, (step, prompt) in enumerate(zip(steps, np.split(ids, offsets[1:-1]), strict=True)):
        recorded, ours = expand_images(prompt, prompt, tokens_per_frame), step["input_ids"]
        wrong = int((ours != recorded).sum()) if len(ours) == len(recorded) else len(recorded)
        if wrong and not note:
            note = f"first in step {number}: replay has {len(ours)} ids, recorded are {len(recorded)}"
        num_wrong, compared = num_wrong + wrong, compared + len(recorded)
    row.count(num_wrong, compared, note)


def _compare_answers(
    row: Row, name: str, recorded: np.ndarray, is_answered: np.ndarray, steps: Sequence[Record]
) -> None:
    """One array over the steps that the recording answered with [SEG]."""
    if not is_answered.any():
        raise NotRecorded("no step was answered with [SEG]")
    ours = np.stack([step[name] for step, is_used in zip(steps, is_answered, strict=True) if is_used])
    failed = np.flatnonzero(~is_answered).tolist()
    compare_floats(row, name, ours, recorded[is_answered], f"without steps {failed}" if failed else "")


def compare_floats(row: Row, name: str, ours: np.ndarray, recorded: np.ndarray, note: str = "") -> None:
    """One of ``FLOAT_ARRAYS``; maps are compared where they were recorded."""
    _, gate, scale = FLOAT_ARRAYS[name]
    ours = thin_out(ours, recorded) if scale is map_range else ours
    row.compare(ours, recorded, gate, scale(recorded) if scale else None, note)


def _compare_masks(row: Row, fixture: Fixture, arrays: Record, ours: np.ndarray) -> None:
    """Pixels outside ``near_threshold`` must be equal."""
    packed = {"masks": arrays.optional("masks"), "near_threshold": arrays["near_threshold"]}
    recorded, near = (unpack(bits, fixture.settings["width"], name) for name, bits in packed.items())
    if not ours.shape == recorded.shape == near.shape:
        raise ValueError(f"masks are {recorded.shape}, near_threshold {near.shape}; replay gives {ours.shape}")
    wrong = ours != recorded
    where = [f"step {number}" for number in np.flatnonzero((wrong & ~near).any((1, 2)))]
    note = f"{int((wrong & near).sum())} of {int(near.sum())} pixels near the threshold differ"
    row.count(int((wrong & ~near).sum()), int((~near).sum()), "; ".join([*where[:3], note]))


def compare_probes(case: Case, probes: Record, steps: Sequence[Record]) -> None:
    """A row for every intermediate value of the first step, or of the first steps: where implementations begin to part.

    Args:
        case: gets the rows.
        probes: what was recorded; a name may end in ``_subN``: every Nth row and column.
        steps: the replay, with its intermediate values.
    """
    first = steps[0].part("probes")
    for name, recorded in probes.items():
        with case.row(name) as row:
            base = _without_sub(name)
            ours = first[base]
            if recorded.ndim > ours.ndim:
                ours = np.stack([step["probes"][base] for step in steps[: len(recorded)]])
            row.compare(thin_out(ours, recorded), recorded, PROBE)
    for name in sorted(first.keys() - {_without_sub(name) for name in probes}):
        case.absent(name, f"no such array in {PROBES_FILE}")


def _without_sub(name: str) -> str:
    return re.sub(r"_sub\d+$", "", name)
