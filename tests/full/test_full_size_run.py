"""The published size for real, on a CPU: every program runs, gives what it should, and keeps within its memory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glus.models.weights import read_tensors
from tests.watched import GB, Stage, table, watch

MEMORY_BYTES, DISK_BYTES = 22 * 2**30, 60 * GB
"""A machine of "24 GB", and what lies on the disk at once."""
WEIGHTS = 2 * 7_288_086_834.0
"""Bytes of the merged model in bfloat16, CLIP included."""
ROWS, LORA, HEADS = 2 * 4 * 4096, 4_194_304, 17_830_144 + 4_198_400 + 4_215_109
TRAINED = ROWS + LORA + HEADS
CONVERT, PREDICT = 6 * GB, 1.15 * WEIGHTS
TRAIN = WEIGHTS + 12 * TRAINED + 3 * GB
STEPS = 2
NEW_ROWS = "[lora,embeddings_new_rows,lm_head_new_rows,seg_head,projector,mask_decoder]"
CHANGED = ("model.mm_projector.", "model.text_hidden_fcs.", "model.visual_model.sam_mask_decoder.")
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
ADAPTED = ("q_proj.weight", "v_proj.weight")

pytestmark = pytest.mark.full


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with room (in TMPDIR), on a machine with memory; removed in any case."""
    place = Path(tempfile.gettempdir())
    free, memory = shutil.disk_usage(place).free, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory >= MEMORY_BYTES, f"{memory / GB:.0f} GB of memory; the full size needs a machine of 24"
    assert free >= DISK_BYTES, (
        f"{free / GB:.0f} GB free in {place}; the full size needs 60 (TMPDIR names another place)"
    )
    with tempfile.TemporaryDirectory(prefix="glus_full_") as name:
        yield Path(name)


def write_video(folder: Path) -> None:
    """Eight frames of a square that moves over noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(8):
        frame = rng.integers(0, 100, (180, 320, 3), dtype=np.uint8)
        frame[60:120, 20 + 25 * index : 80 + 25 * index] = (220, 40, 40)
        Image.fromarray(frame).save(folder / f"{index:05d}.jpg")


def losses(run: Path) -> list[dict[str, float]]:
    """The records of a run."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def prepare_and_predict(folder: Path, stages: list[Stage]) -> None:
    """A random checkpoint becomes a model folder, which segments a video."""

    def run(*arguments: object) -> None:
        stages.append(watch(*arguments, folder=folder))  # type: ignore[arg-type]
        stages[-1].check()

    run("generate", CONVERT, "tests/full/random_checkpoint.py", folder / "published")
    shards = sorted(file.stat().st_size for file in (folder / "published" / "checkpoint").glob("*.bin"))
    assert [round(size / GB, 1) for size in shards] == [4.0, 10.0]
    run("convert", CONVERT, "tools/convert_weights.py", "--weights", "published/checkpoint", "--output", "ours")
    assert "dropped: rotary frequencies (inv_freq), computed here      32" in stages[-1].output
    write_video(folder / "video")
    sentences = ("--text", "the red circle", "--text", "the square that moves left")
    options = ("--weights", "ours", "--output", "masks", "--precision", "bf16", "--force-seg", "--allow-cpu")
    run("predict", PREDICT, "scripts/segment_video.py", "--video", "video", *sentences, *options)
    assert "of 14.6 GB" in stages[-1].output
    assert len(list((folder / "masks").glob("*/*.png"))) == 2 * 8


def train_and_resume(folder: Path, stages: list[Stage]) -> None:
    """A run that is killed after its first step goes on to its second."""
    stages.append(
        watch(
            "make data", GB, "tools/make_shapes.py", "data/own", "--train-videos", 4, "--valid-videos", 0, folder=folder
        )
    )
    stages[-1].check()
    arguments = (
        *("experiment=glus_s", "allow_cpu=true", "data=own", f"paths.data={folder}/data", f"output={folder}/run"),
        *("model.weights=ours", "model.llm.tokenizer=ours", f"model.trainable={NEW_ROWS}"),
        *(
            f"trainer.steps={STEPS}",
            "trainer.warmup_steps=0",
            "trainer.global_batch_size=1",
            "trainer.micro_batch_size=1",
        ),
        *("trainer.zero_stage=2", "trainer.gradient_checkpointing=true", "trainer.save_every=1", "trainer.log_every=1"),
        *("data.num_workers=0", "data.expressions_per_video=1", "frames.num_context=2", "frames.num_query=2"),
    )
    first = folder / "run" / "checkpoints" / "step_1"
    stages.append(watch("train", TRAIN, "scripts/train.py", *arguments, folder=folder, kill_when=first.is_dir))
    stages[-1].check(status=-9)
    assert [record["step"] for record in losses(folder / "run")] == [1]
    stages.append(watch("resume", TRAIN, "scripts/train.py", *arguments, folder=folder))
    stages[-1].check()
    records = losses(folder / "run")
    assert [record["step"] for record in records] == [1, 2]
    assert all(np.isfinite(record[name]) for record in records for name in ("total", "grad_norm"))


def export_and_return(folder: Path, stages: list[Stage]) -> None:
    """What was trained differs from the published checkpoint, and nothing else."""
    stages.append(watch("export", CONVERT, "tools/export.py", "--weights", "run", "--output", "export", folder=folder))
    stages[-1].check()
    shutil.rmtree(folder / "ours")
    arguments = ("--to-release", "--weights", "export", "--output", "back")
    stages.append(watch("to the published layout", CONVERT, "tools/convert_weights.py", *arguments, folder=folder))
    stages[-1].check()
    published, back = (read_tensors(folder / name) for name in ("published/checkpoint", "back"))
    assert back.keys() == published.keys()
    changed = {name for name, value in published.items() if not torch.equal(back[name], value)}
    assert all(name.startswith(CHANGED) or name in TABLES or name.endswith(ADAPTED) for name in changed), changed
    assert {name.split(".")[1] for name in changed if name.startswith(CHANGED)} == {
        "mm_projector",
        "text_hidden_fcs",
        "visual_model",
    }
    for name in TABLES:
        assert torch.equal(back[name][:32000], published[name][:32000])
        assert not torch.equal(back[name][32000:], published[name][32000:])
    tower = read_tensors(folder / "back" / "clip")
    for name, value in read_tensors(folder / "published" / "clip").items():
        assert torch.equal(tower[name], value), name


def test_the_full_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages: list[Stage] = []
    try:
        for part in (prepare_and_predict, train_and_resume, export_and_return):
            part(folder, stages)
    finally:
        with capsys.disabled():
            print(f"\n{table(stages)}")
