"""What every damage to a published checkpoint must lead to."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import load_release, tiny_segmenter

Damage = Callable[[Path, random.Random], str]
"""Damages a checkpoint's folder, and returns what the message must name."""


def check_named(damage: Damage, folder: Path) -> None:
    """Loading the damaged checkpoint stops with a message that names the damage."""
    culprit = damage(folder, random.Random(damage.__name__))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(culprit)):
        load_release(folder, tiny_segmenter())
