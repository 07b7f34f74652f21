"""The recorded micro-batch, made as training makes its batches."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glus.batch import Batch, TrainSample
from glus.data.chat import wording as prompts
from glus.data.chat.llava import LlavaChat
from glus.data.chat.tree import unpack_conversations
from glus.data.loader import collate, pad_conversations
from glus.models.mllm.llava import clip_crop
from glus.models.pretrained import LoadedModel
from glus.types import ObjectKey
from tools.parity.arrays import expand_images
from tools.parity.fixture import Arrays, Record, read_records, unpack
from tools.parity.report import Case

_ANSWER = re.compile(rf"{prompts.ASSISTANT} (.*?)</s>")


@dataclass(frozen=True)
class Video:
    """A recorded video of the micro-batch with its drawn frames and sentences."""

    dataset: str
    name: str
    context: list[int]
    query: list[int]
    exp_ids: list[str]
    texts: list[str]
    """As written in the dataset."""
    turns: list[list[prompts.Turn]]
    """The questions and answers that were drawn, one list per sentence."""
    frames: list[str]
    """Names of the query frames."""
    objects: dict[str, frozenset[int]]
    """Of every sentence of the video, drawn or not."""

    def key(self, exp_id: str, frame: str) -> ObjectKey:
        """What a [SEG] stands for.

        Raises:
            ValueError: the objects of the sentence are not recorded.
        """
        if exp_id not in self.objects:
            raise ValueError(f"batch.json: video {self.name} has no objects of sentence {exp_id}")
        return ObjectKey(self.dataset, self.name, exp_id, frame, self.objects[exp_id])


def read_videos(folder: Path) -> list[Video]:
    """``batch.json``.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: a field is missing or of another type, or fields contradict each other.
    """
    return [_video(entry) for entry in read_records(folder / "batch.json")]


def _video(entry: Record) -> Video:
    name, exp_ids = entry.get("video", str), entry.get("expressions", list)
    datasets = {
        str_id.removesuffix(f"_{name}_{exp_id}")
        for str_id, exp_id in zip(entry.get("str_ids", list), exp_ids, strict=True)
    }
    if len(datasets) != 1:
        raise ValueError(f"{entry.where}: str_ids are not dataset_video_expression of one dataset")
    return Video(
        dataset=datasets.pop(),
        name=name,
        context=entry.get("context_index", list),
        query=entry.get("query_index", list),
        exp_ids=exp_ids,
        texts=entry.get("texts", list),
        turns=_turns(entry),
        frames=entry.get("frames", list),
        objects={exp_id: frozenset(ids) for exp_id, ids in entry.get("objects", dict).items()},
    )


def _turns(entry: Record) -> list[list[prompts.Turn]]:
    """Questions without the image's line, answers cut out of the conversations."""
    turns = []
    for questions, text in zip(entry.get("questions", list), entry.get("conversations", list), strict=True):
        answers = _ANSWER.findall(text)
        if len(answers) != len(questions):
            raise ValueError(f"{entry.where}: {len(answers)} answers to {len(questions)} questions in {text!r}")
        asked = [question.partition("\n")[2] for question in questions]
        turns.append([prompts.Turn(*pair) for pair in zip(asked, answers, strict=True)])
    return turns


def make_batch(folder: Path, videos: list[Video], model: LoadedModel) -> Batch:
    """Tokenize, crop and collate the recorded videos, sentences and masks.

    Args:
        folder: holds ``batch.npz`` and ``videos.npz``.
        videos: of ``batch.json``.
        model: its vocabulary, tokens per frame and size of CLIP's input.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: what they hold does not fit together.
    """
    masks, pixels = Arrays(folder / "batch.npz"), Arrays(folder / "videos.npz")
    samples = [
        _sample(video, pixels[video.name], masks[f"target_masks_{number}"], model)
        for number, video in enumerate(videos)
    ]
    return collate(samples, model.vocabulary.pad_id)


def _sample(video: Video, frames_THW3: np.ndarray, packed_masks: np.ndarray, model: LoadedModel) -> TrainSample:
    tokenizer = LlavaChat(model.vocabulary, model.glus.mllm.tokens_per_frame)
    size = model.glus.mllm.clip.image_size
    names = [f"{video.dataset}/{video.name}/{exp_id}" for exp_id in video.exp_ids]
    masks = unpack(packed_masks, frames_THW3.shape[2], f"target masks of {video.name}")
    if masks.shape != (len(names), len(video.query), *frames_THW3.shape[1:3]):
        raise ValueError(
            f"batch.npz: target masks of {video.name} are {masks.shape}; it has {len(names)} sentences, "
            f"{len(video.query)} query frames and {frames_THW3.shape} pixels"
        )
    crops = [clip_crop(frames_THW3[frame], size) for frame in (*video.context, *video.query)]
    return TrainSample(
        context_pixels=np.stack(crops)[: len(video.context)],
        query_pixels=np.stack(crops)[len(video.context) :],
        query_frames=frames_THW3[video.query],
        conversations=[
            tokenizer.train(turns, len(video.context), name) for turns, name in zip(video.turns, names, strict=True)
        ],
        target_masks=list(masks.astype(np.uint8)),
        object_keys=[[video.key(exp_id, frame) for frame in video.frames] for exp_id in video.exp_ids],
        names=names,
    )


def compare_batch(case: Case, videos: list[Video], batch: Batch, arrays: Arrays, model: LoadedModel) -> None:
    """Token ids, the labels that count, and the wording that they were made of.

    Args:
        case: gets the rows.
        videos: of ``batch.json``.
        batch: the replay.
        arrays: ``batch.npz``.
        model: its vocabulary and tokens per frame.
    """
    num_tokens = model.glus.mllm.tokens_per_frame
    ids_NL, _, positions_NQ = pad_conversations(unpack_conversations(batch), model.vocabulary.pad_id)
    with case.errors_as_row("token ids"):
        ids = [expand_images(row, row, num_tokens) for row in arrays["input_ids"]]
        case.equal("token ids", ids_NL.numpy(), np.stack(ids))
    with case.errors_as_row("labels at [SEG]"):
        rows = zip(arrays["labels"], arrays["input_ids"], strict=True)
        labels = [expand_images(row, ids, num_tokens) for row, ids in rows]
        recorded = [np.flatnonzero(row == model.vocabulary.seg_id) for row in labels]
        case.equal("labels at [SEG]", positions_NQ.numpy() + 1, np.stack(recorded))
    with case.errors_as_row("wording"):
        drawn = [
            (prompts.clean_expression(text, strip=True), turn)
            for video in videos
            for text, turns in zip(video.texts, video.turns, strict=True)
            for turn in turns
        ]
        ours = [
            turn.answer in prompts.ANSWERS
            and turn.question in [question.format(expression=text) for question in prompts.QUESTIONS]
            for text, turn in drawn
        ]
        strange = [turn for known, (_, turn) in zip(ours, drawn, strict=True) if not known]
        case.differing("questions and answers are of our templates", len(strange), len(drawn), str(strange[:1] or ""))
