"""A tiny Shapes benchmark on disk, and a training config of the tiny model for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from glus.config import (
    DataConfig,
    DatasetConfig,
    FramesConfig,
    InferenceConfig,
    Layout,
    MixtureItem,
    TrainConfig,
    TrainerConfig,
    to_yaml,
)
from glus.shapes.write import write_shapes
from glus.tokens import Vocabulary
from tests.conftest import tiny_model_config
from tests.programs import ROOT, environment

SERVER = Path(__file__).with_name("training_server.py")


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training and two held-out videos of eight 64-pixel frames in the MeViS layout."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, "train", num_videos=6, seed=0, num_frames=8, size=64)
    write_shapes(folder, "valid", num_videos=2, seed=0, num_frames=8, size=64)
    return folder


@pytest.fixture(scope="session")
def tiny_train_config(shapes_folder: Path, tiny_vocabulary: Vocabulary) -> Callable[..., TrainConfig]:
    """Makes a config of a three-step run; keyword arguments replace its top-level fields."""

    def make(**fields: object) -> TrainConfig:
        dataset = DatasetConfig("shapes_train", Layout.mevis, str(shapes_folder), "train", groups="kinds.json")
        config = TrainConfig(
            model=tiny_model_config(tiny_vocabulary.folder, tiny_vocabulary.size),
            frames=FramesConfig(num_context=2, num_query=2),
            data=DataConfig({"shapes": MixtureItem(dataset)}, expressions_per_video=2, num_workers=0),
            trainer=TrainerConfig(
                steps=3,
                global_batch_size=2,
                micro_batch_size=2,
                learning_rate=1e-3,
                warmup_steps=1,
                log_every=1,
                gradient_checkpointing=False,
            ),
            inference=InferenceConfig(trailing_space=False),
        )
        for name, value in fields.items():
            setattr(config, name, value)
        return config

    return make


@pytest.fixture(scope="session")
def tiny_overrides(shapes_folder: Path, tiny_vocabulary: Vocabulary) -> list[str]:
    """Of ``scripts/train.py``: the tiny model on the tiny benchmark, each step recorded."""
    return [
        *("experiment=shapes", "valid=null", "trainer.log_every=1"),
        *(f"model.{part}.weights=null" for part in ("clip", "llm", "segmenter")),
        f"model.llm.tokenizer={tiny_vocabulary.folder}",
        f"data.mixture.shapes.dataset.root={shapes_folder}",
    ]


COST = {"seconds", "samples_per_second", "peak_memory_gib"}
"""What two equal runs differ in."""


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Records of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Finished:
    """Runs of ``scripts/train.py`` that ended."""

    codes: list[int]
    """Exit code of each rank; negative: the signal it died of."""
    outputs: list[str]
    """What each rank printed."""

    @property
    def is_ok(self) -> bool:
        return not any(self.codes)

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)


@pytest.fixture(scope="session")
def run_training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Finished]]:
    """Trains with a typed config on some processes, with a fault of ``training_server.py`` if named."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, str(SERVER)], **pipes, env=environment(), cwd=ROOT)
    assert server.stdin is not None
    assert server.stdout is not None

    def run(
        config: TrainConfig,
        fault: str = "",
        rank: int = 0,
        step: int = 0,
        processes: int = 1,
        deepspeed: dict[str, dict[str, object]] | None = None,
        **env: str,
    ) -> Finished:
        file = tmp_path_factory.mktemp("config") / "config.yaml"
        file.write_text(to_yaml(config))
        request = {"config": str(file), "fault": [fault, rank, step], "processes": processes, "env": env}
        request["deepspeed"] = deepspeed or {}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        # DeepSpeed prints there too.
        answer = next(line for line in server.stdout if line.startswith("codes "))
        codes = json.loads(answer.removeprefix("codes "))
        return Finished(codes, [Path(f"{file}.rank_{rank}").read_text() for rank in range(processes)])

    yield run
    server.stdin.close()
    server.wait()
