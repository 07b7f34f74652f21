"""Train GLUS.

    python scripts/train.py experiment=shapes
    torchrun --nproc_per_node=4 scripts/train.py experiment=glus_s
    deepspeed scripts/train.py experiment=glus_s

Everything is an override (``frames.num_context=8``); the run folder holds the resolved config, metrics.jsonl and
checkpoints.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from glus import distributed
from glus.config import ModelFolderConfig, TrainConfig, load_config
from glus.data.build import build_loader, build_mixture
from glus.data.tokenization import ConversationTokenizer
from glus.evaluation.metrics import boundary_accuracy, region_similarity
from glus.inference.predictor import VideoPredictor
from glus.inference.validation import Validation
from glus.log import MetricsLog, setup_logging, write_run_folder
from glus.losses.build import build_objective
from glus.models.build import build_glus, save_model
from glus.tokens import Vocabulary
from glus.train.engine import Engine, init_distributed
from glus.train.trainer import Trainer, accumulation_steps, micro_batches


def train(config: TrainConfig) -> None:
    """Build every part, then fit."""
    init_distributed()
    setup_logging()
    rank, world_size = distributed.rank(), distributed.world_size()
    trainer, run = config.trainer, Path(config.output_dir)
    accumulation = accumulation_steps(trainer.global_batch_size, trainer.micro_batch_size, world_size)
    if rank == 0:
        write_run_folder(run, config)
    distributed.barrier()

    torch.manual_seed(trainer.seed)
    vocabulary = Vocabulary(config.model.llm.tokenizer)
    glus = build_glus(config.model)
    if trainer.gradient_checkpointing:
        glus.language.checkpoint_gradients()
    tokenizer = ConversationTokenizer(vocabulary, glus.tokens_per_frame)
    mixture = build_mixture(config.data, config.frames, tokenizer, glus.clip.image_size, trainer.seed)
    numbers = micro_batches(0, trainer.steps, trainer.global_batch_size, trainer.micro_batch_size, rank, world_size)
    batches = build_loader(mixture, numbers, config.data.num_workers, vocabulary.pad_id)
    objective = build_objective(config.loss, vocabulary.seg_id)
    engine = Engine(glus.train(), trainer, accumulation)
    folder_config = ModelFolderConfig(config.model, config.frames, config.inference)

    def save(step: int) -> Path:
        folder = run / "checkpoints" / f"step_{step}"
        tensors = engine.trained_tensors()
        if rank == 0:
            save_model(folder, tensors, folder_config, vocabulary, complete=False, metadata={"step": str(step)})
        distributed.barrier()
        return folder

    validation = None
    if config.valid:
        predictor = VideoPredictor(glus, tokenizer, config.frames, config.inference)
        metrics = {"J": region_similarity, "F": boundary_accuracy}
        validation = Validation(predictor, config.valid, metrics, trainer.eval_videos)
    Trainer(
        engine,
        objective,
        batches,
        steps=trainer.steps,
        accumulation=accumulation,
        seed=trainer.seed,
        metrics=MetricsLog(run, trainer.wandb, is_main=rank == 0),
        evaluate=validation,
        save=save,
        log_every=trainer.log_every,
        eval_every=trainer.eval_every,
        save_every=trainer.save_every,
    ).fit()


ConfigStore.instance().store("schema", TrainConfig)


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Entry point: typed config, one clear message for what a user can mend."""
    try:
        train(load_config(TrainConfig, cfg))
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    # The deepspeed launcher adds this flag, which Hydra does not know; the number is in LOCAL_RANK as well.
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank=")]
    main()
