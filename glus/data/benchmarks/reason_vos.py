"""ReasonVOS: expressions as a list, whose ids repeat for the objects of a video.

``{"videos": {video: {"source": "MOSE", "frames": [...], "expressions": [{"obj_id": "1", "exp_id": 0, "exp_text": ...,
"is_sent": true}]}}}``. What identifies an expression is (source, video, object, exp_id); the released GLUS and others
take fewer of these and mix expressions up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glus.config import DatasetConfig
from glus.data.benchmarks.json_access import field, frame_names, read_videos, whole_number
from glus.types import Expression


def read_reason_vos(dataset: DatasetConfig, path: Path) -> list[Expression]:
    """Expression ids become ``<obj_id>_<exp_id>``; predictions lie in ``<source>_<video>_<obj_id>/<exp_id>``.

    Raises:
        ValueError: an object of a video has an ``exp_id`` twice, or a field is missing.
    """
    expressions: dict[str, Expression] = {}
    for video, content in read_videos(path).items():
        where = f"{path}: videos[{video!r}]"
        source, frames = field(content, "source", str, where), frame_names(content, where)
        for index, value in enumerate(field(content, "expressions", list, where)):
            expression = _expression(dataset, video, source, frames, value, f"{where}.expressions[{index}]")
            if expressions.setdefault(expression.folder, expression) is not expression:
                raise ValueError(f"{where}.expressions[{index}]: {expression.folder} stands there twice")
    return list(expressions.values())


def _expression(
    dataset: DatasetConfig, video: str, source: str, frames: tuple[str, ...], value: Any, where: str
) -> Expression:
    text = field(value, "exp_text", str, where)
    object_id, number = whole_number(value, "obj_id", where), whole_number(value, "exp_id", where)
    annotation = f"{source}_{video}_{value['obj_id']}"  # as spelled: it is the name of a folder
    return Expression(
        dataset.name, video, f"{object_id}_{number}", text, frames, (object_id,), (annotation,),
        folder=f"{annotation}/{value['exp_id']}",
    )  # fmt: skip
