"""Models by name: a folder of ours, a run, a published checkpoint, ``owner/name`` on Hugging Face, the shipped one."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from filelock import FileLock

from glus.config import SegmenterConfig
from glus.files import cache_folder, find_shipped
from glus.models.pretrained import CONFIG_FILE, find_model_folder, save_merged
from glus.models.release import build_release, read_release
from glus.models.release_layout import find_folder
from glus.models.weights import ON_DISK

log = logging.getLogger(__name__)


def find_model(weights: str | Path, segmenter: SegmenterConfig | None = None) -> Path:
    """The model folder that ``weights=`` names.

    A published checkpoint is converted once into ``$XDG_CACHE_HOME/glus/models``, which is announced; a process that
    asks meanwhile waits. One from Hugging Face is downloaded first. No code that comes with a checkpoint is ever run.

    Args:
        weights: a model folder; a run, whose newest checkpoint it is; a folder in the authors' layout, which holds or
            names its CLIP; ``owner/name`` of either on Hugging Face; or ``glus_shapes``, the small one that is shipped.
        segmenter: which SAM2 a published checkpoint holds; None: the published one.

    Raises:
        FileNotFoundError: there is none of these, or a file of it is missing.
        ValueError: a published checkpoint does not fit.
        OSError: the cache cannot be written.
    """
    folder = find_folder(find_shipped(str(weights)), "weights")
    if (folder / CONFIG_FILE).is_file() or not (folder / "config.json").is_file():
        return find_model_folder(folder)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr((str(folder.resolve()), state)).encode()).hexdigest()[:12]
    caches = cache_folder()
    if caches is None:
        raise OSError(f"{weights} is to be converted, but this user has no home folder for it: set XDG_CACHE_HOME")
    converted = caches / "models" / f"{Path(weights).name}-{digest}"
    converted.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{converted}.lock"):
        if not converted.is_dir():
            log.info("%s is in the authors' layout; it is converted once, into %s", weights, converted)
            model, _ = build_release(read_release(folder, segmenter or SegmenterConfig()), ON_DISK)
            save_merged(converted, model, None, str(weights))
    return find_model_folder(converted)
