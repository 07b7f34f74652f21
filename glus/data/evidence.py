"""Which frames of a video can be decided at all, where it is known when what a sentence says can be seen (Shapes).

A frame is decided if its prompt shows a frame with the evidence, or if memory carries a mask to it that was decided
earlier in the same pass. What is not decided is a guess between look-alikes, whatever the model; so this count is the
ceiling of a variant, and tells which part of the method it lacks.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glus.config import DatasetConfig, FramesConfig, Window, load_config
from glus.data.sampling import context_indices_eval, query_window
from glus.files import read_object


@dataclass(frozen=True)
class Variant:
    """What of the method a model has, as far as frames are concerned."""

    frames: FramesConfig
    has_memory: bool
    has_key_frames: bool = False
    """It chooses the frame that it starts from; the best one is taken as chosen."""


def variant_of(folder: Path) -> Variant | None:
    """What made a folder of predictions, by its ``predict.json``; None where nothing is known of it, or where another
    window than the sliding one was used.

    Raises:
        ValueError: that file is damaged.
    """
    file = folder / "predict.json"
    if not file.is_file():
        return None
    try:
        identity = read_object(file)["identity"]
        if identity["inference"]["window"] != Window.sliding.value:
            return None
        frames = load_config(FramesConfig, identity["frames"])
        return Variant(frames, identity["model"]["memory"]["enabled"], identity["key_frames"] is not None)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: it does not say what predicted ({error!r})") from error


def decided_frames(
    evidence: Collection[int], num_frames: int, variant: Variant, start: int | None = None
) -> np.ndarray:
    """The frames of a video that a variant can decide.

    Args:
        evidence: frames that show what the sentence says.
        num_frames: T.
        variant: with sliding windows.
        start: the frame that it starts from, where it does not choose; None: the first.

    Returns:
        (T,) bool.
    """
    starts = range(num_frames) if variant.has_key_frames and start is None else (start or 0,)
    each = [_decided_from(start, set(evidence), num_frames, variant) for start in starts]
    return max(each, key=lambda decided_T: int(decided_T.sum()))


def _decided_from(start: int, evidence: set[int], num_frames: int, variant: Variant) -> np.ndarray:
    """Up from a frame, then down from it, as key frames are followed."""
    decided_T = np.zeros(num_frames, bool)
    context = context_indices_eval(num_frames, variant.frames.num_context)
    for order in (range(start, num_frames), range(start, -1, -1)):
        is_held = False
        for step, frame in enumerate(order):
            query = query_window(order, step, variant.frames.num_query, variant.frames.query_sampling)
            is_shown = not evidence.isdisjoint([*context, *query])
            is_held = is_shown or (is_held and variant.has_memory)
            decided_T[frame] |= is_held
    return decided_T


def read_evidence(dataset: DatasetConfig) -> dict[tuple[str, str], tuple[int, ...] | None]:
    """(video, exp_id) -> frames that show what the sentence says; None where no single frame does.

    Only sentences that one of several look-alikes is named by are there; empty for a dataset without such a file.

    Raises:
        FileNotFoundError: ``dataset.evidence`` names no file.
        ValueError: it is damaged.
    """
    if dataset.evidence is None:
        return {}
    content = read_object(Path(dataset.root) / dataset.split / dataset.evidence)
    return {
        (video, exp_id): None if frames is None else tuple(frames)
        for video, sentences in content.items()
        for exp_id, frames in sentences.items()
    }
