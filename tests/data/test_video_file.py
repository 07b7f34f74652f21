"""Frames of video files against those that the ffmpeg program decodes in order, whatever the container."""

from __future__ import annotations

import gc
import logging
import os
import random
import shutil
import struct
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from glus.data import video_file
from glus.data.frames import open_video
from glus.data.video_file import FileVideo
from tests.data.clips import difference, ffmpeg, levels, pattern, shown_frames, write_clip

COPY = ("-c", "copy")
X264 = ("-c:v", "libx264", "-preset", "veryfast", "-g", 30)
X265 = ("-c:v", "libx265", "-preset", "ultrafast")
VP9 = ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", 8, "-g", 30)
MPEG2 = ("-c:v", "mpeg2video", "-g", 15, "-bf", 2)
MPEG4 = ("-c:v", "mpeg4", "-g", 30, "-bf", 2)
FIELDS = ("-vf", "tinterlace=interleave_top,fieldorder=tff")

BASES: dict[str, Sequence[object]] = {
    "h264.mp4": (*pattern(4), *X264),
    "base.ts": (*pattern(4), *X264),
    "hevc.mp4": (*pattern(4), *X265, "-x265-params", "log-level=0:keyint=30"),
    "open.mp4": (*pattern(4), *X264, "-x264-params", "open-gop=1:b-pyramid=normal:bframes=5:ref=5:scenecut=0"),
    "mpeg2.mpg": (*pattern(4), *MPEG2),
    "vp9.webm": (*pattern(4), *VP9),
    "sound.mp4": ("-f", "lavfi", "-i", "sine=d=4", *pattern(4), *X264, "-c:a", "aac"),
    "fields.mp4": (*pattern(4), *FIELDS, *X264, "-flags", "+ildct+ilme", "-x264-params", "tff=1"),
}
"""Files that others are made of."""
CASES: dict[str, Sequence[object]] = {
    # trimmed without encoding: an edit list hides what precedes the beginning, or players show it
    "trimmed.mp4": ("-ss", 1.1, "-i", "h264.mp4", *COPY),
    "trimmed.mov": ("-ss", 1.1, "-i", "h264.mp4", *COPY),
    "trimmed_twice.mp4": ("-ss", 1.1, "-t", 1.53, "-i", "h264.mp4", *COPY),
    "trimmed_open.mp4": ("-ss", 1.1, "-t", 2, "-i", "open.mp4", *COPY),
    "trimmed_hevc.mp4": ("-ss", 1.1, "-i", "hevc.mp4", *COPY),
    "trimmed.mkv": ("-ss", 1.1, "-i", "h264.mp4", *COPY),
    "trimmed.ts": ("-ss", 1.1, "-i", "h264.mp4", *COPY),
    "trimmed.mpg": ("-ss", 1.1, "-i", "mpeg2.mpg", *COPY),
    "trimmed_fragments.mp4": ("-ss", 1.1, "-i", "h264.mp4", *COPY, "-movflags", "frag_keyframe"),
    "trimmed_sound.mp4": ("-ss", 1.1, "-i", "sound.mp4", *COPY),
    # begins late
    "late.mp4": ("-itsoffset", 2, "-i", "h264.mp4", *COPY),
    "late_sound.mp4": ("-i", "sound.mp4", "-itsoffset", 0.7, "-i", "h264.mp4", "-map", "0:a", "-map", "1:v", *COPY),
    "late_times.mp4": ("-i", "h264.mp4", *COPY, "-movflags", "negative_cts_offsets"),
    "fragments.mp4": ("-i", "h264.mp4", *COPY, "-movflags", "frag_keyframe+empty_moov"),
    # streams
    "h264.ts": ("-i", "h264.mp4", *COPY),
    "h264.m2ts": ("-i", "h264.mp4", *COPY),
    "hevc.ts": ("-i", "hevc.mp4", *COPY),
    "open.ts": ("-i", "open.mp4", *COPY),
    "short.ts": ("-t", 0.9, "-i", "h264.mp4", *COPY),
    "mpeg2.ts": ("-i", "mpeg2.mpg", *COPY),
    "mpeg2.vob": ("-i", "mpeg2.mpg", *COPY),
    "mpeg1.mpg": (*pattern(4), "-c:v", "mpeg1video", "-g", 15, "-bf", 2),
    "raw.h264": ("-i", "h264.mp4", *COPY),
    "raw.hevc": ("-i", "hevc.mp4", *COPY),
    "raw.m2v": (*pattern(4), *MPEG2),
    "raw.mjpeg": (*pattern(2), "-c:v", "mjpeg"),
    # packets in the order of decoding, without times of showing
    "h264.avi": ("-i", "h264.mp4", *COPY),
    "open.avi": ("-i", "open.mp4", *COPY),
    "hevc.avi": ("-i", "hevc.mp4", *COPY),
    "mpeg4.avi": (*pattern(4), *MPEG4),
    "xvid.avi": (*pattern(4), "-c:v", "libxvid", "-g", 30, "-bf", 2),
    "mpeg4.mkv": (*pattern(4), *MPEG4),
    "h264.asf": ("-i", "h264.mp4", *COPY),
    "wmv2.wmv": (*pattern(4), "-c:v", "wmv2", "-g", 30),
    "h264.flv": ("-i", "h264.mp4", *COPY),
    "theora.ogv": (*pattern(4), "-c:v", "libtheora", "-g", 30),
    "h263.3gp": (*pattern(4, "176x144"), "-c:v", "h263"),
    # groups that refer to others, pictures that are refreshed bit by bit
    "hevc.mkv": ("-i", "hevc.mp4", *COPY),
    "open.mkv": ("-i", "open.mp4", *COPY),
    "refreshed.mp4": (*pattern(4), *X264, "-x264-params", "intra-refresh=1:keyint=30:bframes=0"),
    "repeated_settings.mp4": ("-i", "base.ts", *COPY),
    # without duration, or with frames that are not shown
    "live.mkv": ("-i", "h264.mp4", *COPY, "-live", 1),
    "live.webm": ("-i", "vp9.webm", *COPY, "-live", 1),
    "hidden.webm": (*pattern(4), "-c:v", "libvpx", "-auto-alt-ref", 1, "-lag-in-frames", 16, "-cpu-used", 8,
                    "-deadline", "realtime"),
    "vp9.mp4": ("-i", "vp9.webm", *COPY),
    "dropped.mkv": ("-i", "h264.mp4", *COPY, "-bsf:v", "noise=drop='not(mod(n+1\\,17))'"),
    "dropped.ts": ("-i", "h264.mp4", *COPY, "-bsf:v", "noise=drop='not(mod(n+1\\,17))'"),
    # interlaced
    "fields.ts": ("-i", "fields.mp4", *COPY),
    "fields_mpeg2.mpg": (*pattern(4), *FIELDS, *MPEG2, "-flags", "+ildct+ilme"),
    # colours
    "ten_bits.mp4": (*pattern(4), *X265, "-pix_fmt", "yuv420p10le", "-x265-params", "log-level=0"),
    "bt709.mp4": (*pattern(2), "-vf", "scale=out_color_matrix=bt709:out_range=full", *X264, "-colorspace", "bt709",
                  "-color_range", "pc"),
    "grey.mp4": (*pattern(2), *X264, "-pix_fmt", "gray"),
    "odd.mkv": (*pattern(2, "161x97"), *X264, "-pix_fmt", "yuv444p"),
    "alpha.webm": (*pattern(2), *VP9, "-pix_fmt", "yuva420p"),
    "prores.mov": (*pattern(4), "-c:v", "prores_ks", "-profile:v", 4, "-pix_fmt", "yuva444p10le"),
    "mjpeg.avi": (*pattern(4), "-c:v", "mjpeg"),
    "palette.avi": (*pattern(2), "-vf", "split[a][b];[a]palettegen[p];[b][p]paletteuse", "-c:v", "rawvideo",
                    "-pix_fmt", "pal8"),
    "av1.mp4": (*pattern(4), "-c:v", "libsvtav1", "-preset", 12, "-g", 30),
    # rate, number, tracks
    "variable.mkv": (*pattern(4), "-vf", "select='not(mod(n,3))+gt(n,60)'", "-fps_mode", "vfr", *X264),
    "one.mp4": (*pattern(4), "-frames:v", 1, *X264),
    "two.avi": (*pattern(4), "-frames:v", 2, *MPEG4),
    "three.h264": (*pattern(4), "-frames:v", 3, *X264),
    "tracks.mp4": (*pattern(1, "96x64"), *pattern(2), "-map", 0, "-map", 1, *X264),
    "gif.gif": pattern(1),
}  # fmt: skip
PLAIN = {
    "late.mp4",
    "late_times.mp4",
    "late_sound.mp4",
    "fragments.mp4",
    "trimmed_fragments.mp4",
    "bt709.mp4",
    "grey.mp4",
    "one.mp4",
}
"""Those of ``CASES`` that decord reads."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ``BASES``."""
    folder = tmp_path_factory.mktemp("bases")
    for name, arguments in BASES.items():
        ffmpeg(*arguments, folder / name)
    return folder


def make(bases: Path, path: Path, arguments: Sequence[object]) -> Path:
    """A file of ``CASES``."""
    placed = [bases / str(argument) if str(argument) in BASES else argument for argument in arguments]
    ffmpeg(*placed, path)
    return path


def check_frames(path: Path, monkeypatch: pytest.MonkeyPatch) -> FileVideo:
    """Number and pixels, in order, after far jumps, and backwards; hardly a frame is kept in between."""
    monkeypatch.setattr(video_file, "KEPT_BYTES", 0)
    monkeypatch.setattr(video_file, "MIN_KEPT", 2)
    video = FileVideo(path)
    shown = list(shown_frames(path, *video.read(0).shape[:2]))
    assert len(video) == len(shown)
    order = list(range(len(shown)))
    jumps = random.Random(0).sample(order, min(20, len(order)))
    wrong = [index for index in (*order, *jumps, *order[:-12:-1]) if difference(video.read(index), shown[index]) > 1]
    assert not wrong
    return video


@pytest.mark.parametrize("name", CASES)
def test_frames_are_those_that_ffmpeg_shows(
    bases: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B6: also of what decord cannot read, such as AV1 and GIF."""
    video = check_frames(make(bases, tmp_path / name, CASES[name]), monkeypatch)
    assert (video._plain is not None) == (name in PLAIN)


def test_frames_are_the_same_without_decord(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no wheels for ARM."""
    assert FileVideo(bases / "h264.mp4")._plain is not None
    monkeypatch.setitem(sys.modules, "decord", None)
    assert check_frames(bases / "h264.mp4", monkeypatch)._plain is None


@pytest.mark.parametrize("width", [48, 72])  # decord pads the rows of the narrow one
def test_a_video_file_is_decoded_by_index(tmp_path: Path, width: int) -> None:
    video = open_video(write_clip(tmp_path / "clip.mp4", 3, width))
    assert isinstance(video, FileVideo)
    assert video.names == ("00000", "00001", "00002")
    assert video.frames_per_second == 5
    frames = [video.read(index) for index in (2, 0, 1)]
    assert all(frame.shape == (32, width, 3) and frame.dtype == np.uint8 for frame in frames)
    assert levels(frames) == [2, 0, 1]


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
@pytest.mark.parametrize("order", [range(30), range(29, -1, -1), [3, 0, 29, 14, 2, 28]], ids=["up", "down", "jumps"])
def test_frames_are_the_same_in_any_order_and_from_many_threads(
    tmp_path: Path, suffix: str, order: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_file, "KEPT_BYTES", 0)  # so that frames are forgotten within this short clip
    video = FileVideo(write_clip(tmp_path / f"clip.{suffix}", 30))
    with ThreadPoolExecutor(4) as pool:
        assert levels(list(pool.map(video.read, order))) == list(order)


def test_the_rate_is_that_of_the_frames_that_are_shown(bases: Path, tmp_path: Path) -> None:
    for name in ("trimmed.mp4", "h264.avi", "h264.ts", "live.mkv", "late.mp4"):
        video = FileVideo(make(bases, tmp_path / name, CASES[name]))
        assert video.frames_per_second == pytest.approx(30, rel=1e-3), name
    assert FileVideo(make(bases, tmp_path / "raw.h264", CASES["raw.h264"])).frames_per_second == 25


def test_a_variable_rate_video_gives_each_frame_once(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 10)
    late = "setpts=if(lt(N\\,5)\\,N*0.2\\,1+(N-5)*0.6)/TB"
    ffmpeg("-i", clip, "-vf", late, "-fps_mode", "vfr", tmp_path / "variable.mp4")
    video = FileVideo(tmp_path / "variable.mp4")
    assert levels([video.read(index) for index in range(len(video))]) == list(range(10))
    assert 2 < video.frames_per_second < 5


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("flips", [[], ["-display_hflip"]], ids=["", "mirrored"])
def test_a_frame_stands_as_ffmpeg_shows_it(tmp_path: Path, suffix: str, turn: int, flips: list[str]) -> None:
    """In all eight positions that a display matrix of quarter turns and flips can give."""
    clip, laid = write_clip(tmp_path / "clip.mp4", 3), tmp_path / f"laid.{suffix}"
    ffmpeg("-display_rotation", turn, *flips, "-i", clip, "-c", "copy", laid)
    ffmpeg("-i", laid, "-frames:v", 1, tmp_path / "frame.png")
    shown, frame = np.array(Image.open(tmp_path / "frame.png")), open_video(laid).read(0)
    assert frame.shape == shown.shape
    assert min(frame.strides) > 0  # torch takes no others
    assert difference(frame, shown) <= 1
    assert all(difference(np.flip(frame, axes), shown) > 10 for axes in (0, 1, (0, 1)))


def with_clean_aperture(path: Path) -> Path:
    """100 x 60 pixels remain of 160 x 96, the middle of which lies 6 further left and 2 further up."""
    data = bytearray(path.read_bytes())
    at = data.index(b"avcC") - 4
    data[at:at] = struct.pack(">I4s8i", 40, b"clap", 100, 1, 60, 1, -6, 1, -2, 1)
    for kind in (b"avc1", b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"):  # in which it lies
        begin = data.rindex(kind, 0, at) - 4
        data[begin : begin + 4] = (int.from_bytes(data[begin : begin + 4], "big") + 40).to_bytes(4, "big")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mov", "cut.mkv", "live.mkv", "tracks.mkv", "turned.mov"])
def test_what_the_container_cuts_off_is_not_shown(
    bases: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ffmpeg("-i", bases / "sound.mp4", "-map", "0:a", "-map", "0:v", *COPY, tmp_path / "whole.mp4")
    clip, turned = with_clean_aperture(tmp_path / "whole.mp4"), name.startswith("turned")
    before = ("-display_rotation", 90) if turned else ()
    sound = ("-map", 0) if name.startswith("tracks") else ("-an",)
    live = ("-live", 1) if name.startswith("live") else ()
    ffmpeg(*before, "-i", clip, *sound, *COPY, *live, tmp_path / name)
    video = check_frames(tmp_path / name, monkeypatch)
    assert video.read(0).shape == ((100, 60, 3) if turned else (60, 100, 3))
    assert video._plain is None


@pytest.mark.parametrize("suffix", ["avi", "mov", "mkv"])
def test_a_video_of_photos_stands_as_they_do(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each JPEG has its EXIF still."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    for number in range(3):
        Image.fromarray(noise // (number + 1)).save(tmp_path / f"{number}.jpg", exif=exif)
    ffmpeg("-i", tmp_path / "%d.jpg", *COPY, tmp_path / f"photos.{suffix}")
    assert check_frames(tmp_path / f"photos.{suffix}", monkeypatch).read(0).shape == (90, 60, 3)


def test_a_video_aslant_is_refused(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 3)
    for flips, words in (((), "is turned by"), (("-display_hflip",), "is mirrored and turned by")):
        ffmpeg("-display_rotation", 30, *flips, "-i", clip, *COPY, tmp_path / "laid.mp4")
        with pytest.raises(ValueError, match=rf"laid.mp4 {words} no quarter turn"):
            open_video(tmp_path / "laid.mp4")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
def test_all_frames_have_the_size_of_the_first(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, part = (VP9, "webm") if suffix == "webm" else (X264, "ts")
    for name, size in (("a", "160x96"), ("b", "120x72")):
        ffmpeg(*pattern(0.5, size), *codec, tmp_path / f"{name}.{part}")
    if part == "ts":
        joined = tmp_path / "joined.ts"
        joined.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
        ffmpeg("-i", joined, *COPY, tmp_path / f"joined.{suffix}")
    else:
        (tmp_path / "list").write_text("file a.webm\nfile b.webm\n")
        ffmpeg("-f", "concat", "-i", tmp_path / "list", *COPY, tmp_path / "joined.webm")
    video = check_frames(tmp_path / f"joined.{suffix}", monkeypatch)
    assert {video.read(index).shape for index in range(len(video))} == {(96, 160, 3)}


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_cover_is_no_frame(bases: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ffmpeg(*pattern(1, "640x640"), "-frames:v", 1, tmp_path / "cover.png")
    inputs = ("-i", tmp_path / "cover.png", "-i", bases / "h264.mp4", "-map", 0, "-map", 1)
    ffmpeg(*inputs, *COPY, "-disposition:v:0", "attached_pic", tmp_path / f"covered.{suffix}")
    assert len(check_frames(tmp_path / f"covered.{suffix}", monkeypatch)) == 120
    ffmpeg("-i", tmp_path / "cover.png", *COPY, "-disposition:v:0", "attached_pic", tmp_path / "alone.mp4")
    with pytest.raises(ValueError, match=r"alone.mp4 holds no video stream"):
        open_video(tmp_path / "alone.mp4")


@pytest.mark.parametrize(
    "name", ["clip:1.mp4", "12:30:45.mp4", "file:x.mp4", "http:x.mkv", "%03d 'ä'.mp4", "a\udcff.mp4"]
)
def test_a_video_may_have_any_name(bases: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ffmpeg("-i", bases / "h264.mp4", *COPY, f"clip{Path(name).suffix}")
    os.rename(f"clip{Path(name).suffix}", name)
    assert open_video(name).read(100).shape == (96, 160, 3)


def pq(light: float) -> float:
    """Signal from 0 to 1 of cd/m2 (SMPTE ST 2084)."""
    power = (light / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(light: float) -> float:
    """Signal from 0 to 1 of cd/m2 that grey has on a screen of 1000 (BT.2100)."""
    scene = (light / 1000) ** (1 / 1.2)
    return (3 * scene) ** 0.5 if scene <= 1 / 12 else 0.17883277 * np.log(12 * scene - 0.28466892) + 0.55991073


@pytest.mark.parametrize(("transfer", "signal"), [("smpte2084", pq), ("arib-std-b67", hlg)])
def test_hdr_is_mapped_to_sdr_and_announced(
    tmp_path: Path, transfer: str, signal: object, caplog: pytest.LogCaptureFixture
) -> None:
    """What is darker than SDR's white by a knee stays, as on a screen of gamma 2.4; what is brighter fits in above."""
    lights = [0, 5, 20, 50, 100, 203, 400, 1000]
    assert callable(signal)
    levels = np.repeat([round(65535 * signal(light)) if light else 0 for light in lights], 16)
    frame = np.broadcast_to(levels[None, :, None], (32, 128, 3)).astype("<u2")
    (tmp_path / "frame").write_bytes(np.tile(frame, (3, 1, 1, 1)).tobytes())
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", "128x32", "-i", tmp_path / "frame")
    colours = f"setparams=color_primaries=bt2020:color_trc={transfer}:colorspace=bt2020nc"
    filters = ("-vf", f"scale=out_color_matrix=bt2020,format=yuv420p10le,{colours}")
    ffmpeg(*raw, *filters, *X265, "-crf", 4, "-x265-params", "log-level=0", tmp_path / "hdr.mp4")
    with caplog.at_level(logging.WARNING):
        video = FileVideo(tmp_path / "hdr.mp4")
        seen = [int(level) for level in video.read(2)[16, 8::16, 0]]
    assert [record.message for record in caplog.records] == [
        f"video {tmp_path / 'hdr.mp4'} is HDR ({'PQ' if signal is pq else 'HLG'}): its colours are mapped to SDR"
    ]
    for light, level in zip(lights[:5], seen, strict=False):
        assert level == pytest.approx(255 * (light / 203) ** (1 / 2.4), abs=4), light
    assert seen == sorted(seen)
    assert seen[-1] >= 250


def test_colours_that_nothing_converts_are_named(bases: Path, tmp_path: Path) -> None:
    ictcp = "h264_metadata=matrix_coefficients=14"
    ffmpeg("-i", bases / "h264.mp4", *COPY, "-bsf:v", ictcp, tmp_path / "odd.mp4")
    with pytest.raises(ValueError, match=r"odd.mp4 cannot be made RGB: nothing converts yuv420p with matrix 14"):
        open_video(tmp_path / "odd.mp4")


def test_a_file_without_frames_is_named(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", tmp_path / "sound.mp4")
    ffmpeg("-i", write_clip(tmp_path / "clip.mp4", 3), "-frames:v", 0, "-c", "copy", tmp_path / "empty.mp4")
    for name in ("sound.mp4", "empty.mp4"):
        with pytest.raises(ValueError, match=rf"{name} holds no video stream, or one without frames"):
            open_video(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"no video at all", "does not decode: Invalid data"),
        (b"", "does not decode: it is empty"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1", "git lfs pull"),
        (b"\0\0\0\x20ftypheic" + bytes(20), "is a HEIF or AVIF picture"),
    ],
)
def test_a_file_that_is_no_video_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "clip.mp4").write_bytes(data)
    with pytest.raises(ValueError, match=rf"clip.mp4 .*{words}"):
        open_video(tmp_path / "clip.mp4")


def test_a_codec_that_nothing_decodes_is_named(bases: Path, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes((bases / "h264.mp4").read_bytes().replace(b"avc1", b"what"))
    with pytest.raises(ValueError, match=r"clip.mp4 is of a codec that PyAV \S+ does not decode; make it H.264"):
        open_video(tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("moov.mp4", "does not decode: an MP4 without index, as an interrupted recording or download leaves it"),
        ("cut.mp4", r"is cut short or damaged: of 120 frames that it lists, \d+ are there; copy or download it again"),
        ("fragments.mp4", r"is cut short or damaged: of \d+ frames that it lists, \d+ are there"),
        ("cut.mkv", r"is cut short: it has [\d,]+ of the [\d,]+ bytes that it tells of; copy or download it again"),
        ("cut.webm", r"is cut short: it has [\d,]+ of the [\d,]+ bytes"),
        ("cut.avi", r"is cut short: it has [\d,]+ of the [\d,]+ bytes"),
        ("cut.flv", r"frame \d+ of video .* does not decode: Invalid data"),
        ("cut.mpg", r"frame \d+ of video .* does not decode: its data are damaged"),
    ],
)
def test_an_interrupted_download_is_named(bases: Path, tmp_path: Path, name: str, words: str) -> None:
    source = bases / {".webm": "vp9.webm", ".mpg": "mpeg2.mpg"}.get(Path(name).suffix, "h264.mp4")
    flags = {"cut.mp4": "+faststart", "fragments.mp4": "frag_keyframe+empty_moov"}.get(name)
    ffmpeg("-i", source, *COPY, *(("-movflags", flags) if flags else ()), tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(ValueError, match=words):
        open_video(tmp_path / name)


NOISE = ("-f", "lavfi", "-i", "nullsrc=s=64x48:r=30:d=2,geq=random(1)*255:128:128")
"""Frames of which none is small."""


def damaged(path: Path, share: float) -> Path:
    """Zeroes in the middle of a file."""
    data = bytearray(path.read_bytes())
    middle, length = len(data) // 2, round(share * len(data))
    data[middle : middle + length] = bytes(length)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_damage_in_the_middle_of_a_video_is_named(tmp_path: Path, suffix: str) -> None:
    clip = tmp_path / f"clip.{suffix}"
    ffmpeg(*NOISE, "-g", 10, clip)
    video = FileVideo(damaged(clip, 1 / 8))
    assert video.read(0).shape == (48, 64, 3)
    with pytest.raises(
        ValueError, match=rf"frame \d+ of video .*clip.{suffix} does not decode: .* copy or download it"
    ):
        [video.read(index) for index in range(len(video))]


@pytest.mark.parametrize(
    ("suffix", "words"),
    [
        ("mpg", r"frame \d+ of video .*mpg does not decode"),
        ("ts", r"frame \d+ of video .*ts does not decode"),
        ("avi", r"is cut short or damaged: of 60 frames that it lists, \d+ are there"),
    ],
)
def test_damage_is_found_where_frames_are_counted(tmp_path: Path, suffix: str, words: str) -> None:
    clip = tmp_path / f"clip.{suffix}"
    ffmpeg(*NOISE, "-g", 10, clip)
    with pytest.raises(ValueError, match=words):
        FileVideo(damaged(clip, 1 / 8))


def test_the_frame_that_is_damaged_is_named_and_others_are_read(tmp_path: Path) -> None:
    """By PyAV, where decord fails."""
    clip = tmp_path / "clip.mp4"
    ffmpeg(*pattern(3), *X264, "-bf", 0, "-x264-params", "scenecut=0", clip)
    video = FileVideo(clip)
    whole = [video.read(index) for index in range(90)]
    packet = video._decoder._track.packets[40]
    data = bytearray(clip.read_bytes())
    data[packet.position : (packet.position or 0) + packet.size] = bytes(packet.size)
    clip.write_bytes(data)
    video = FileVideo(clip)
    assert video._plain is not None
    assert all(difference(video.read(index), whole[index]) <= 1 for index in (*range(60, 90), *range(40)))
    for index in (40, 59):
        with pytest.raises(ValueError, match=r"frame 40 of video .* does not decode: Invalid data found"):
            video.read(index)
    assert video._plain is None


def test_frames_that_are_lost_are_announced(bases: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Matroska finds its way again behind damage, so that later frames move up; players show them so."""
    shutil.copy(bases / "vp9.webm", tmp_path / "clip.webm")
    assert len(FileVideo(tmp_path / "clip.webm")) == 120
    assert not caplog.text
    assert len(FileVideo(damaged(tmp_path / "clip.webm", 1 / 10))) < 120
    assert "others missing" in caplog.text or "may be cut short" in caplog.text
    caplog.clear()
    ffmpeg("-i", bases / "h264.mp4", *COPY, "-bsf:v", "noise=drop='between(n\\,50\\,60)'", tmp_path / "clip.ts")
    assert len(FileVideo(tmp_path / "clip.ts")) == 109
    assert "some of its 109 frames may be damaged, or others missing (2 gaps in time, 0 torn packets)" in caplog.text


def test_a_recording_that_begins_in_the_middle_of_a_group_is_read(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (bases / "base.ts").read_bytes()
    (tmp_path / "later.ts").write_bytes(data[188 * (len(data) // 188 // 3) :])
    (tmp_path / "twice.ts").write_bytes(2 * data)
    assert 30 <= len(check_frames(tmp_path / "later.ts", monkeypatch)) < 100
    assert len(check_frames(tmp_path / "twice.ts", monkeypatch)) == 240


def test_decoded_frames_are_forgotten(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the garbage collector, to which a few frames of 4K are a few small objects."""
    monkeypatch.setattr(video_file, "KEPT_BYTES", 0)
    video = FileVideo(bases / "hevc.mp4")
    gc.collect()
    gc.disable()
    try:
        for index in range(len(video)):
            video.read(index)
        alive = [thing for thing in gc.get_objects() if type(thing).__name__ == "VideoFrame"]
    finally:
        gc.enable()
    assert len(alive) < 2 * video_file.MIN_KEPT + 8
