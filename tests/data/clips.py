"""Video files made by the ffmpeg program, and their frames as it shows them one after another."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from glus.pictures import write_movie


def ffmpeg(*arguments: object) -> None:
    """Run ffmpeg; its words are the error's."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def pattern(seconds: float, size: str = "160x96", rate: int = 30) -> tuple[str, ...]:
    """Arguments that make moving pictures, no two of which are alike."""
    return ("-f", "lavfi", "-i", f"testsrc2=s={size}:r={rate}:d={seconds}")


def shown_frames(path: Path, height: int, width: int) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 RGB of every frame, as ffmpeg decodes them in order; with more threads MPEG-4 may err."""
    arguments = ("-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", "-threads", "1", "-i", str(path.absolute()), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while data := process.stdout.read(height * width * 3):
            yield np.frombuffer(data, np.uint8).reshape(height, width, 3)


def difference(frame: np.ndarray, shown: np.ndarray) -> int:
    """The largest, in grey values."""
    return int(np.abs(frame.astype(np.int16) - shown).max())


def write_clip(path: Path, num_frames: int, width: int = 72, height: int = 32) -> Path:
    """Frame n is grey of level 8n, but for a red corner at the top left."""
    frames = np.repeat(8 * np.arange(num_frames, dtype=np.uint8), height * width * 3).reshape(-1, height, width, 3)
    frames[:, :16, :16] = (250, 0, 0)
    write_movie(path, frames, frames_per_second=5)
    return path


def levels(frames: list[np.ndarray]) -> list[int]:
    """The frame numbers that ``write_clip`` has drawn."""
    return [round(float(frame[20:-4, 20:-4].mean()) / 8) for frame in frames]
