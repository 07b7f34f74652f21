"""Training steps: forward, losses and backward as the trainer takes them, without the optimizer."""

from __future__ import annotations

import logging
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from glus.batch import Batch, GlusOutput, TrainSample
from glus.config import ContrastiveConfig, LossConfig
from glus.data.chat.llava import ASSISTANT
from glus.data.chat.tree import separate_rows, unpack_conversations
from glus.data.dataset import collate
from glus.data.sampling import ANSWERS, QUESTIONS, Turn, clean_expression
from glus.losses.contrastive import ContrastiveQueue
from glus.losses.objective import GlusObjective, build_objective
from glus.models.glus import Glus
from glus.models.pretrained import LoadedModel
from glus.types import ObjectKey
from tools.parity.comparison import (
    GRADIENT_GROUP,
    GRADIENT_NEGLIGIBLE,
    GRADIENT_NOISE,
    GRADIENT_TENSOR,
    GRADIENT_TOTAL,
    GRADIENT_VALUES,
    LOSS,
    SEG_EMBEDDING,
    Case,
    Record,
    Row,
    read_arrays,
    read_record,
    read_records,
    unpack,
)
from tools.parity.network import (
    Fixture,
    clip_crops,
    collect_gradients,
    forward_with_memories,
    load_trainable,
    make_chat,
    observed,
)
from tools.parity.replay_inference import FLOAT_ARRAYS, compare_floats, expand_images

log = logging.getLogger(__name__)

LOSSES = {
    "ce_loss": ("seg",),
    "mask_bce_loss": ("bce",),
    "mask_dice_loss": ("dice",),
    "mask_loss": ("bce", "dice"),
    "contrastive_loss": ("contrastive",),
    "loss": ("total",),
}
"""Recorded name -> our terms that it is the sum of, all weighted."""
RELEASE_DATASETS, RELEASE_MIN_TERMS = ["mevis"], 2
"""What feeds the release's queue, and fewer terms than it takes (METHOD: its GLUS.py, ``cnt > 1``)."""
ANSWER = re.compile(rf"{ASSISTANT} (.*?)</s>")
Gradients = Mapping[str, torch.Tensor | None]


@dataclass(frozen=True)
class Setup:
    """A model in training mode and the micro-batch."""

    folder: Path
    model: LoadedModel
    videos: list[Record]
    """The entries of ``batch.json``."""
    batch: Batch


def replay_training(rows: list[Row], fixture: Fixture) -> None:
    """The micro-batch, each recorded step on it, and a step with memories that carry gradients."""
    folder, everything, case = fixture.folder / "training", Case(rows, "training"), Case(rows, "training batch")
    if not folder.is_dir():
        everything.absent("all steps", "the folder has no training/")
        return
    with case.errors_as_row("batch"):
        steps = sorted(path.stem for path in folder.glob("step*.json"))
        if not steps:
            everything.absent("all steps", "no step*.json in training/")
        for path in sorted(folder.glob("step*.npz")):
            step = path.stem.removesuffix("_queue").removesuffix("_gradients")
            if step not in steps:
                Case(rows, f"training {path.stem}").error("step", f"there is no {step}.json beside it")
        setup = read_setup(folder, load_trainable(fixture, folder / "lora.pt", detach=True))
        compare_batch(case, setup)
        for name in steps:
            log.info("training: %s", name)
            case = Case(rows, f"training {name}")
            with case.errors_as_row("step"):
                replay_step(case, setup, name)
        log.info("training: detach")
        with Case(rows, "training, detach: false").errors_as_row("step"):
            replay_detach(rows, setup, load_trainable(fixture, folder / "lora.pt", detach=False).glus)


def read_setup(folder: Path, model: LoadedModel) -> Setup:
    """Tokenize, crop and collate the recorded videos, sentences and masks as training does.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: what they hold does not fit together.
    """
    masks, pixels = read_arrays(folder / "batch.npz"), read_arrays(folder / "videos.npz")
    videos = read_records(folder / "batch.json")
    samples = [
        _sample(video, pixels[video["video"]], masks[f"target_masks_{number}"], model)
        for number, video in enumerate(videos)
    ]
    return Setup(folder, model, videos, collate(samples, model.vocabulary.pad_id))


def _sample(video: Record, frames_THW3: np.ndarray, packed_masks: np.ndarray, model: LoadedModel) -> TrainSample:
    name, exp_ids, query = video["video"], video["expressions"], video["query_index"]
    num_context = len(video["context_index"])
    names = [f"{dataset_of(video)}/{name}/{exp_id}" for exp_id in exp_ids]
    masks = unpack(packed_masks, frames_THW3.shape[2], f"target masks of {name}")
    if masks.shape != (len(names), len(query), *frames_THW3.shape[1:3]):
        raise ValueError(
            f"batch.npz: target masks of {name} are {masks.shape}; it has {len(names)} sentences, "
            f"{len(query)} query frames and {frames_THW3.shape} pixels"
        )
    tokenizer, turns = make_chat(model), read_turns(video)
    crops = clip_crops(model.glus, frames_THW3[[*video["context_index"], *query]])
    return TrainSample(
        context_pixels=crops[:num_context],
        query_pixels=crops[num_context:],
        query_frames=frames_THW3[query],
        conversations=[tokenizer.train(own, num_context, name) for own, name in zip(turns, names, strict=True)],
        target_masks=list(masks.astype(np.uint8)),
        object_keys=[[object_key(video, exp_id, frame) for frame in video["frames"]] for exp_id in exp_ids],
        names=names,
    )


def dataset_of(video: Record) -> str:
    """The dataset that an entry of ``batch.json`` is of.

    Raises:
        ValueError: its sentences are of several.
    """
    pairs = zip(video["str_ids"], video["expressions"], strict=True)
    datasets = {str_id.removesuffix(f"_{video['video']}_{exp_id}") for str_id, exp_id in pairs}
    if len(datasets) != 1:
        raise ValueError(f"{video.where}: str_ids are not dataset_video_expression of one dataset")
    return datasets.pop()


def read_turns(video: Record) -> list[list[Turn]]:
    """The questions and answers that were drawn for each sentence.

    Raises:
        ValueError: a conversation has more or fewer answers than questions.
    """
    turns = []
    for questions, text in zip(video["questions"], video["conversations"], strict=True):
        answers = ANSWER.findall(text)
        if len(answers) != len(questions):
            raise ValueError(f"{video.where}: {len(answers)} answers to {len(questions)} questions in {text!r}")
        asked = [question.partition("\n")[2] for question in questions]  # without the line of the image
        turns.append([Turn(*pair) for pair in zip(asked, answers, strict=True)])
    return turns


def object_key(video: Record, exp_id: str, frame: str) -> ObjectKey:
    """What a [SEG] stands for.

    Raises:
        ValueError: the objects of the sentence are not recorded.
    """
    objects = Record(video["objects"], f"{video.where}: objects of {video['video']}")
    return ObjectKey(dataset_of(video), video["video"], exp_id, frame, frozenset(objects[exp_id]))


def compare_batch(case: Case, setup: Setup) -> None:
    """Token ids, the labels that count, and the wording that they were made of."""
    vocabulary, num_tokens = setup.model.vocabulary, make_chat(setup.model).tokens_per_frame
    arrays = read_arrays(setup.folder / "batch.npz")
    conversations = unpack_conversations(setup.batch.rows)
    ids_NL = separate_rows(conversations, vocabulary.pad_id).input_ids_BL
    with case.errors_as_row("token ids"):
        ids = [expand_images(row, row, num_tokens) for row in arrays["input_ids"]]
        case.compare("token ids", ids_NL.numpy(), np.stack(ids))
    with case.errors_as_row("labels at [SEG]"):
        pairs = zip(arrays["labels"], arrays["input_ids"], strict=True)
        labels = [expand_images(row, ids, num_tokens) for row, ids in pairs]
        recorded = [np.flatnonzero(row == vocabulary.seg_id) for row in labels]
        case.compare(
            "labels at [SEG]",
            np.stack([conversation.seg_positions for conversation in conversations]) + 1,
            np.stack(recorded),
        )
    with case.errors_as_row("wording"):
        drawn, strange = 0, []
        for video in setup.videos:
            for text, turns in zip(video["texts"], read_turns(video), strict=True):
                cleaned = clean_expression(text, strip=True)
                known = [question.format(expression=cleaned) for question in QUESTIONS]
                strange += [t for t in turns if t.answer not in ANSWERS or t.question not in known]
                drawn += len(turns)
        case.count("questions and answers are of our templates", len(strange), drawn, str(strange[:1] or ""))


def make_objective(step: Record | None, seg_id: int) -> GlusObjective:
    """The released weights; the contrastive loss, with the recorded sizes, only if ``step`` records its queue."""
    weights = LossConfig().weights
    if step is None or "queue_before" not in step:
        return build_objective(LossConfig({**weights, "contrastive": 0.0}, ContrastiveConfig()), seg_id)
    contrastive = ContrastiveConfig(
        queue_size=step["queue_size"],
        temperature=step["temperature"],
        num_negatives=step["num_negatives"],
        min_terms=RELEASE_MIN_TERMS,
        datasets=RELEASE_DATASETS,
    )
    return build_objective(LossConfig(weights, contrastive), seg_id)


def replay_step(case: Case, setup: Setup, name: str) -> None:
    """The outputs, losses and gradients of ``<name>.json``.

    Raises:
        FileNotFoundError, ValueError: it cannot be run.
    """
    step, glus, batch = read_record(setup.folder / f"{name}.json"), setup.model.glus, setup.batch
    glus.zero_grad(set_to_none=True)
    output: GlusOutput = glus(batch)
    _compare_outputs(case, _outputs(output), _read_if_there(setup.folder / f"{name}.npz"))
    objective = make_objective(step, setup.model.vocabulary.seg_id)
    if objective.queue is None:
        terms = objective(output, batch, objective.counts([batch]), RecordedDraws().as_generator())
    else:
        queue = read_arrays(setup.folder / f"{name}_queue.npz")
        terms = _contrastive_terms(case, objective, setup, output, step, queue)
    _compare_losses(case, {term: value.item() for term, value in terms.items()}, step)
    terms["total"].backward()
    full = _read_if_there(setup.folder / f"{name}_gradients.npz")
    compare_gradients(case, collect_gradients(glus), step, full)


def _read_if_there(path: Path) -> Record | None:
    return read_arrays(path) if path.is_file() else None


def _outputs(output: GlusOutput) -> Record:
    """Under their recorded names."""
    values = {"seg_embedding": output.seg_embeds_NQC, "low_res_logits": output.mask_logits_NQmm}
    return Record({name: value.detach().numpy() for name, value in values.items()}, "the replay")


def _compare_outputs(case: Case, ours: Record, arrays: Record | None, note: str = "") -> None:
    for name, values in ours.items():
        title = FLOAT_ARRAYS[name][0]
        with case.errors_as_row(title):
            if case.holds(title, arrays, name) and arrays:
                compare_floats(case, name, values, arrays[name], note)


def _compare_losses(case: Case, terms: Mapping[str, float], step: Record) -> None:
    """Each recorded loss, relative to itself; one that is null must have no term of ours."""
    for name, recorded in Record(step["losses"], f"{step.where}: losses").items():
        title = f"loss, {name}"
        with case.errors_as_row(title):
            if name not in LOSSES:
                raise ValueError("recorded, but there is nothing to compare it with")
            ours = [terms.get(term, 0.0) for term in LOSSES[name]]
            if recorded is None:
                case.count(title, sum(value != 0 for value in ours), 1, "recorded as none")
            else:
                case.compare(title, sum(ours), recorded, LOSS)


class RecordedDraws:
    """Stands in for the random generator of ``ContrastiveQueue.loss``: gives the recorded draws, anchor by anchor.

    Args:
        draws: of the anchors that have a term, in order.
    """

    def __init__(self, draws: Sequence[Record] = ()):
        self._left = deque(np.array(part) for draw in draws for part in (draw["positive"], draw["negatives"]))
        self.is_candidate: list[np.ndarray] = []
        """Of each draw so far, a positive and negatives in turn: whether it is one of the candidates."""
        self.num_candidates: list[int] = []

    def choice(self, candidates: np.ndarray, size: int | None = None) -> Any:
        """The next positive or, where a ``size`` is given, negatives.

        Raises:
            ValueError: none is left.
        """
        if not self._left:
            raise ValueError("other anchors have a term than recorded; their draws cannot be replayed")
        self.num_candidates.append(len(candidates))
        self.is_candidate.append(np.isin(self._left[0], candidates))
        return self._left.popleft()

    def as_generator(self) -> np.random.Generator:
        """Itself, under the type that losses ask for."""
        return cast("np.random.Generator", self)


def key_name(key: ObjectKey) -> str:
    """How recordings call a [SEG] embedding."""
    return f"{key.dataset}_{key.video}_{key.exp_id}_{key.frame}"


def parse_key(name: str, videos: Sequence[Record]) -> ObjectKey:
    """The key of an entry called ``dataset_video_expression_frame``.

    Objects are known for the videos of the batch alone; an entry of another video can be nobody's positive and needs
    none.

    Raises:
        ValueError: the name has another form, or is of a sentence of the batch's videos whose objects are not recorded.
    """
    for video in videos:
        prefix = f"{dataset_of(video)}_{video['video']}_"
        if name.startswith(prefix):
            exp_id, _, frame = name.removeprefix(prefix).partition("_")
            return object_key(video, exp_id, frame)
    parts = name.split("_")
    if len(parts) < 4:
        raise ValueError(f"queue entry {name!r}: expected dataset_video_expression_frame")
    return ObjectKey(parts[0], "_".join(parts[1:-2]), parts[-2], parts[-1], frozenset())


def fill_queue(queue: ContrastiveQueue, step: Record, embeds: np.ndarray, videos: Sequence[Record]) -> None:
    """Push what the queue held before the step.

    Raises:
        ValueError: names and embeddings are not equally many, or see ``parse_key``.
    """
    names = step["queue_before"]
    if len(names) != len(embeds):
        raise ValueError(f"{step.where}: queue_before names {len(names)} entries, there are {len(embeds)} embeddings")
    queue.push([parse_key(name, videos) for name in names], torch.from_numpy(embeds))


def _contrastive_terms(
    case: Case, objective: GlusObjective, setup: Setup, output: GlusOutput, step: Record, arrays: Record
) -> dict[str, torch.Tensor]:
    """The losses with the recorded draws, and rows for all that belongs to the contrastive one.

    Raises:
        ValueError: the draws cannot be replayed.
    """
    queue = objective.queue
    assert queue is not None, "the step records a queue"
    fill_queue(queue, step, arrays["before"], setup.videos)
    keys = [key for keys in setup.batch.object_keys for key in keys]
    anchors = [Record(draw, f"{step.where}: draw {number}") for number, draw in enumerate(step["draws"])]
    draws = [anchor for anchor in anchors if anchor["loss"] is not None]
    if any(len(draw["negatives"]) != queue.num_negatives for draw in draws):
        raise ValueError(f"an anchor drew other than num_negatives={queue.num_negatives} negatives")
    names, losses, counts = step["queue_after"], [draw["loss"] for draw in draws], objective.counts([setup.batch])
    if any(not 0 <= entry < len(names) for draw in draws for entry in (draw["positive"], *draw["negatives"])):
        raise ValueError(f"a draw points out of the queue of {len(names)} entries")
    rng = RecordedDraws(draws)
    with observed(loss=(queue, "loss"), candidates=(queue, "candidates")) as calls:
        terms = objective(output, setup.batch, counts, rng.as_generator())
    has_term = [candidates is not None for candidates in calls["candidates"][0].result]
    case.compare("anchors", [key_name(key) for key in keys], [anchor["anchor"] for anchor in anchors])
    case.compare("anchors with a term", has_term, [anchor["loss"] is not None for anchor in anchors])
    num_recorded = [draw["num_positive_candidates"] for draw in draws]
    case.compare("number of positive candidates", rng.num_candidates[::2], num_recorded)
    for start, title in enumerate(("drawn positives are candidates", "drawn negatives are candidates")):
        case.compare(title, rng.is_candidate[start::2], np.ones_like(rng.is_candidate[start::2]))
    case.compare("number of contrastive terms", counts["contrastive"], len(draws))
    case.compare("contrastive terms", calls["loss"][0].result.detach().numpy(), losses, LOSS, np.abs(losses))
    case.compare("queue, names in order", [key_name(key) for key in queue.keys], names)
    case.compare("queue, embeddings", torch.stack(list(queue.embeds)).numpy(), arrays["after"], SEG_EMBEDDING)
    return terms


def compare_gradients(case: Case, ours: Gradients, step: Record, full: Record | None) -> None:
    """Rows for norms in total, by group and by tensor, for the tensors without gradient, and for full gradients.

    Args:
        case: gets the rows.
        ours: of the replay.
        step: ``step*.json``.
        full: ``step*_gradients.npz``, None where there is none.
    """
    norms = {name: float(value.double().norm()) for name, value in ours.items() if value is not None}
    if case.holds("tensors without gradient", step, "trainable_without_gradient"):
        recorded = set(step["trainable_without_gradient"])
        _compare_names(case, "tensors without gradient", ours.keys() - norms.keys(), recorded, len(ours))
    with case.errors_as_row("gradient norms"):
        case.compare("gradient norm, total", math.hypot(*norms.values()), step["gradient_norm_total"], GRADIENT_TOTAL)
        for group, value in step["gradient_norm_by_group"].items():
            norm = math.hypot(*(norms[name] for name in norms if group in name))
            case.compare(f"gradient norm, {group}", norm, value, GRADIENT_GROUP)
    if case.holds("tensors with gradient", step, "gradient_norm"):
        _compare_names(case, "tensors with gradient", set(norms), set(step["gradient_norm"]), len(ours))
        _compare_norms(case, norms, step["gradient_norm"], step["gradient_norm_total"])
    with case.errors_as_row("full gradients"):
        if full is None:
            case.absent("full gradients", "no file of gradients")
        else:
            _compare_values(case, ours, full)


def _compare_names(case: Case, title: str, ours: set[str], recorded: set[str], compared: int) -> None:
    wrong = sorted(ours ^ recorded)
    note = "; ".join(f"{name} {'of the replay' if name in ours else 'recorded'} alone" for name in wrong[:3])
    case.count(title, len(wrong), compared, note)


def _compare_norms(case: Case, ours: Mapping[str, float], recorded: Mapping[str, float], total: float) -> None:
    """Each tensor's norm relative to itself, or to the total where it is negligible."""
    shared = ours.keys() & recorded.keys()
    large = sorted(name for name in shared if recorded[name] > GRADIENT_NEGLIGIBLE * total)
    small = sorted(shared - set(large))
    for title, names, gate in (
        ("gradient norm, worst tensor", large, GRADIENT_TENSOR),
        ("gradient norm, worst negligible tensor (of the total)", small, GRADIENT_NOISE),
    ):
        got, want = (np.array([norms[name] for name in names]) for norms in (ours, recorded))
        worst = names[int(np.argmax(np.abs(got - want)))] if names else ""
        case.compare(title, got, want, gate, want if names is large else total, worst)


def _compare_values(case: Case, ours: Gradients, full: Record) -> None:
    """Every value of the recorded tensors, relative to the largest of its tensor."""
    got, want, scale = [], [], []
    for name, recorded in full.items():
        value = ours.get(name)
        if value is None or recorded.shape != tuple(value.shape):
            replayed = "no gradient of it" if value is None else f"one of {tuple(value.shape)}"
            raise ValueError(f"{full.where}: {name} is {recorded.shape}; the replay has {replayed}")
        got.append(value.numpy().ravel())
        want.append(recorded.ravel())
        scale.append(np.full(recorded.size, np.abs(recorded).max()))
    note = f"{len(full)} tensors, each relative to its largest value"
    ours_V, recorded_V, scale_V = (np.concatenate(part) for part in (got, want, scale))
    case.compare("full gradients", ours_V, recorded_V, GRADIENT_VALUES, scale_V, note)


class ReplayedStep(NamedTuple):
    """A forward and backward pass."""

    outputs: Record
    losses: dict[str, float]
    gradients: Gradients
    reaching: dict[str, list[float]]
    """Norms of the gradients that reach the memories, see ``forward_with_memories``; 0: none does."""


def run_step(glus: Glus, batch: Batch, objective: GlusObjective) -> ReplayedStep:
    """Forward and backward, with an eye on the memories."""
    glus.zero_grad(set_to_none=True)
    output, memories = forward_with_memories(glus, batch)
    terms = objective(output, batch, objective.counts([batch]), RecordedDraws().as_generator())
    terms["total"].backward()
    norms = {what: [_norm(tensor.grad) for tensor in tensors] for what, tensors in memories.items()}
    losses = {name: value.item() for name, value in terms.items()}
    return ReplayedStep(_outputs(output), losses, collect_gradients(glus), norms)


def _norm(gradient: torch.Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.double().norm())


def replay_detach(rows: list[Row], setup: Setup, through: Glus) -> None:
    """One step with and one without gradients through the memory: equal outputs, other gradients.

    Nothing is recorded of this; it is seen directly.

    Args:
        rows: get the rows.
        setup: the model built with ``detach: true``, and the micro-batch.
        through: the same model, built with ``detach: false``.
    """
    off, on = Case(rows, "training, detach: true"), Case(rows, "training, detach: false")
    objective = make_objective(None, setup.model.vocabulary.seg_id)
    detached, ours = (run_step(glus, setup.batch, objective) for glus in (setup.model.glus, through))
    if not detached.reaching["memory"]:
        on.absent("gradient through memories", "one query frame reads no memory")
        return
    for what, article in (("memory", "a"), ("memory attention", "the")):
        norms = detached.reaching[what]
        off.count(f"no gradient reaches {article} {what}", sum(n > 0 for n in norms), len(norms), _listed(norms))
    for what, norms in ours.reaching.items():
        on.count(f"a gradient reaches every {what}", sum(n == 0 for n in norms), len(norms), _listed(norms))
    note = "as with detach: true"
    _compare_outputs(on, ours.outputs, detached.outputs, note)
    for name, value in detached.losses.items():
        on.compare(f"loss, {name}", ours.losses[name], value, LOSS, note=note)
    _compare_gradients_differ(on, ours.gradients, detached.gradients)


def _listed(norms: Sequence[float]) -> str:
    return f"norms {', '.join(f'{norm:.1e}' for norm in norms)}"


def _compare_gradients_differ(case: Case, ours: Gradients, detached: Gradients) -> None:
    """Those of tensors that matter must not all be equal."""
    norms = {name: float(value.double().norm()) for name, value in detached.items() if value is not None}
    least = GRADIENT_NEGLIGIBLE * math.hypot(*norms.values())
    differences = {
        name: float((value - other).double().norm()) / norms[name]
        for name, value in ours.items()
        if (other := detached[name]) is not None and value is not None and norms[name] > least
    }
    most = max(differences, key=differences.__getitem__)
    unequal = sum(difference > 0 for difference in differences.values())
    note = f"{unequal} of {len(differences)} tensors differ; most, by {differences[most]:.1e} of its norm: {most}"
    case.count("gradients differ from detach: true", int(unequal == 0), 1, note)
