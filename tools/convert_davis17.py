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
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glus.files import atomic_folder, write_text

ANNOTATORS = (
    ("Davis17_annot1.txt", "utf-8"),
    ("Davis17_annot1_full_video.txt", "utf-8"),
    ("Davis17_annot2.txt", "latin-1"),
    ("Davis17_annot2_full_video.txt", "latin-1"),
)
"""Files of the sentences and their encodings; expression (obj - 1) * 4 + n of a video is file n's."""
MISSPELT = {"clasic-car": "classic-car", "dog-scale": "dogs-scale", "motor-bike": "motorbike"}
"""Names of videos in the sentences' files, and what they are called in DAVIS."""
SPLITS = {"train": "train", "val": "valid"}
"""Names of the splits in DAVIS and in the result."""

Sentences = dict[str, dict[int, str]]
"""Of one annotator: {video: {object id: sentence}}."""


@dataclass(frozen=True)
class Place:
    """Where one kind of a video's files is in the download and in the result."""

    source: Path
    target: Path
    suffix: str


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("downloads", type=Path, help="folder with DAVIS/ and davis_text_annotations/")
    parser.add_argument("output", type=Path, help="folder of the result, e.g. data/ref-davis")
    parser.add_argument("--link", action="store_true", help="hard links (same disk) instead of copies")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert both splits and print what they hold."""
    options = parse_arguments(arguments)
    try:
        annotators = [
            read_sentences(options.downloads / "davis_text_annotations" / file, encoding)
            for file, encoding in ANNOTATORS
        ]
        splits = {split: _read_split(options.downloads, split) for split in SPLITS}
        contents = {
            split: {video: _entry(options.downloads, video, annotators) for video in videos}
            for split, videos in splits.items()
        }
        print(f"{'':8}{'videos':>8}{'objects':>9}{'sentences':>11}{'frames':>8}")
        for split, videos in contents.items():
            convert_split(options.downloads, options.output, split, videos, options.link)
            counts = [len(videos), *_counts(videos)]
            print(f"{SPLITS[split]:8}{counts[0]:8}{counts[1]:9}{counts[2]:11}{counts[3]:8}")
    except (OSError, ValueError) as error:
        raise SystemExit(f"convert_davis17: {error}") from error


def read_sentences(path: Path, encoding: str) -> Sentences:
    """One annotator's file of lines ``<video> <object id> "<sentence>"``.

    As in ReferFormer, runs of blanks become one, and the first and last character of the sentence, its quotation marks
    (of any kind), are dropped.

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
            words = line.decode(encoding).split()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not in {encoding}: {error}") from error
        if not words:
            continue
        text = " ".join(words[2:])
        if len(words) < 3 or not words[1].isdecimal() or int(words[1]) < 1 or not _is_quoted(text):
            raise ValueError(f'{where}: expected <video> <object id> "<sentence>", found {line!r:.100}')
        of_video = found.setdefault(MISSPELT.get(words[0], words[0]), {})
        if int(words[1]) in of_video:
            raise ValueError(f"{where}: a second sentence about object {words[1]} of {words[0]}; expected one")
        of_video[int(words[1])] = text[1:-1]
    return found


def convert_split(downloads: Path, output: Path, split: str, videos: dict[str, Any], link: bool) -> None:
    """Frames and masks of every video, then the expression file, whose presence means that all is there.

    Args:
        downloads: folder with ``DAVIS/``.
        output: folder of the result.
        split: its name in DAVIS.
        videos: content of the expression file.
        link: make hard links instead of copies.

    Raises:
        ValueError: the result has a folder of a video with other files than the download.
    """
    for video in videos:
        for place in _places(downloads, output, SPLITS[split], video):
            _copy_folder(place, link)
    path = output / "meta_expressions" / SPLITS[split] / "meta_expressions.json"
    write_text(path, json.dumps({"videos": videos}))


def _is_quoted(text: str) -> bool:
    """Whether something stands between two signs that are no letters."""
    return len(text) > 2 and not text[0].isalnum() and not text[-1].isalnum()


def _read_split(downloads: Path, split: str) -> list[str]:
    path = downloads / "DAVIS" / "ImageSets" / "2017" / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; unzip DAVIS-2017-Unsupervised-trainval-480p.zip in {downloads}")
    return path.read_text(encoding="utf-8").split()


def _entry(downloads: Path, video: str, annotators: Sequence[Sentences]) -> dict[str, Any]:
    """The video in the expression file; its frames and sentences are checked before anything is written."""
    images, masks = _places(downloads, Path(), "", video)
    frames, masked = (_files(place) for place in (images, masks))
    if [Path(name).stem for name in frames] != [Path(name).stem for name in masked]:
        odd = sorted({Path(name).stem for name in frames} ^ {Path(name).stem for name in masked})
        raise ValueError(f"{video}: {images.source} and {masks.source} differ in frame {odd[0]}; expected the same")
    expressions = {}
    num_objects = max(len(sentences.get(video, {})) for sentences in annotators)
    for object_id in range(1, num_objects + 1):
        for number, sentences in enumerate(annotators):
            if object_id not in sentences.get(video, {}):
                raise ValueError(f"{ANNOTATORS[number][0]} says nothing about object {object_id} of {video}")
            expression = {"exp": sentences[video][object_id], "obj_id": str(object_id)}
            expressions[str((object_id - 1) * len(annotators) + number)] = expression
    if not expressions:
        raise ValueError(f"no file of davis_text_annotations says anything about {video}, which ImageSets names")
    return {"expressions": expressions, "frames": [Path(name).stem for name in frames]}


def _places(downloads: Path, output: Path, split: str, video: str) -> tuple[Place, Place]:
    davis = downloads / "DAVIS"
    return (
        Place(davis / "JPEGImages" / "480p" / video, output / split / "JPEGImages" / video, ".jpg"),
        Place(davis / "Annotations_unsupervised" / "480p" / video, output / split / "Annotations" / video, ".png"),
    )


def _files(place: Place) -> list[str]:
    names = sorted(path.name for path in place.source.glob(f"*{place.suffix}"))
    if not names:
        raise FileNotFoundError(f"{place.source} holds no *{place.suffix}; unzip DAVIS-2017-Unsupervised-trainval-480p")
    return names


def _copy_folder(place: Place, link: bool) -> None:
    """A folder that is already there must be complete: it was renamed when it was."""
    names = _files(place)
    if place.target.exists():
        if sorted(path.name for path in place.target.iterdir()) != names:
            raise ValueError(f"{place.target} holds other files than {place.source}; remove it and run this again")
        return
    with atomic_folder(place.target) as folder:
        for name in names:
            if link:
                os.link(place.source / name, folder / name)
            else:
                shutil.copyfile(place.source / name, folder / name)


def _counts(videos: dict[str, Any]) -> Iterator[int]:
    """Objects, sentences and frames."""
    yield sum(len({value["obj_id"] for value in video["expressions"].values()}) for video in videos.values())
    yield sum(len(video["expressions"]) for video in videos.values())
    yield sum(len(video["frames"]) for video in videos.values())


if __name__ == "__main__":
    main()
