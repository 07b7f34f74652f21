"""One optimizer step under any launcher; rank 0 writes its losses and full gradients (run by test_equivalence)."""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed  # noqa: TID251  # reads gradients out of its shards, which the product has no use for
import torch
from omegaconf import OmegaConf

from glus import distributed
from glus.config import TrainConfig, WandbConfig, load_config
from glus.data.chat.llava import LlavaChat
from glus.data.loader import build_loader, build_mixture
from glus.log import MetricsLog
from glus.losses.objective import build_objective
from glus.models.pretrained import build_glus
from glus.tokens import Vocabulary
from glus.train.checkpoint import Checkpoints, RunState
from glus.train.engine import Engine, init_distributed, leave_process_group
from glus.train.trainer import Trainer, accumulation_steps, micro_batches


class RecordingEngine(Engine):
    """Keeps the whole gradients of the last micro-batch's backward pass, before the update consumes them."""

    gradients: dict[str, torch.Tensor]

    def step(self) -> None:
        self.gradients = {
            name: deepspeed.utils.safe_get_full_grad(parameter).detach().cpu().clone()
            for name, parameter in self.trained.items()
            if self._engine.is_gradient_accumulation_boundary()
        }
        super().step()


def main(config_file: str, output: str) -> None:
    init_distributed(timeout_minutes=5)
    config = load_config(TrainConfig, OmegaConf.load(config_file))
    trainer, rank, world = config.trainer, distributed.rank(), distributed.world_size()
    torch.manual_seed(trainer.seed)
    vocabulary = Vocabulary(config.model.llm.tokenizer)
    glus = build_glus(config.model)
    tokenizer = LlavaChat(vocabulary, glus.mllm.tokens_per_frame)
    mixture = build_mixture(config.data, config.frames, tokenizer, glus.mllm.prepare, trainer.seed)
    accumulation = accumulation_steps(trainer.global_batch_size, trainer.micro_batch_size, world)
    numbers = micro_batches(0, trainer.steps, trainer.global_batch_size, trainer.micro_batch_size, rank, world)
    engine = RecordingEngine(glus.train(), trainer, accumulation)
    objective = build_objective(config.loss, vocabulary.seg_id)
    run = Path(output).parent
    loop = Trainer(
        engine,
        objective,
        build_loader(mixture, numbers, 0, vocabulary.pad_id),
        settings=trainer,
        state=RunState(),
        accumulation=accumulation,
        asked_shares=mixture.asked_shares,
        metrics=MetricsLog(run, WandbConfig(), is_main=False),
        checkpoints=Checkpoints(run, engine, objective.queue, config, lambda folder: None),
        evaluate=None,
    )
    losses = loop.train_step(0)
    if rank == 0:
        torch.save({"losses": losses, "gradients": engine.gradients}, output)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    finally:  # torch may abort a process that ends within its group
        leave_process_group()
