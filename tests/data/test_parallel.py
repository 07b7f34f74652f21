"""Compiled loops where nothing can be written; processes that cannot start."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests.programs import ROOT, run


def test_loops_are_compiled_where_no_folder_can_keep_them(tmp_path: Path) -> None:
    """As in a read-only container, without a home: also for root, who may write anywhere."""
    shutil.copytree(ROOT / "glus", tmp_path / "glus", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (tmp_path / "glus").rglob("*/"):
        (folder / "__pycache__").touch()
    (tmp_path / "configs").mkdir()
    code = """
import numpy as np
from glus.evaluation.packed import region_similarity
assert region_similarity(np.eye(4, dtype=bool)[None], np.ones((1, 4, 4), bool)) == 0.25
"""
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "NUMBA_CACHE_DIR": "", "PYTHONPATH": str(tmp_path)}
    done = run(sys.executable, "-B", "-c", code, folder=tmp_path, **nowhere)
    assert done.returncode == 0, done.stderr


def test_a_script_that_its_processes_would_run_again_is_told_what_to_do(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from glus.data.parallel import map_in_processes\nlist(map_in_processes(abs, [1, -2], 2))\n")
    done = run(sys.executable, script, folder=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "killed for want of memory" in last
    assert 'if __name__ == "__main__":' in last
