"""Turn DAVIS 2017 and its sentences, as downloaded, into Ref-DAVIS17 in the layout of Ref-YouTube-VOS.

    python tools/convert_davis17.py downloads data/ref-davis

``downloads`` holds ``DAVIS/`` (DAVIS-2017-Unsupervised-trainval-480p.zip) and ``davis_text_annotations/``
(davis_text_annotations.zip). The result is that of ReferFormer's tools/data/convert_davis_to_ytvos.py, but for
``meta.json`` (names of categories, which nothing here reads); the downloads are copied or linked, not moved. Every
folder and file appears whole: run it again after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glus.config.jobs import user_errors, user_path
from glus.files import atomic_folder, write_text

SENTENCE_FILES = (
    "Davis17_annot1.txt",
    "Davis17_annot1_full_video.txt",
    "Davis17_annot2.txt",
    "Davis17_annot2_full_video.txt",
)
"""Files of the sentences; expression (obj - 1) * 4 + n of a video is file n's."""
MISSPELT = {"clasic-car": "classic-car", "dog-scale": "dogs-scale", "motor-bike": "motorbike"}
"""Names of videos in the sentences' files, and what they are called in DAVIS."""
LINE = re.compile(r"(\S+) 0*([1-9]\d*) \W(.+)\W")
"""Video, object id, and the sentence between two signs that are no letters, as quotation marks of any kind."""
SPLIT_NAMES = {"train": "train", "val": "valid"}
"""Names of the splits in DAVIS and in the result."""
FOLDERS = {"JPEGImages": ("JPEGImages/480p", ".jpg"), "Annotations": ("Annotations_unsupervised/480p", ".png")}
"""Folders of the videos' folders in the result, where DAVIS has them, and what their files end in."""

Sentences = dict[tuple[str, int], str]
"""Of one annotator, by video and object id."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("downloads", type=user_path, help="folder with DAVIS/ and davis_text_annotations/")
    parser.add_argument("output", type=user_path, help="folder of the result, e.g. data/ref-davis")
    parser.add_argument("--link", action="store_true", help="hard links (same disk) instead of copies")
    options = parser.parse_args(arguments)
    with user_errors():
        convert_davis17(options.downloads, options.output, options.link)


def convert_davis17(downloads: Path, output: Path, link: bool) -> None:
    """Convert both splits and print what they hold; the downloads are checked before anything is written.

    An expression file, written last, means that all of its split is there.

    Raises:
        FileNotFoundError, ValueError: something is missing or malformed; or a video's folder in the result has other
            files than the download.
    """
    texts = downloads / "davis_text_annotations"
    annotators = {file: read_sentences(texts / file) for file in SENTENCE_FILES}
    splits = {
        split: {video: _entry(downloads, video, annotators) for video in _read_split(downloads, split)}
        for split in SPLIT_NAMES
    }
    print(f"{'':8}{'videos':>8}{'objects':>9}{'sentences':>11}{'frames':>8}")
    for split, videos in splits.items():
        name = SPLIT_NAMES[split]
        for video, kind in ((video, kind) for video in videos for kind in FOLDERS):
            _copy_folder(_files(downloads, kind, video), output / name / kind / video, link)
        write_text(output / "meta_expressions" / name / "meta_expressions.json", json.dumps({"videos": videos}))
        sentences = sum(len(entry["expressions"]) for entry in videos.values())
        frames = sum(len(entry["frames"]) for entry in videos.values())
        print(f"{name:8}{len(videos):8}{sentences // len(SENTENCE_FILES):9}{sentences:11}{frames:8}")


def read_sentences(path: Path) -> Sentences:
    """One annotator's file of lines ``<video> <object id> "<sentence>"``, in UTF-8 or else in Latin-1.

    As in ReferFormer, runs of blanks become one, and the first and last character of the sentence are dropped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is of another form, or says a second time something of an object; the line is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the sentences are missing; expected {path} (davis_text_annotations.zip)")
    found: Sentences = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            text = " ".join(line.decode("utf-8").split())
        except UnicodeDecodeError:
            text = " ".join(line.decode("latin-1").split())
        if not text:
            continue
        match = LINE.fullmatch(text)
        if not match:
            raise ValueError(f'{where}: expected <video> <object id> "<sentence>", found {line!r:.100}')
        video, object_id = MISSPELT.get(match[1], match[1]), int(match[2])
        if (video, object_id) in found:
            raise ValueError(f"{where}: a second sentence about object {object_id} of {match[1]}; expected one")
        found[video, object_id] = match[3]
    return found


def _read_split(downloads: Path, split: str) -> list[str]:
    path = downloads / "DAVIS" / "ImageSets" / "2017" / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; unzip DAVIS-2017-Unsupervised-trainval-480p.zip in {downloads}")
    return path.read_text(encoding="utf-8").split()


def _entry(downloads: Path, video: str, annotators: dict[str, Sentences]) -> dict[str, Any]:
    """What the expression file says of a video."""
    images, masks = (_files(downloads, kind, video) for kind in FOLDERS)
    odd = sorted({path.stem for path in images} ^ {path.stem for path in masks})
    if odd:
        folders = f"{images[0].parent} and {masks[0].parent}"
        raise ValueError(f"{video}: {folders} differ in frame {odd[0]}; expected the same")
    object_ids = [object_id for sentences in annotators.values() for name, object_id in sentences if name == video]
    if not object_ids:
        raise ValueError(f"no file of davis_text_annotations says anything about {video}, which ImageSets names")
    expressions: dict[str, dict[str, str]] = {}
    for object_id in range(1, max(object_ids) + 1):
        for file, sentences in annotators.items():
            if (video, object_id) not in sentences:
                raise ValueError(f"{file} says nothing about object {object_id} of {video}")
            expressions[str(len(expressions))] = {"exp": sentences[video, object_id], "obj_id": str(object_id)}
    return {"expressions": expressions, "frames": [path.stem for path in images]}


def _files(downloads: Path, kind: str, video: str) -> list[Path]:
    source, suffix = FOLDERS[kind]
    folder = downloads / "DAVIS" / source / video
    files = sorted(folder.glob(f"*{suffix}"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *{suffix}; unzip DAVIS-2017-Unsupervised-trainval-480p")
    return files


def _copy_folder(files: Sequence[Path], target: Path, link: bool) -> None:
    """A folder that is already there must be complete: it was renamed when it was."""
    if target.exists():
        if sorted(path.name for path in target.iterdir()) != [path.name for path in files]:
            raise ValueError(f"{target} holds other files than {files[0].parent}; remove it and run this again")
        return
    with atomic_folder(target) as folder:
        for path in files:
            (os.link if link else shutil.copyfile)(path, folder / path.name)


if __name__ == "__main__":
    main()
