"""A folder that behaves as a mount point does, for tests that may not mount anything."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest


def mount(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let renaming the folder fail (EBUSY), and renaming into or out of it (EXDEV), as the kernel does."""
    rename, replace = os.rename, os.replace

    def refusing(original: object) -> object:
        def move(source: Path, target: Path) -> None:
            ends = [Path(os.path.realpath(Path(path).parent)) / Path(path).name for path in (source, target)]
            inside = [folder in path.parents for path in ends]
            number = errno.EBUSY if folder in ends else errno.EXDEV if inside[0] != inside[1] else 0
            if number:
                raise OSError(number, os.strerror(number), str(source), None, str(target))
            original(source, target)

        return move

    monkeypatch.setattr(os, "rename", refusing(rename))
    monkeypatch.setattr(os, "replace", refusing(replace))
