"""Every codec in every container that people have: 720p, longer than what is kept, against the ffmpeg program.

Context frames of a prediction are far apart: they are read by jumps, and then all frames in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from glus.data.video_file import FileVideo
from tests.data.clips import difference, ffmpeg, pattern, shown_frames

CODECS: dict[str, Sequence[object]] = {
    "h264": ("libx264", "-preset", "ultrafast", "-bf", 2, "-g", 30),
    "h264_open": ("libx264", "-preset", "veryfast", "-g", 30, "-x264-params", "open-gop=1:b-pyramid=normal:bframes=4"),
    "hevc": ("libx265", "-preset", "ultrafast", "-x265-params", "log-level=0:keyint=30"),
    "hevc10": ("libx265", "-preset", "ultrafast", "-pix_fmt", "yuv420p10le", "-x265-params", "log-level=0:keyint=30"),
    "vp8": ("libvpx", "-deadline", "realtime", "-cpu-used", 8, "-g", 30),
    "vp9": ("libvpx-vp9", "-deadline", "realtime", "-cpu-used", 8, "-g", 30),
    "av1": ("libsvtav1", "-preset", 13, "-g", 30),
    "mpeg2": ("mpeg2video", "-g", 15, "-bf", 2, "-qscale:v", 5),
    "mpeg4": ("mpeg4", "-g", 30, "-bf", 2, "-qscale:v", 5),
    "prores": ("prores_ks", "-profile:v", 0),
    "mjpeg": ("mjpeg", "-qscale:v", 5),
}
BASES = {"prores": "mov", "vp8": "mkv"}
"""Container that a codec is encoded into; the others are made of it without encoding."""
CONTAINERS = ("mp4", "mov", "mkv", "webm", "avi", "ts", "m2ts", "mpg")
WEBM, TS, PS = "WebM holds VP8, VP9 and AV1", "TS has no standard for it", "MPEG-PS is for MPEG codecs"
UNMAPPED = "ffmpeg writes it without the map that tells of it, and finds no video there itself"
IMPOSSIBLE = {
    **{(codec, "webm"): WEBM for codec in CODECS if codec not in ("vp8", "vp9", "av1")},
    **{(codec, suffix): TS for codec in ("vp8", "vp9", "av1", "prores", "mjpeg") for suffix in ("ts", "m2ts")},
    **{(codec, "mpg"): PS for codec in ("vp8", "vp9", "av1", "prores", "mjpeg", "mpeg4")},
    **{(codec, "mpg"): UNMAPPED for codec in ("h264", "h264_open", "hevc", "hevc10")},
    **{(codec, "mov"): "ffmpeg writes it to MP4, not to MOV" for codec in ("vp8", "vp9", "av1")},
    ("vp8", "mp4"): "MP4 has no standard for it",
    ("prores", "mp4"): "ffmpeg writes it to MOV, not to MP4",
}
"""Cells that cannot be made, and why."""
QUICK = {
    *(("h264", suffix) for suffix in ("mp4", "mkv", "ts", "avi")),
    *(("hevc", "mp4"), ("hevc10", "mov"), ("vp9", "webm"), ("av1", "mp4"), ("mpeg2", "mpg"), ("mpeg4", "avi")),
    *(("prores", "mov"), ("mjpeg", "avi"), ("h264_open", "mp4")),
}
NUM_FRAMES = 104


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(codec, size) -> a file, made when it is first asked for."""
    return Encoded(tmp_path_factory.mktemp("encoded"))


class Encoded(dict[tuple[str, str], Path]):
    """Makes what is missing."""

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder

    def __missing__(self, key: tuple[str, str]) -> Path:
        codec, size = key
        path = self._folder / f"{codec}_{size}.{BASES.get(codec, 'mp4')}"
        ffmpeg(*pattern(NUM_FRAMES / 30, size), "-c:v", *CODECS[codec], path)
        self[key] = path
        return path


def check_cell(source: Path, path: Path, num_kept: int) -> None:
    """Far jumps first, as for context frames; then all in order, then some backwards."""
    is_bare = source.name.startswith("mpeg4") and path.suffix in (".ts", ".m2ts")
    settings = ("-bsf:v", "dump_extra") if is_bare else ()  # which MP4 keeps in its header
    ffmpeg("-i", source, "-c", "copy", *settings, path)
    video = FileVideo(path)
    jumps = [0, NUM_FRAMES // 3, 2 * NUM_FRAMES // 3, NUM_FRAMES - 1, 1, num_kept + 20, 7]
    assert len(video) == NUM_FRAMES
    seen = {index: video.read(index) for index in jumps}
    wrong, backwards = [], {}
    for index, shown in enumerate(shown_frames(path, *seen[0].shape[:2])):
        if max(difference(frame, shown) for frame in (video.read(index), seen.get(index, shown))) > 1:
            wrong.append(index)
        if index in range(NUM_FRAMES // 2, NUM_FRAMES // 2 + 4):
            backwards[index] = shown
    wrong += [index for index in sorted(backwards, reverse=True) if difference(video.read(index), backwards[index]) > 1]
    assert not wrong
    assert index == NUM_FRAMES - 1


CELLS = [cell for cell in itertools.product(CODECS, CONTAINERS) if cell not in IMPOSSIBLE]


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "suffix"), CELLS)
def test_frames_at_720p(encoded: Encoded, tmp_path: Path, codec: str, suffix: str) -> None:
    check_cell(encoded[codec, "1280x720"], tmp_path / f"clip.{suffix}", num_kept=24)


@pytest.mark.parametrize(("codec", "suffix"), sorted(QUICK))
def test_frames_of_small_videos(
    encoded: Encoded, tmp_path: Path, codec: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which as few are kept as at 720p."""
    monkeypatch.setattr("glus.data.video_file.KEPT_BYTES", 24 * 320 * 180 * 3)
    check_cell(encoded[codec, "320x180"], tmp_path / f"clip.{suffix}", num_kept=24)
