"""The training benchmark runs, compares like with like, and tells when the procedures differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.benchmark_training import compare_losses, main


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    file = tmp_path_factory.mktemp("benchmark") / "out.json"
    main(["--videos", "1", "--steps", "1", "--json", str(file)])
    return json.loads(file.read_text())


def test_every_frame_is_encoded_once_in_ours_and_once_per_expression_in_plain(report: dict) -> None:
    assert (report["clip_encodes"], report["sam2_encodes"]) == (8, 4)
    seen = {name: (p["clip_encodes"], p["sam2_encodes"]) for name, p in report["procedures"].items()}
    assert seen == {"ours": (8, 4), "ours, checkpointing": (8, 4), "as released": (24, 4), "plain": (24, 12)}


def test_tokens_and_operations_are_fewer(report: dict) -> None:
    assert report["llm_token_ratio"] > 1.3
    assert report["llm_token_ratio_full_size"] > 1.3
    assert report["procedures"]["ours"]["flops"] < report["procedures"]["plain"]["flops"] / 1.5


def test_every_procedure_reports_its_measurements(report: dict) -> None:
    for result in report["procedures"].values():
        assert all(result[key] > 0 for key in ("seconds", "samples_per_second", "tokens_per_second", "mfu", "peak_gib"))
        assert set(result["part_seconds"]) >= {
            "vision tower",
            "LLM",
            "SAM2 encoder",
            "forward",
            "backward",
            "optimizer",
        }
    plain = report["procedures"]["plain"]["seconds"]
    assert report["samples_per_second_ratio"] == plain / report["procedures"]["ours"]["seconds"]


def test_utilisation_counts_nothing_twice(tmp_path: Path, report: dict) -> None:
    """And is left out where every procedure that was asked for recomputes."""
    ours, recomputing = (report["procedures"][name] for name in ("ours", "ours, checkpointing"))
    assert recomputing["flops"] > ours["flops"]
    assert recomputing["mfu"] * recomputing["seconds"] == pytest.approx(ours["mfu"] * ours["seconds"])
    main(["--videos", "1", "--steps", "1", "--procedures", "ours, checkpointing", "--json", str(tmp_path / "o.json")])
    alone = json.loads((tmp_path / "o.json").read_text())
    assert list(alone["procedures"]) == ["ours, checkpointing"]
    assert "mfu" not in alone["procedures"]["ours, checkpointing"]


@pytest.mark.slow
def test_compiled_layers_are_measured_beside_the_others(tmp_path: Path) -> None:
    main(["--videos", "1", "--steps", "1", "--compile", "--json", str(tmp_path / "out.json")])
    procedures = json.loads((tmp_path / "out.json").read_text())["procedures"]
    assert procedures["ours, compiled"]["losses"] == pytest.approx(procedures["ours"]["losses"], rel=1e-5)
    assert procedures["ours, compiled"]["seconds"] > 0


def test_procedures_with_other_losses_miss_a_goal() -> None:
    def missed(ours: float, dtype: str) -> list[tuple[str, str]]:
        results = {"plain": {"losses": {"seg": 2.0}}, "ours": {"losses": {"seg": ours}}}
        return [(goal.name, goal.found) for goal in compare_losses(results, dtype) if not goal.is_met]

    assert missed(2.0004, "float32") == [("loss 'seg' of 'ours'", "2.0004")]
    assert missed(2.0004, "bfloat16") == []
    assert missed(float("nan"), "bfloat16") == [("loss 'seg' of 'ours'", "nan")]


def test_videos_too_short_to_be_drawn_are_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: num_frames=2"):
        main(["--context", "1", "--query", "1", "--json", str(tmp_path / "out.json")])
    assert not list(tmp_path.iterdir())
