"""Masks on frames, for people to look at: overlays, legends, strips, movies."""

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
from PIL import Image, ImageDraw, ImageFont

from glus.files import atomic_file, naming_write_errors

Colour = tuple[int, int, int]

OKABE_ITO: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (204, 121, 167),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (0, 114, 178),
)
"""Okabe and Ito's palette (without black), told apart with any colour vision: jfly.uni-koeln.de/color."""

FILL = 0.45
"""Share of the colour in a mask's inside."""
PAPER: Colour = (255, 255, 255)
INK: Colour = (20, 20, 20)
MOVIE_RATES = (0.01, 1000.0)
"""Least and most frames per second of a movie."""


def palette(count: int) -> list[Colour]:
    """Distinct colours for ``count`` sentences; past the seventh, paler and darker forms of the same hues.

    Raises:
        ValueError: more than 28 are asked for.
    """
    tones = [(0.0, 255), (0.5, 255), (0.5, 0), (0.75, 255)]  # how much of white (255) or black (0) is mixed in
    colours = [
        (round(r + share * (end - r)), round(g + share * (end - g)), round(b + share * (end - b)))
        for share, end in tones
        for r, g, b in OKABE_ITO
    ]
    if count > len(colours):
        raise ValueError(f"{count} sentences in one picture: there are only {len(colours)} distinct colours")
    return colours[:count]


def overlay(frame_HW3: np.ndarray, masks_EHW: np.ndarray, colours: Sequence[Colour]) -> np.ndarray:
    """Each mask as a translucent fill with a contour on a light rim, so that it shows on its own colour too.

    Where masks overlap, the contour of the earlier is wider, so that it is seen beside the later.

    Args:
        frame_HW3: uint8 RGB.
        masks_EHW: bool.
        colours: one per mask.

    Returns:
        (H, W, 3) uint8.
    """
    pixels = frame_HW3.astype(np.float32)
    for mask, colour in zip(masks_EHW, colours, strict=True):
        pixels[mask] += FILL * (np.array(colour, np.float32) - pixels[mask])
    picture = np.ascontiguousarray(pixels.round().astype(np.uint8))
    line = max(1, round(min(frame_HW3.shape[:2]) / 150))
    contours = [cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0] for mask in masks_EHW]
    widths = [
        line * (1 + 2 * sum(bool((mask & later).any()) for later in masks_EHW[number + 1 :]))
        for number, mask in enumerate(masks_EHW)
    ]
    for outline, width in zip(contours, widths, strict=True):
        cv2.drawContours(picture, outline, -1, PAPER, width + 2)
    for outline, width, colour in zip(contours, widths, colours, strict=True):
        cv2.drawContours(picture, outline, -1, colour, width)
    return picture


def fit(frame_HW3: np.ndarray, masks_EHW: np.ndarray, long_side: int) -> tuple[np.ndarray, np.ndarray]:
    """Frame and masks scaled so that the longer side has ``long_side`` pixels, edges of masks kept smooth."""
    height, width = frame_HW3.shape[:2]
    scale = long_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    frame = cv2.resize(frame_HW3, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    soft = cv2.INTER_LINEAR if scale > 1 else cv2.INTER_AREA
    masks = [cv2.resize(mask.astype(np.float32), size, interpolation=soft) >= 0.5 for mask in masks_EHW]
    return frame, np.array(masks, bool).reshape(len(masks_EHW), *frame.shape[:2])


def legend(texts: Sequence[str], colours: Sequence[Colour], width: int, text_size: int = 15) -> np.ndarray:
    """Sentences under each other, each with a square of its colour, wrapped to ``width``: (h, width, 3) uint8."""
    font = ImageFont.load_default(text_size)
    line_height, margin = round(text_size * 1.45), text_size // 2
    indent = margin + round(text_size * 1.5)
    blocks = [_wrap(text, font, width - indent - margin) for text in texts]
    height = line_height * sum(len(block) for block in blocks) + margin
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    top = margin // 2
    for block, colour in zip(blocks, colours, strict=True):
        box = (margin, top + line_height // 8, margin + text_size, top + line_height // 8 + text_size)
        draw.rectangle(box, fill=colour, outline=INK)
        for line in block:
            draw.text((indent, top), line, fill=INK, font=font)
            top += line_height
    return np.array(image)


def titled(picture_HW3: np.ndarray, title: str, text_size: int = 15) -> np.ndarray:
    """The picture below a line that names it."""
    bar = Image.new("RGB", (picture_HW3.shape[1], round(text_size * 1.45)), PAPER)
    ImageDraw.Draw(bar).text((text_size // 3, text_size // 8), title, fill=INK, font=ImageFont.load_default(text_size))
    return np.concatenate([np.array(bar), picture_HW3])


def side_by_side(pictures: Sequence[np.ndarray], gap: int = 6) -> np.ndarray:
    """Pictures of equal height next to each other."""
    space = np.full((pictures[0].shape[0], gap, 3), PAPER, np.uint8)
    parts = [part for picture in pictures for part in (space, picture)]
    return np.concatenate(parts[1:], axis=1)


def strip(
    text: str,
    names: Sequence[str],
    frames: Sequence[np.ndarray],
    rows: dict[str, np.ndarray],
    colour: Colour = OKABE_ITO[0],
    long_side: int = 256,
) -> np.ndarray:
    """One sentence over some frames of a video: a column per frame, a row per source of masks.

    Args:
        text: the sentence, written above.
        names: n names of frames, above the columns.
        frames: n frames (H, W, 3) uint8 RGB of equal size.
        rows: title -> (n, H, W) bool masks; "ground truth" first, "prediction" second, say.
        colour: of the masks.
        long_side: of a frame in the strip, in pixels.

    Returns:
        (h, w, 3) uint8.
    """
    lines = []
    for number, (title, masks_nHW) in enumerate(rows.items()):
        cells = [
            overlay(*fit(frame, mask[None], long_side), [colour]) for frame, mask in zip(frames, masks_nHW, strict=True)
        ]
        if number == 0:
            cells = [titled(cell, name, text_size=12) for cell, name in zip(cells, names, strict=True)]
        lines.append(titled(side_by_side(cells), title, text_size=13))
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


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most ``width`` pixels; a longer word has a line to itself."""
    lines: list[str] = []
    for word in text.split() or [""]:
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
