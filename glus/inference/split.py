"""A trained model that is to answer a whole split."""

from __future__ import annotations

from collections.abc import Sequence

from glus.config import PredictConfig, ScoreFramesConfig
from glus.inference.identity import Identity, prediction_identity
from glus.inference.predictor import VideoPredictor, load_predictor
from glus.inference.texts import check_lengths
from glus.types import Expression


def load_for_split(
    config: PredictConfig | ScoreFramesConfig, expressions: Sequence[Expression], key_frames: str | None = None
) -> tuple[VideoPredictor, Identity]:
    """The model, which can read every sentence of the split, and what decides its answers.

    Args:
        config: of the run.
        expressions: all of the split.
        key_frames: the file of key frames, if the answers start from them.

    Raises:
        FileNotFoundError: a file of the model is missing.
        ValueError: weights, config or settings do not fit, or a sentence is too long.
    """
    predictor, model = load_predictor(config.weights, config.inference, config.allow_cpu)
    check_lengths(predictor, ((expression.name, expression.text) for expression in expressions))
    return predictor, prediction_identity(
        config.dataset, expressions, model.vocabulary.folder, model.config, key_frames
    )
