"""Where a run goes on: the newest complete checkpoint, if its config gives the same result."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from glus.config import TrainConfig, load_config

STATE_FILE = "training.json"
SAME_RESULT = (
    *("hardware", "hardware.*", "data.feature_cache.*", "allow_cpu"),
    *("output_dir", "paths.*", "valid", "valid.*", "inference.*", "data.num_workers", "data.mixture.*.dataset.root"),
    *("trainer.micro_batch_size", "trainer.zero_stage", "trainer.gradient_checkpointing", "trainer.offload"),
    "trainer.compile",
    *("trainer.log_every", "trainer.eval_every", "trainer.eval_videos", "trainer.wandb.*"),
    *("trainer.save_every", "trainer.save_every_minutes", "trainer.keep_*", "trainer.resume"),
    *("trainer.on_nonfinite", "trainer.max_skips_in_row", "trainer.spike_ratio", "trainer.hang_timeout_minutes"),
)
"""Config keys that may change between two parts of a run: where things lie, and how the same steps are computed (the
third and fourth line change rounding, and what depends on the rank: dropout and the contrastive queue)."""


def plain_config(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON knows it."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]  # its keys are names


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run that training can go on from, by step, the newest last."""
    found = [path.parent for path in run.glob(f"checkpoints/step_*/{STATE_FILE}") if path.parent.suffix != ".tmp"]
    return sorted(found, key=_step)


def superfluous(run: Path, keep_last: int, keep_best: bool) -> list[Path]:
    """Checkpoints that are not to be kept: all but the newest and, if asked for, the best, of equals the earliest."""
    found = list_checkpoints(run)
    keep = set(found[-keep_last:])
    scores = {folder: read_state(folder)["state"]["score"] for folder in found} if keep_best else {}
    scored = [folder for folder in found if scores.get(folder) is not None]
    keep |= {max(scored, key=lambda folder: scores[folder])} if scored else set()
    return [folder for folder in found if folder not in keep]


def read_state(folder: Path) -> dict[str, Any]:
    """``training.json`` of a checkpoint.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        content = json.loads((folder / STATE_FILE).read_text())
        return {name: content[name] for name in ("state", "updates", "world_size", "config")}
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{folder} is no checkpoint to go on from: {STATE_FILE}: {error!r}") from error


def find_start(config: TrainConfig) -> Path | None:
    """The checkpoint that ``trainer.resume`` asks to go on from; None: begin anew.

    Raises:
        FileNotFoundError: a path that holds no checkpoint.
        ValueError: ``resume=never`` beside checkpoints, a path to an older one of the same run, or a checkpoint whose
            config gives other results; the message names the keys.
    """
    run, resume = Path(config.output_dir), config.trainer.resume
    own = list_checkpoints(run)
    if resume == "never" and own:
        raise ValueError(
            f"output_dir={run} has checkpoints up to {own[-1].name}, but trainer.resume=never: "
            "choose another output_dir, remove them, or set trainer.resume=auto to go on"
        )
    if resume in ("auto", "never") or (own and Path(resume).resolve() == run.resolve()):
        start = own[-1] if own else None
    else:
        start = _named_start(Path(resume), own)
    if start is not None:
        _check_config(start, config)
    return start


def _named_start(path: Path, own: list[Path]) -> Path:
    found = [path] if (path / STATE_FILE).is_file() else list_checkpoints(path)
    if not found:
        raise FileNotFoundError(
            f"trainer.resume={path}: neither auto, never, nor a checkpoint with {STATE_FILE}, nor a run that has one"
        )
    is_own = found[-1].resolve() in [folder.resolve() for folder in own]
    newer = [folder.name for folder in own if _step(folder) > _step(found[-1])]
    if is_own and newer:
        raise ValueError(f"trainer.resume={path}: remove the newer checkpoints of this run first: {', '.join(newer)}")
    return own[-1] if own else found[-1]


def _check_config(folder: Path, config: TrainConfig) -> None:
    saved = load_config(TrainConfig, OmegaConf.create(read_state(folder)["config"]))  # fills in fields added since
    before, now = _flat(plain_config(saved)), _flat(plain_config(config))
    differing = [
        f"{key}={now.get(key)!r} (was {before.get(key)!r})"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not any(fnmatchcase(key, pattern) for pattern in SAME_RESULT)
    ]
    if differing:
        raise ValueError(
            f"{folder} was made under a config that gives other results: {'; '.join(differing)}. "
            "Restore these values to go on, or choose another output_dir to begin anew"
        )


def _flat(value: object, key: str = "") -> dict[str, object]:
    """Leaves by dotted key."""
    if not isinstance(value, dict):
        return {key: value}
    leaves: dict[str, object] = {}
    for name, inner in value.items():
        leaves |= _flat(inner, f"{key}.{name}" if key else str(name))
    return leaves


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
