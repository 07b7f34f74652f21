"""Pictures around frames with masks: legends, strips, movies."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
from PIL import Image

from glus.files import atomic_file, naming_write_errors
from glus.fonts import ascent, draw_text, text_width, wrap
from glus.painter import FILL, INK, PAPER, SENTENCE_COLOURS, Colour, Painter, chip, label_size, numbers, palette

LABEL_SHARE = 0.3
"""Of a picture's width: sentences that take at most this much stand at their objects, longer ones below."""
MOVIE_RATES = (0.01, 1000.0)
"""Least and most frames per second of a movie."""


def fit(frame_HW3: np.ndarray, masks_EHW: np.ndarray, long_side: int) -> tuple[np.ndarray, np.ndarray]:
    """Frame and masks scaled so that the longer side has ``long_side`` pixels, edges of masks kept smooth."""
    height, width = frame_HW3.shape[:2]
    scale = long_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    frame = cv2.resize(frame_HW3, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    soft = cv2.INTER_LINEAR if scale > 1 else cv2.INTER_AREA
    masks = [cv2.resize(mask.astype(np.float32), size, interpolation=soft) >= 0.5 for mask in masks_EHW]
    return frame, np.array(masks, bool).reshape(len(masks_EHW), *frame.shape[:2])


def legend(texts: Sequence[str], colours: Sequence[Colour], width: int, size: int = 15) -> np.ndarray:
    """Sentences under each other, wrapped to ``width``, each beside its number and colour: (h, width, 3) uint8.

    A single sentence has no number. ``size`` is that of the letters, in pixels.
    """
    line_height, margin, gap = round(size * 1.4), size // 2, size // 3
    marks = [chip(label or "  ", colour, size) for label, colour in zip(numbers(len(texts)), colours, strict=True)]
    indent = 2 * margin + max(mark.shape[1] for mark in marks)
    blocks = [wrap(text, size, width - indent - margin) for text in texts]
    height = 2 * margin + sum(line_height * len(block) + gap for block in blocks) - gap
    image = Image.new("RGB", (width, height), PAPER)
    top = margin
    for mark, block in zip(marks, blocks, strict=True):
        image.paste(Image.fromarray(mark[..., :3]), (margin, top), Image.fromarray(mark[..., 3]))
        for line in block:
            draw_text(image, indent, top + 0.1 * size + ascent(size), line, size, INK)
            top += line_height
        top += gap
    return np.array(image)


def titled(picture_HW3: np.ndarray, title: str, size: int = 15) -> np.ndarray:
    """The picture below a line that names it."""
    bar = Image.new("RGB", (picture_HW3.shape[1], round(size * 1.6)), PAPER)
    draw_text(bar, size // 3, 0.2 * size + ascent(size), title, size, INK)
    return np.concatenate([np.array(bar), picture_HW3])


def annotate(texts: Sequence[str], frames: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
    """The pictures of a movie: short sentences stand at their objects, long ones in a legend below, by number.

    Args:
        texts: E sentences.
        frames: of one video: name, (H, W, 3) uint8 RGB, (E, H, W) bool masks.
    """
    painter, colours = None, palette(len(texts))
    for name, frame, masks in frames:
        size, width = label_size(frame), frame.shape[1]
        if painter is None:
            labels = list(texts) if len(texts) == 1 else [f"{number}  {text}" for number, text in enumerate(texts, 1)]
            are_short = all(text_width(label, size) <= LABEL_SHARE * width for label in labels)
            painter = Painter(labels if are_short else numbers(len(texts)), colours)
        below = [] if are_short else [legend(texts, colours, width, size)]
        yield np.concatenate([painter.draw(frame, masks, name), *below])


def side_by_side(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of equal height next to each other, six pixels apart."""
    space = np.full((pictures[0].shape[0], 6, 3), PAPER, np.uint8)
    parts = [part for picture in pictures for part in (space, picture)]
    return np.concatenate(parts[1:], axis=1)


def strip(
    text: str,
    names: Sequence[str],
    frames: Sequence[np.ndarray],
    rows: dict[str, np.ndarray],
    colour: Colour = SENTENCE_COLOURS[0],
    long_side: int = 256,
    fill: float = FILL,
) -> np.ndarray:
    """One sentence over some frames of a video: a column per frame, a row per source of masks.

    Args:
        text: the sentence, written above.
        names: n names of frames, above the columns.
        frames: n frames (H, W, 3) uint8 RGB of equal size.
        rows: title -> (n, H, W) bool masks; "ground truth" first, "prediction" second, say. "" writes no title.
        colour: of the masks.
        long_side: of a frame in the strip, in pixels.
        fill: share of the colour in a mask's inside.

    Returns:
        (h, w, 3) uint8.
    """
    lines: list[np.ndarray] = []
    for title, masks_nHW in rows.items():
        painter = Painter([""], [colour], fill)
        cells = [
            painter.draw(*fit(frame, mask[None], long_side)) for frame, mask in zip(frames, masks_nHW, strict=True)
        ]
        if not lines:
            cells = [titled(cell, name, size=12) for cell, name in zip(cells, names, strict=True)]
        line = side_by_side(cells)
        lines.append(titled(line, title, size=13) if title else line)
    return np.concatenate([legend([text], [colour], lines[0].shape[1]), *lines])


def check_movies(frames_per_second: float) -> None:
    """Encode a frame into nothing: what would keep a movie from being written shows before there is much to lose.

    Raises:
        ValueError: such a speed cannot be written.
        OSError: there is no ffmpeg, or it cannot encode.
    """
    least, most = MOVIE_RATES
    if not least <= frames_per_second <= most:
        raise ValueError(
            f"{frames_per_second} frames per second: expected more than 0, from {least:g} to {most:g} "
            "(frames_per_second; segment_video.py: --fps)"
        )
    if reason := _encode([np.zeros((16, 16, 3), np.uint8)], frames_per_second, ["-f", "null", "-"]):
        raise OSError(
            f"no movie can be written: {reason}; pip install --force-reinstall imageio-ffmpeg, or set "
            "IMAGEIO_FFMPEG_EXE to an ffmpeg that knows libx264"
        )


def write_movie(path: Path, frames: Iterable[np.ndarray], frames_per_second: float) -> None:
    """Write an MP4 (H.264, plays in browsers) or a GIF, by the suffix; an MP4 holds one frame in memory at a time.

    Args:
        path: ends in ``.mp4`` or ``.gif``; what is there already stays where an error comes.
        frames: at least one, (H, W, 3) uint8 RGB; those of another size than the first are scaled to it.
        frames_per_second: speed, see ``check_movies``.

    Raises:
        ValueError: another suffix.
        OSError: it cannot be written, for want of room for instance.
    """
    if path.suffix not in (".mp4", ".gif"):
        raise ValueError(f"movie {path}: expected a name ending in .mp4 or .gif")
    even = _of_one_even_size(frames)
    with atomic_file(path) as temporary, naming_write_errors(path):
        if path.suffix == ".gif":
            images = [_quantized(frame) for frame in even]
            duration = round(1000 / frames_per_second)
            images[0].save(temporary, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0)
        elif reason := _encode(even, frames_per_second, ["-f", "mp4", str(temporary)]):
            free = shutil.disk_usage(path.parent).free / 2**20
            raise OSError(f"cannot write movie {path}: {reason} ({free:,.0f} MiB free)")


def _encode(frames: Iterable[np.ndarray], frames_per_second: float, target: Sequence[str]) -> str:
    """Pipe frames of one size through ffmpeg; imageio_ffmpeg's own writer does not tell when it fails at the end.

    Returns:
        Why it failed; empty if it did not.
    """
    frames = iter(frames)
    first = next(frames)
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{first.shape[1]}x{first.shape[0]}"]
    rate, codec = ["-r", f"{frames_per_second:.6f}"], ["-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "15"]
    with tempfile.TemporaryFile() as messages:
        try:
            command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *source, *rate, "-i", "-", *codec, *target]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=messages)
        except (RuntimeError, OSError) as error:  # the first where there is none, the second where it does not start
            return str(error)
        with process:
            assert process.stdin is not None
            try:
                for frame in chain([first], frames):
                    process.stdin.write(np.ascontiguousarray(frame).data)
                process.stdin.close()
            except BrokenPipeError:  # ffmpeg has given up; it says why
                process.wait()
            except BaseException:
                process.kill()
                raise
        messages.seek(0)
        reason = messages.read().decode(errors="replace").strip()
    return (reason.splitlines()[-1] if reason else f"ffmpeg exit {process.returncode}") if process.returncode else ""


def _quantized(frame_HW3: np.ndarray) -> Image.Image:
    """For a GIF. Median cut, Pillow's default, gives up rare colours, such as those of a legend; an octree does not."""
    return Image.fromarray(frame_HW3).quantize(192, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def _of_one_even_size(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Frames of the first one's size, its last row and column repeated where it is odd, as H.264 needs it even."""
    size: tuple[int, int] | None = None
    for frame in frames:
        size = size or (frame.shape[1], frame.shape[0])
        if frame.shape[1::-1] != size:
            frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        yield np.pad(frame, ((0, size[1] % 2), (0, size[0] % 2), (0, 0)), mode="edge")
