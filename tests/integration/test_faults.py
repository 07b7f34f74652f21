"""What breaks a run ends it with a message that says what and where, and leaves something to go on from."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from glus.config import OnNonfinite, Precision, TrainConfig
from glus.train.checkpoint import list_checkpoints, read_state
from glus.train.guards import EXIT_HUNG, EXIT_PREEMPTED
from glus.train.trainer import SPIKE_MIN_STEPS
from tests.integration.conftest import read_metrics


@pytest.fixture
def config(tiny_train_config: Callable[..., TrainConfig], tmp_path: Path) -> TrainConfig:
    """Three steps of two videos, each saved."""
    config = tiny_train_config(output=str(tmp_path / "run"))
    config.trainer.micro_batch_size = 1
    config.trainer.save_every = 1
    return config


def newest(config: TrainConfig) -> str:
    return list_checkpoints(Path(config.output))[-1].name


def goes_on(run_training: Callable, config: TrainConfig, processes: int = 1) -> bool:
    """Whether the same command reaches the last step."""
    return run_training(config, processes=processes).is_ok and newest(config) == "step_3"


@pytest.mark.slow
def test_nan_on_one_rank_stops_all_by_name(run_training: Callable, config: TrainConfig) -> None:
    done = run_training(config, "nan_masks", rank=1, step=2, processes=2)
    assert done.codes == [1, 1]
    for output in done.outputs:
        assert "loss term 'bce' is nan at step 2 on rank 1; samples: shapes_train/" in output
        assert "process group: left" in output
    assert newest(config) == "step_1"
    assert goes_on(run_training, config, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["nan_gradient", "unseen_nan_gradient"])
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_nan_gradient_is_skipped_and_changes_nothing(
    run_training: Callable, config: TrainConfig, zero_stage: int, precision: Precision, fault: str
) -> None:
    """Whether DeepSpeed looks for it or not."""
    config.trainer.on_nonfinite = OnNonfinite.skip
    config.trainer.zero_stage = zero_stage
    config.model.precision = precision
    done = run_training(config, fault, rank=1, step=2, processes=2)
    assert done.is_ok, done.output
    assert "others is not finite at step 2 on rank 1; samples: shapes_train/" in done.outputs[0]
    assert "The step is skipped, the 1. of this run" in done.outputs[0]
    records = read_metrics(Path(config.output))
    assert [record["skipped"] for record in records] == [0, 1, 1]
    assert ["total" in record for record in records] == [True, False, True]
    first, second, third = list_checkpoints(Path(config.output))
    assert [read_state(folder)["updates"] for folder in (first, second, third)] == [1, 1, 2]
    for file in ("trained.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors", "queue.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
        assert (second / file).read_bytes() != (third / file).read_bytes(), file


@pytest.mark.slow
def test_too_many_skips_stop(run_training: Callable, config: TrainConfig) -> None:
    config.trainer.on_nonfinite, config.trainer.max_skips_in_row = OnNonfinite.skip, 2
    config.loss.weights["bce"] = float("inf")
    done = run_training(config)
    assert done.codes == [1]
    assert "bce' is inf at step 3 on rank 0" in done.output
    assert "More than trainer.max_skips_in_row steps in a row" in done.output


@pytest.mark.slow
def test_a_loss_spike_is_reported_with_its_samples(run_training: Callable, config: TrainConfig) -> None:
    config.trainer.steps = SPIKE_MIN_STEPS + 2
    done = run_training(config, "huge_masks", step=SPIKE_MIN_STEPS + 1)
    assert done.is_ok, done.output
    (line,) = (line for line in done.output.splitlines() if "loss spike" in line)
    assert f"loss spike at step {SPIKE_MIN_STEPS + 1}: " in line
    assert "x the median; shapes_train/" in line
    ratios = [record["loss_over_median"] for record in read_metrics(Path(config.output))]
    assert [ratio > config.trainer.spike_ratio for ratio in ratios] == [False] * SPIKE_MIN_STEPS + [True, False]
    assert all(record["grad_norm"] > 0 for record in read_metrics(Path(config.output)))


@pytest.mark.slow
def test_a_killed_rank_ends_the_other(run_training: Callable, config: TrainConfig) -> None:
    done = run_training(config, "SIGKILL", rank=1, step=2, processes=2)
    assert done.codes[1] == -signal.SIGKILL
    assert done.codes[0] == 1
    assert "rank 0 failed while training step 2 on shapes_train/" in done.outputs[0]
    assert "The same command goes on from the newest checkpoint" in done.outputs[0]
    assert "process group: left" in done.outputs[0]
    assert goes_on(run_training, config, processes=2)


@pytest.mark.slow
def test_a_hanging_rank_shows_its_stack_and_samples(run_training: Callable, config: TrainConfig) -> None:
    config.trainer.hang_timeout_minutes = 0.5
    done = run_training(config, "hang", rank=1, step=2, processes=2)
    assert done.codes[1] == EXIT_HUNG
    assert done.codes[0] != 0
    assert "rank 1 hangs: nothing done for 0.5 minutes" in done.outputs[1]
    assert "it was training step 2 on shapes_train/" in done.outputs[1]
    assert "in _micro_step" in done.outputs[1]
    assert newest(config) == "step_1"


def test_a_signal_is_obeyed_while_a_loader_hangs(run_training: Callable, config: TrainConfig) -> None:
    config.data.num_workers = 1
    done = run_training(config, "loader_hangs", step=2)
    assert done.codes == [EXIT_PREEMPTED], done.output
    assert "the samples of step 2 did not come" in done.output
    assert [path.name for path in list_checkpoints(Path(config.output))] == ["step_1"]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "saved"), [(1, []), (2, ["step_1"])])
def test_a_signal_to_a_rank_whose_loader_hangs_ends_all(
    run_training: Callable, config: TrainConfig, step: int, saved: list[str]
) -> None:
    """The samples of a step do not come; those of the other rank do."""
    config.data.num_workers = 1
    done = run_training(config, "loader_hangs", rank=1, step=step, processes=2)
    assert done.codes == [EXIT_PREEMPTED] * 2, done.output
    assert f"the samples of step {step} did not come" in done.output
    assert [path.name for path in list_checkpoints(Path(config.output))] == saved
    assert goes_on(run_training, config, processes=2)


@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_checkpoint(run_training: Callable, config: TrainConfig) -> None:
    done = run_training(config, "disk_full", step=2, processes=2)
    assert done.codes == [1, 1]
    for output in done.outputs:
        assert "step_2 cannot be written: [Errno 27] File too large" in output
        assert "step_1 is complete: make room" in output
    assert [path.name for path in (Path(config.output) / "checkpoints").iterdir()] == ["step_1"]
    assert goes_on(run_training, config, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize(("fast_rank", "saved"), [(0, ["step_1", "step_2", "step_3"]), (1, ["step_3"])])
def test_rank_0_alone_has_the_time(
    run_training: Callable, config: TrainConfig, fast_rank: int, saved: list[str]
) -> None:
    """A clock runs a million times too fast."""
    config.trainer.save_every, config.trainer.save_every_minutes = 100, 60
    assert run_training(config, "clock_skew", rank=fast_rank, processes=2).is_ok
    assert [path.name for path in list_checkpoints(Path(config.output))] == saved


@pytest.fixture
def own_data(config: TrainConfig, shapes_folder: Path, tmp_path: Path) -> Path:
    """A copy of the data that may be damaged."""
    shutil.copytree(shapes_folder, tmp_path / "data")
    config.data.mixture["shapes"].dataset.root = str(tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.slow
def test_a_corrupt_frame_is_named_and_ends_all_ranks(
    run_training: Callable, config: TrainConfig, own_data: Path
) -> None:
    assert run_training(config, "SIGTERM", step=1, processes=2).codes == [75, 75]
    frames = sorted((own_data / "train").rglob("*.jpg"))
    whole = {frame: frame.read_bytes() for frame in frames}
    for frame in frames:
        frame.write_bytes(whole[frame][:50])
    config.data.num_workers = 1
    done = run_training(config, processes=2)
    assert 0 not in done.codes
    assert any(frame.parent.name in done.output and frame.stem in done.output for frame in frames)
    assert "shapes_train/" in done.output
    assert newest(config) == "step_1"
    for frame in frames:
        frame.write_bytes(whole[frame])
    assert goes_on(run_training, config, processes=2)


@pytest.mark.slow
def test_a_truncated_mask_cache_is_made_anew(run_training: Callable, config: TrainConfig, own_data: Path) -> None:
    assert run_training(config, "SIGTERM", step=1).codes == [75]
    (packed,) = (own_data / "train").glob("*.packed")
    packed.write_bytes(packed.read_bytes()[:-40])
    assert goes_on(run_training, config)
    assert packed.is_file()


@pytest.mark.slow
def test_training_goes_on_without_wandb(run_training: Callable, config: TrainConfig) -> None:
    config.trainer.wandb.enabled = True
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": 40 * "0", "WANDB_INIT_TIMEOUT": "5"}
    done = run_training(config, **nowhere)
    assert done.is_ok, done.output
    assert "W&B is out of reach" in done.output
    assert len(read_metrics(Path(config.output))) == 3


def test_the_best_checkpoint_is_kept_beside_the_newest(run_training: Callable, config: TrainConfig) -> None:
    config.valid = config.data.mixture["shapes"].dataset
    config.trainer.eval_max_videos, config.trainer.eval_every = 1, 1
    config.trainer.keep_best, config.trainer.keep_last, config.trainer.save_every = "J", 1, 100
    done = run_training(config)
    assert done.is_ok
    scores = {line["step"]: line["valid/J"] for line in read_metrics(Path(config.output)) if "valid/J" in line}
    assert list(scores) == [1, 2, 3]
    best = max(reversed(scores), key=lambda step: (scores[step], -step))
    kept = {path.name for path in list_checkpoints(Path(config.output))}
    assert kept == {f"step_{best}", "step_3"}
    best_folder = Path(config.output) / "checkpoints" / f"step_{best}"
    assert read_state(best_folder)["state"]["score"] == scores[best]
    link = best_folder.with_name("best")
    assert link.readlink() == Path(best_folder.name)
    assert f"best     J {scores[best]:.1f} of the validation, after step {best}\n" in done.output
    weights = Path(config.output) if best == 3 else link
    assert f"weights={weights} output=" in done.output
