"""Pictures of all shapes, as CLIP and as SAM2 are given them."""

from __future__ import annotations

import re

import numpy as np
import torch

from glus.config import FuserGamma
from glus.data.frames import read_image
from glus.models.glus import Glus
from glus.models.mllm.llava import clip_crop
from tools.parity import gates
from tools.parity.fixture import Arrays, Fixture
from tools.parity.models import Models
from tools.parity.observe import observed
from tools.parity.report import Case, Report

_CLIP = re.compile(r"clip_(.+)")
_SAM2 = re.compile(r"sam2_sub(\d+)_(.+)")
SAM2_ROW, SAM2_COLUMN = 5, 3
"""First row and column that is recorded of SAM2's input."""


def clip_input(glus: Glus, picture_HW3: np.ndarray) -> np.ndarray:
    """What reaches the vision tower when the model sees a picture: (3, s, s) float32."""
    crop = torch.from_numpy(clip_crop(picture_HW3, glus.mllm.clip.image_size)).permute(2, 0, 1)
    with observed(tower=(glus.mllm.clip.vision_model.embeddings, "forward")) as calls, torch.inference_mode():
        glus.mllm.clip(crop[None])
    return calls["tower"][0].arguments[0][0].numpy()


def replay_preprocess(report: Report, fixture: Fixture, models: Models) -> None:
    """Every picture of ``preprocess/`` and both its inputs.

    Args:
        report: gets the rows.
        fixture: what to replay.
        models: the recorded model, for the size of its inputs.
    """
    folder = fixture.folder / "preprocess"
    if not folder.is_dir():
        report.case("preprocess").absent("all pictures", "the folder has no preprocess/")
        return
    with report.case("preprocess").errors_as_row("inputs.npz"):
        arrays = Arrays(folder / "inputs.npz")
        glus = models.frozen(FuserGamma.checkpoint).glus
        pictures = {path.stem: path for path in sorted(folder.glob("*.png"))}
        recorded = {name: _picture(name) for name in arrays.names}
        for stem in sorted({*pictures, *filter(None, recorded.values())}):
            case = report.case(f"preprocess {stem}")
            with case.errors_as_row("picture"):
                pixels = read_image(folder / f"{stem}.png", f"preprocess/{stem}.png")
                names = [name for name, of in recorded.items() if of == stem]
                _compare_picture(case, glus, pixels, arrays, names)
        for name in [name for name, of in recorded.items() if of is None]:
            report.case("preprocess").error(name, "recorded, but there is nothing to compare it with")


def _picture(array: str) -> str | None:
    """Name of the picture that an array of ``inputs.npz`` was made from."""
    if match := _SAM2.fullmatch(array):
        return match[2]
    match = _CLIP.fullmatch(array)
    return match[1] if match else None


def _compare_picture(case: Case, glus: Glus, pixels: np.ndarray, arrays: Arrays, names: list[str]) -> None:
    size = "x".join(map(str, pixels.shape[:2]))
    for name in names:
        match = _SAM2.fullmatch(name)
        if match:
            step = int(match[1])
            ours = glus.segmenter.prepare_frames(torch.from_numpy(pixels)[None])[0]
            sub = ours[:, SAM2_ROW::step, SAM2_COLUMN::step].numpy()
            case.close("input of SAM2", sub, arrays[name], gates.SAM2_INPUT, note=size)
        else:
            case.close("input of CLIP", clip_input(glus, pixels), arrays[name], gates.CLIP_INPUT, note=size)
    for title, pattern in (("input of CLIP", _CLIP), ("input of SAM2", _SAM2)):
        if not any(pattern.fullmatch(name) for name in names):
            case.absent(title, "not in inputs.npz")
