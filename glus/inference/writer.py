"""Predictions on disk: an expression's folder is complete or absent, and a folder of predictions is of one model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from glus.config import DatasetConfig, ModelFolderConfig
from glus.structures import Expression

IDENTITY_FILE = "predict.json"
"""In a folder of predictions: what made them."""
ANSWERS_FILE = "answers.json"
"""In the folder of an expression: one ``Answer`` per frame."""

Answer = dict[str, Any]
"""``frame`` (its name), ``area`` (share of the frame that the mask covers), ``score`` (probability of [SEG]) and
``has_seg`` (whether [SEG] was the most likely token)."""


class MaskFolder:
    """The masks of one sentence: leaving its ``with`` block makes the folder appear, complete, under its name.

    Until then everything lies in a hidden folder beside it, which an error deletes, and after a kill the next attempt.
    Holds against a killed process, not against a power cut: nothing is forced to disk.

    Args:
        path: the folder that is to appear; must not exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self.answers: list[Answer] = []
        self._temporary = hidden_sibling(path)
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)

    def write(self, frame: str, mask_HW: np.ndarray, score: float, has_seg: bool) -> None:
        """Save ``<frame>.png``, 8-bit grey, 0 or 255.

        Args:
            frame: name of the frame.
            mask_HW: bool, at the frame's size.
            score: probability of [SEG].
            has_seg: whether the model answered with [SEG].
        """
        Image.fromarray(mask_HW.astype(np.uint8) * 255).save(self._temporary / f"{frame}.png")
        area = round(float(mask_HW.mean()), 6)
        self.answers.append({"frame": frame, "area": area, "score": round(float(score), 6), "has_seg": bool(has_seg)})

    def __enter__(self) -> MaskFolder:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            shutil.rmtree(self._temporary)
            return
        lines = ",\n".join(json.dumps(answer) for answer in self.answers)
        (self._temporary / ANSWERS_FILE).write_text(f"[\n{lines}\n]\n")
        os.replace(self._temporary, self.path)


class PredictionWriter:
    """The folder of one model's predictions on one split: ``<folder>/<video>/<exp_id>/<frame>.png``.

    Several processes may hold the same folder, as long as no expression is written by two at once.

    Args:
        folder: a new or empty folder, or one that the same model and settings have begun.
        identity: everything that decides the masks, see ``prediction_identity``.
        about: further information that is kept beside the identity (command, commit, versions).

    Raises:
        ValueError: the folder holds something else, or predictions of another identity.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], about: dict[str, Any]):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / IDENTITY_FILE
        entries = [entry.name for entry in self.folder.iterdir() if not entry.name.startswith(".")]
        if file.is_file():
            self._check(json.loads(file.read_text())["identity"], identity)
        elif entries:
            raise ValueError(
                f"output_dir={self.folder} holds {sorted(entries)[0]!r} but no {IDENTITY_FILE}, so it is no folder of "
                "predictions that could be continued; choose a new or empty folder"
            )
        else:
            _replace_text(file, json.dumps({"identity": identity, **about}, indent=2) + "\n")

    def _check(self, there: dict[str, Any], now: dict[str, Any]) -> None:
        old, new = (dict(_flatten(identity)) for identity in (there, now))
        different = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if different:
            key = different[0]
            raise ValueError(
                f"output_dir={self.folder} holds predictions made otherwise: {', '.join(different)} "
                f"({key}: {old.get(key)} there, {new.get(key)} now); "
                "choose another output_dir, or delete this one to predict anew"
            )

    def path(self, expression: Expression) -> Path:
        """The expression's folder; video ids may contain slashes."""
        return self.folder / expression.prediction_dir

    def is_done(self, expression: Expression) -> bool:
        """Whether all its frames are written."""
        return self.path(expression).is_dir()

    def open(self, expression: Expression) -> MaskFolder:
        """Begin an expression that is not done; what a killed run left of it is deleted."""
        return MaskFolder(self.path(expression))

    def answers(self, expression: Expression) -> list[Answer]:
        """What was answered in each frame of an expression that is done."""
        return json.loads((self.path(expression) / ANSWERS_FILE).read_text())


def prediction_identity(
    dataset: DatasetConfig, expressions: Iterable[Expression], model_folder: Path, settings: ModelFolderConfig
) -> dict[str, Any]:
    """What decides the masks, as nested JSON values; two equal identities give equal predictions.

    Args:
        dataset: its name and split; where it lies does not matter.
        expressions: all of the split; their hash tells a generated benchmark from one generated anew.
        model_folder: the contents of its weights and vocabulary count, not its place.
        settings: the model folder's, with this run's overrides and precision.
    """
    values: Any = OmegaConf.to_container(OmegaConf.structured(settings), enum_to_str=True)
    for irrelevant in ("tokenizer", "lora_dropout"):
        del values["model"]["llm"][irrelevant]
    files = sorted([*model_folder.glob("*.safetensors"), *model_folder.glob("tokenizer.model")])
    files.append(model_folder / "added_tokens.json")
    sentences = "\n".join(json.dumps([e.video, e.exp_id, e.text, e.frames]) for e in expressions)
    return {
        "dataset": {
            "name": dataset.name,
            "split": dataset.split,
            "expressions": hashlib.sha256(sentences.encode()).hexdigest(),
        },
        "weights": {file.name: _sha256(file) for file in files if file.is_file()},
        **values,
    }


@contextmanager
def whole_folder(path: Path, overwrite: bool, mark: str) -> Iterator[Path]:
    """A temporary folder to fill, which takes the name ``path`` at the end, and is deleted on an error.

    Args:
        path: a new or empty folder; with ``overwrite`` also one that was made in the same way, which is replaced.
        overwrite: allow that.
        mark: name of a file that shows that a folder was made in the same way.

    Raises:
        ValueError: ``path`` is a file, or a folder that must not be replaced.
    """
    path = path.absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"output {path} is a file; expected the name of a folder")
    if path.is_dir() and any(path.iterdir()):
        if not (path / mark).is_file():
            raise ValueError(
                f"output {path} holds files, and no {mark} of an earlier run; choose a new or empty folder"
            )
        if not overwrite:
            raise ValueError(f"output {path} holds the result of an earlier run; choose another, or add --overwrite")
    temporary = hidden_sibling(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary)
        raise
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(temporary, path)


def hidden_sibling(path: Path) -> Path:
    """Where ``path`` is prepared before it gets its name."""
    return path.with_name(f".{path.name}.tmp")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; processes that do so at the same time do not disturb each other."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries under dotted keys."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
