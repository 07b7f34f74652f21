"""Train GLUS.

    python scripts/train.py experiment=shapes
    torchrun --nproc_per_node=4 scripts/train.py experiment=glus_s
    deepspeed scripts/train.py experiment=glus_s

Everything is an override (``frames.num_context=8``); the run folder holds the resolved config, metrics.jsonl and
checkpoints, and the same command with the same run folder goes on where it was interrupted.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from glus import distributed
from glus.config import ModelFolderConfig, TrainConfig
from glus.config.jobs import Jobs
from glus.data.loader import build_loader, build_mixture
from glus.evaluation.packed import boundary_accuracy, region_similarity
from glus.files import PROJECT
from glus.inference.predictor import VideoPredictor, chat_of
from glus.inference.validation import Validation
from glus.log import MetricsLog, log_to_file, setup_logging, write_run_folder
from glus.losses.objective import build_objective
from glus.models.build import OF_ANY_SIZE
from glus.models.foreign import check_starting_weights
from glus.models.glus import Glus
from glus.models.hub import find_model
from glus.models.pretrained import BEST_LINK, build_glus, write_model_config
from glus.models.weights import Target
from glus.tokens import open_vocabulary
from glus.train.checkpoint import Checkpoints, RunState, find_start, read_state
from glus.train.engine import Engine, init_distributed, leave_process_group
from glus.train.guards import EXIT_PREEMPTED
from glus.train.plan import peak_videos_per_second
from glus.train.trainer import Trainer, accumulation_steps, micro_batches

log = logging.getLogger(__name__)


def train(config: TrainConfig) -> int:
    """Train as one of the processes that were started.

    Returns:
        The exit code: 0, or ``EXIT_PREEMPTED`` where a signal ended the run.
    """
    distributed.check_size(config.model.llm.num_parameters, config.allow_cpu)
    check_ranks(config)
    setup_logging()
    init_distributed(config.trainer.hang_timeout_minutes)
    return 0 if build_and_fit(config) else EXIT_PREEMPTED


def check_ranks(config: TrainConfig) -> None:
    """Stop where ranks would wait for each other without end.

    Raises:
        ValueError: several have ZeRO-3 and a family of ``OF_ANY_SIZE``.
    """
    family, stage = config.model.family, config.trainer.zero_stage
    if stage == 3 and family in OF_ANY_SIZE and distributed.world_size() > 1:
        raise ValueError(
            f"trainer.zero_stage=3: expected 2 where several processes train model.family={family}, whose vision tower "
            "does not run equally often on all of them"
        )


def build_and_fit(config: TrainConfig) -> bool:
    """Build every part, then fit; returns whether the last step is done."""
    trainer, run = config.trainer, Path(config.output)
    rank, world_size = distributed.rank(), distributed.world_size()
    accumulation = accumulation_steps(trainer.global_batch_size, trainer.micro_batch_size, world_size)
    check_starting_weights(config.model)
    start = distributed.on_main(lambda: find_start(config))
    if start and read_state(start)["state"]["step"] >= trainer.steps:
        new_run = f"model.weights={start} output=NEW_FOLDER"
        log.info("%s is finished: %d steps are done. A new run from it: %s", run, trainer.steps, new_run)
        return True
    distributed.on_main(lambda: log_to_file(run))

    peak = peak_videos_per_second(config, distributed.device_name(), world_size)
    torch.manual_seed(trainer.seed)
    vocabulary = open_vocabulary(config.model.llm.tokenizer)
    start_model = replace(config.model, weights=config.model.weights and str(find_model(config.model.weights)))
    glus = build_glus(start_model, target=Target(distributed.device()))
    if trainer.gradient_checkpointing:
        glus.mllm.decoder.checkpoint_gradients()
    compile_layers(glus, config)
    chat = chat_of(glus, vocabulary)
    mixture = build_mixture(config.data, config.frames, chat, glus.mllm.prepare, trainer.seed)
    objective = build_objective(config.loss, vocabulary.seg_id)
    announce(config, glus, accumulation, start)
    engine = Engine(glus.train(), trainer, accumulation)
    folder_config = ModelFolderConfig(config.model, config.frames, config.inference)
    write_model = partial(write_model_config, config=folder_config, vocabulary=vocabulary)
    checkpoints = Checkpoints(run, engine, objective.queue, config, write_model)
    state = checkpoints.load(start) if start else RunState()
    distributed.on_main(lambda: write_run_folder(run, config, state.step))

    sizes = (trainer.global_batch_size, trainer.micro_batch_size)
    numbers = micro_batches(state.step, trainer.steps, *sizes, rank, world_size)
    batches = build_loader(mixture, numbers, config.data.num_workers, vocabulary.pad_id)
    log_metrics, validation = MetricsLog(run, config, rank == 0, state.step), None
    if config.valid:
        predictor = VideoPredictor(glus, chat, config.frames, config.inference)
        metrics = {"J": region_similarity, "F": boundary_accuracy}
        show = log_metrics.show if trainer.wandb.enabled else None
        validation = Validation(predictor, config.valid, metrics, trainer.eval_max_videos, show)
    is_done = Trainer(
        engine,
        objective,
        batches,
        settings=trainer,
        state=state,
        accumulation=accumulation,
        asked_shares=mixture.asked_shares,
        metrics=log_metrics,
        checkpoints=checkpoints,
        evaluate=validation,
        peak=peak,
    ).fit()
    if is_done and rank == 0:
        tell_what_follows(config)
    return is_done


def announce(config: TrainConfig, glus: Glus, accumulation: int, start: Path | None) -> None:
    """Log on what the run stands."""
    trainer, count = config.trainer, distributed.world_size()
    total = sum(parameter.numel() for parameter in glus.parameters())
    trained = sum(parameter.numel() for parameter in glus.parameters() if parameter.requires_grad)
    log.info("run      %s%s", config.output, f", goes on from {start}" if start else "")
    processes = f"{count} process{'' if count == 1 else 'es'}"
    log.info("device   %s, %s, %s", distributed.device_name(), processes, config.model.precision.value)
    parts = f"{trainer.micro_batch_size} x {processes} x {accumulation} accumulated"
    log.info("batch    %d videos a step = %s", trainer.global_batch_size, parts)
    log.info("trained  %s of %s parameters (%.1f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)


def tell_what_follows(config: TrainConfig) -> None:
    """Log the best score of a run that is done, the checkpoint that has it, and the next commands."""
    run = Path(config.output)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    score = config.trainer.keep_best or "J&F"
    scores = {record["step"]: record[f"valid/{score}"] for record in records if f"valid/{score}" in record}
    weights = run
    if scores:
        best = max(scores, key=lambda step: scores[step])
        link, kept = (run / "checkpoints" / name for name in (BEST_LINK, f"step_{best}"))
        is_kept = kept.is_dir()
        if is_kept and best < config.trainer.steps:
            weights = link if link.is_dir() and link.samefile(kept) else kept
        fate = "" if is_kept else f", whose checkpoint is not kept ('trainer.keep_best={score}' keeps it)"
        log.info("best     %s %.1f of the validation, after step %d%s", score, scores[best], best, fate)
    log.info("weights  %s", weights)
    known = config.valid and (PROJECT / "configs" / "dataset" / f"{config.valid.name}.yaml").is_file()
    dataset = config.valid.name if config.valid and known else "NAME"
    log.info("next     glus predict dataset=%s weights=%s output=%s/predictions", dataset, weights, run)
    log.info("         glus score dataset=%s predictions=%s/predictions", dataset, run)
    log.info("         glus export --weights %s --output %s_export", weights, run)


def compile_layers(glus: Glus, config: TrainConfig) -> None:
    """As ``trainer.compile`` says.

    Raises:
        ValueError: it says true, and no code can be made here.
    """
    if config.is_compiled(distributed.device().type == "cuda"):
        try:
            glus.mllm.decoder.compile_layers()
        except ValueError as error:
            if config.trainer.compile:
                raise
            log.warning("trained without compiled layers, in more time. %s", error)


def take_grouped(jobs: Jobs, cfg: DictConfig) -> None:
    """Take a job, which W&B groups by its experiment unless it says otherwise."""
    if cfg.trainer.wandb.group is None:
        cfg.trainer.wandb.group = HydraConfig.get().runtime.choices.get("experiment")
    jobs.take(cfg)


def train_or_leave(config: TrainConfig) -> None:
    """Train; a run that a signal ended also ends the sweep that it is part of.

    Raises:
        SystemExit: it was ended by a signal.
    """
    if code := train(config):
        sys.exit(code)


if __name__ == "__main__":
    # The deepspeed launcher adds this flag, which Hydra does not know; the number is in LOCAL_RANK as well.
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank=")]
    jobs = Jobs("train", TrainConfig, "output")
    try:
        jobs.start(train_or_leave, take=partial(take_grouped, jobs))
    finally:  # not after each run of a sweep: DeepSpeed's own groups last as long as the process
        leave_process_group()
