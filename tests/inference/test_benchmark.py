"""The benchmark of prediction at a small size: what it promises to write, and counts that do not depend on time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tools.benchmark_inference import main

KEYS = {
    *("frames_per_second_ratio", "clips_ratio", "clip_encodes", "sam2_encodes", "llm_tokens", "llm_tokens_bound"),
    *("num_frames", "memory_growth", "jf_sliding", "jf_clips", "flops", "mfu"),
}


def test_it_measures_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = ["--frames", "6", "--expressions", "2", "--plain-expressions", "1", "--scenes", "1", "--rounds", "2"]
    main([*sizes, "--memory-frames", "202", "--json", str(tmp_path / "out.json")])
    measured = json.loads((tmp_path / "out.json").read_text())
    assert set(measured) >= KEYS
    assert all(math.isfinite(measured[key]) and measured[key] > 0 for key in KEYS)
    assert (measured["clip_encodes"], measured["sam2_encodes"], measured["num_frames"]) == (6, 6, 6)
    assert measured["llm_tokens"] <= measured["llm_tokens_bound"]
    assert measured["plain_counts"]["SAM2 images"] == 6 * 2
    assert measured["pixels_that_differ_far_from_threshold"] == 0
    assert "frames_per_second_ratio" in capsys.readouterr().out
