"""What is known about a published result that a config is meant to give."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from glus.config.loading import require


@dataclass
class RecipeConfig:
    """One row of the paper's tables; nothing here changes what is trained."""

    row: str = MISSING
    """How the table calls it."""
    source: str = MISSING
    """Where the expected score stands."""
    expected: dict[str, float | None] = field(default_factory=dict)
    """Split -> J&F in percent; null: not published."""
    batch_source: str = "micro-batch 2 and 10 accumulations in the released train_ds.py, 4 GPUs by a secondary source"
    """Where ``trainer.global_batch_size`` comes from."""
    gpu_hours: float = MISSING
    """On A100."""
    gpu_hours_source: str = MISSING
    """Where they come from."""
    key_frames: bool = False
    """The expected score was reached with the authors' key frames."""

    def __post_init__(self) -> None:
        for split, score in self.expected.items():
            require(score is None or 0 < score < 100, f"recipe.expected.{split}", "J&F in percent, or null", score)
