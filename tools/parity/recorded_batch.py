"""The recorded micro-batch: tokenized, cropped, collated as training does it, and compared; its contrastive queue."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from glus.batch import Batch, TrainSample
from glus.data.chat.llava import ASSISTANT
from glus.data.chat.tree import separate_rows, unpack_conversations
from glus.data.dataset import collate
from glus.data.sampling import ANSWERS, QUESTIONS, Turn, clean_expression
from glus.losses.contrastive import ContrastiveQueue
from glus.models.pretrained import LoadedModel
from glus.types import ObjectKey
from tools.parity.comparison import Case, Record, read_arrays, read_records, unpack
from tools.parity.network import clip_crops, make_chat
from tools.parity.replay_inference import expand_images

ANSWER = re.compile(rf"{ASSISTANT} (.*?)</s>")


@dataclass(frozen=True)
class Setup:
    """A model in training mode and the micro-batch."""

    folder: Path
    model: LoadedModel
    videos: list[Record]
    """The entries of ``batch.json``."""
    batch: Batch


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
    masks = unpack(packed_masks, frames_THW3.shape[2], f"target masks of {name}")
    expected = (len(exp_ids), len(query), *frames_THW3.shape[1:3])
    if masks.shape != expected:
        raise ValueError(f"batch.npz: target masks of {name} are {masks.shape}, expected {expected}")
    tokenizer, pairs = make_chat(model), zip(read_turns(video), video["str_ids"], strict=True)
    crops = clip_crops(model.glus, frames_THW3[[*video["context_index"], *query]])
    return TrainSample(
        context_pixels=crops[:num_context],
        query_pixels=crops[num_context:],
        query_frames=frames_THW3[query],
        conversations=[tokenizer.train(turns, num_context, str_id) for turns, str_id in pairs],
        target_masks=list(masks.astype(np.uint8)),
        object_keys=[[object_key(video, exp_id, frame) for frame in video["frames"]] for exp_id in exp_ids],
        names=video["str_ids"],
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
        turns.append(list(map(Turn, asked, answers)))
    return turns


def object_key(video: Record, exp_id: str, frame: str) -> ObjectKey:
    """What a [SEG] stands for.

    Raises:
        ValueError: the objects of the sentence are not recorded.
    """
    return ObjectKey(dataset_of(video), video["video"], exp_id, frame, frozenset(video.part("objects")[exp_id]))


def compare_batch(case: Case, setup: Setup) -> None:
    """Token ids, the labels that count, and the wording that they were made of."""
    vocabulary, num_tokens = setup.model.vocabulary, make_chat(setup.model).tokens_per_frame
    arrays = read_arrays(setup.folder / "batch.npz")
    conversations = unpack_conversations(setup.batch.rows)
    with case.row("token ids") as row:
        ids_NL = separate_rows(conversations, vocabulary.pad_id).input_ids_BL.numpy()
        row.compare(ids_NL, np.stack([expand_images(ids, ids, num_tokens) for ids in arrays["input_ids"]]))
    with case.row("labels at [SEG]") as row:
        pairs = zip(arrays["labels"], arrays["input_ids"], strict=True)
        recorded = [np.flatnonzero(expand_images(*pair, num_tokens) == vocabulary.seg_id) for pair in pairs]
        ours = [conversation.seg_positions + 1 for conversation in conversations]
        row.compare(np.stack(ours), np.stack(recorded))
    with case.row("questions and answers are of our templates") as row:
        drawn, strange = 0, []
        for video in setup.videos:
            for text, turns in zip(video["texts"], read_turns(video), strict=True):
                cleaned = clean_expression(text, strip=True)
                known = [question.format(expression=cleaned) for question in QUESTIONS]
                strange += [t for t in turns if t.answer not in ANSWERS or t.question not in known]
                drawn += len(turns)
        row.count(len(strange), drawn, str(strange[:1] or ""))


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
            return object_key(video, *name.removeprefix(prefix).split("_", 1))
    match = re.fullmatch("([^_]+)_(.+)_([^_]+)_([^_]+)", name)
    if not match:
        raise ValueError(f"queue entry {name!r}: expected dataset_video_expression_frame")
    return ObjectKey(match[1], match[2], match[3], match[4], frozenset())


def fill_queue(queue: ContrastiveQueue, step: Record, embeds: np.ndarray, videos: Sequence[Record]) -> None:
    """Push what the queue held before the step.

    Raises:
        ValueError: names and embeddings are not equally many, or see ``parse_key``.
    """
    names = step["queue_before"]
    if len(names) != len(embeds):
        raise ValueError(f"{step.where}: queue_before names {len(names)} entries, there are {len(embeds)} embeddings")
    queue.push([parse_key(name, videos) for name in names], torch.from_numpy(embeds))
