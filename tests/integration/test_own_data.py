"""The example of one's own data in configs/README.md: fine-tuning starts from the weights that it names."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.programs import ROOT, run_program

SMALL = ["trainer.steps=1", "trainer.micro_batch_size=2", "trainer.warmup_steps=1", "data.num_workers=0"]
ANEW = [*(f"model.{part}weights=null" for part in ("", "clip.", "llm.", "segmenter.")), "output=outputs/anew"]


def commands() -> list[list[str]]:
    section = (ROOT / "configs" / "README.md").read_text().partition("\n## Your own data\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    return [shlex.split(line)[1:] for line in block.splitlines()]


def first_loss(run: Path) -> float:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["total"]


@pytest.mark.slow
def test_fine_tuning_starts_from_the_named_weights(tmp_path: Path) -> None:
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    make, check, train = commands()
    make[make.index("--train-videos") + 1] = "4"
    for command in (make, check, [*train, *SMALL], [*train, *SMALL, *ANEW]):
        done = run_program(*command, folder=tmp_path)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert first_loss(tmp_path / "outputs" / "own") < 0.5 * first_loss(tmp_path / "outputs" / "anew")
