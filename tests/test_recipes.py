"""One config per row of the paper's tables, and the table of configs/README.md says what the configs say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from glus.config import QuerySampling, TrainConfig, load_config

ROOT = Path(__file__).parents[1]


def table() -> dict[str, list[str]]:
    """Experiment -> the other cells of its row in configs/README.md."""
    section = (ROOT / "configs" / "README.md").read_text().partition("\n## Recipes\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {cells[1].strip("`"): [cells[0], *cells[2:]] for cells in rows[2:]}


def recipe(experiment: str) -> TrainConfig:
    ConfigStore.instance().store("schema", TrainConfig)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return load_config(TrainConfig, compose("train", [f"experiment={experiment}"]))


def test_every_config_with_a_recipe_is_in_the_table() -> None:
    folder = ROOT / "configs" / "experiment"
    files = [path for path in folder.rglob("*.yaml") if re.search(r"^recipe:", path.read_text(), re.MULTILINE)]
    assert {path.relative_to(folder).with_suffix("").as_posix() for path in files} == set(table())
    assert len(table()) == 8


@pytest.mark.parametrize("experiment", table())
def test_the_table_says_what_the_config_says(experiment: str) -> None:
    config = recipe(experiment)
    known = config.recipe
    assert known is not None
    scores = [known.expected[split] for split in ("mevis_valid", "ref_youtube_vos_valid")]
    assert table()[experiment] == [
        known.row,
        ", ".join(config.data.mixture),
        str(config.trainer.global_batch_size),
        f"{config.trainer.steps:,}",
        f"{known.gpu_hours:g}",
        *("-" if score is None else f"{score:.1f}" for score in scores),
    ]
    assert known.source
    assert known.gpu_hours_source
    assert "released" in known.batch_source


def test_each_ablation_changes_what_it_is_called_after() -> None:
    parts = {name: recipe(f"paper/{name}") for name in ("global_only", "local_only", "both", "memory", "contrastive")}
    seen = {
        name: (
            config.frames.num_context,
            config.frames.query_sampling,
            config.model.memory.enabled,
            config.loss.weights["contrastive"],
        )
        for name, config in parts.items()
    }
    assert seen == {
        "global_only": (4, QuerySampling.uniform, False, 0),
        "local_only": (0, QuerySampling.consecutive, False, 0),
        "both": (4, QuerySampling.consecutive, False, 0),
        "memory": (4, QuerySampling.consecutive, True, 0),
        "contrastive": (4, QuerySampling.consecutive, True, 0.1),
    }
    assert len({config.output for config in parts.values()}) == len(parts)
