"""Changes of what a file holds, in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """``change`` is given what a JSON file holds and changes it."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_arrays(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """The same for the arrays of an npz file, by name."""
    arrays = dict(np.load(path))
    change(arrays)
    np.savez(path, **arrays)
