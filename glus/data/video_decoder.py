"""The frames of a video file by number, as FFmpeg shows them one after another (by PyAV, whose wheels bring FFmpeg).

A file is read once without decoding. Where its container says which frames there are and in which order, that is the
index; otherwise all frames are decoded once, to count them. Packets are numbered, and a frame is known by the number of
its packet, whatever times the file gives: after a jump the right frame comes, or decoding starts further ahead, at last
from the beginning.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cached_property
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.filter import Graph
from av.filter.context import FilterContext
from av.packet import Packet as AvPacket
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from glus.data.video_container import (
    HEIF_BRANDS,
    Crop,
    FrameIndex,
    Packet,
    count_gaps,
    iso_brand,
    lost_packets,
    order_by_time,
    read_crop,
    told_size,
)
from glus.files import stand_in

log = logging.getLogger(__name__)

DECODER_THREADS = 4
"""That decode; some decoders hold frames for each of them."""
PROBED_MP4, PROBED = 2, 16
"""Frames at the beginning that must come out as the container promises. MP4 also tells how far they are reordered."""
NEAR = 8
"""Frames that are rather decoded and passed over than jumped over."""
ONE_FRAME_A_PACKET = ("h264", "hevc", "av1", "vp9", "prores", "mjpeg")
"""Codecs of which every packet in MP4 and Matroska is a frame to show, unless it is a field; others hide some."""
DEFAULT_RATE = 25.0
"""Frames per second where the file knows none."""
MISSING_SECONDS = 0.3
"""At the end of a video that are worth a warning."""
IDR, SETTINGS = 5, 7
"""Kinds of units in H.264."""
EXIF = 31
"""Kind of side data of a frame; PyAV 18 fails at all of them where it knows one not."""
UNSPECIFIED = 2
"""Matrix of colours, in H.273."""
MAX_ASLANT = 0.02
"""Of a quarter turn, for want of digits."""
NO_FRAMES = "holds no video stream, or one without frames; expected a video file"
COPY_AGAIN = "copy or download it again, or keep what decodes by: ffmpeg -i IN OUT.mp4"
Frames = Iterator[tuple[int, VideoFrame]]
"""Decoded, each with the number of its packet."""
Numbered = Iterator[tuple[int, AvPacket]]


class VideoDecoder:
    """The frames of a video file, decoded by FFmpeg; not for several threads at once.

    Raises:
        ValueError: the file is no video, is cut short or damaged, its codec is unknown, or it is to be shown aslant.
    """

    def __init__(self, path: Path):
        self._path, self._track = path, _Track(path)
        self._to_rgb = _RgbConverter(path, self._track.crop)
        self._frames: Frames = iter(())
        self._next = 0  # the frame that decoding on gives
        shown, first, is_told = self._told_order() or self._counted()
        self._to_rgb(first)  # what cannot be shown is refused now
        self._index = FrameIndex(self._track.packets, shown)
        self.is_plain = is_told and self._index.is_closed and self._track.is_plain and _is_plain(first, path)
        """Whether any program counts these frames and finds them again: H.264 in MP4 with nothing special to it."""
        self.frames_per_second = self._index.frames_per_second(self._track.time_base) or self._track.rate
        """Average over the video."""
        self._track.warn(len(shown))

    def __len__(self) -> int:
        return len(self._index.shown)

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB of a frame; not to be written to.

        Raises:
            ValueError: it does not decode.
        """
        points = self._index.seek_points(index)
        is_near = points[0].frame <= self._next + NEAR and self._next <= index
        for point in [None, *points] if is_near else points:
            if point is not None:
                self._frames, self._next = self._track.decode(point.packet), point.frame
            frame = self._forward(index)
            if frame is not None:
                return self._to_rgb(frame)
        raise ValueError(self._track.damage(self._next, self._index.shown[self._next]))

    def _forward(self, index: int) -> VideoFrame | None:
        """Decode up to a frame; None where one is missing on the way."""
        for number, frame in self._frames:
            if number == self._index.shown[self._next]:
                self._next += 1
                if self._next > index:
                    return frame
            elif self._index.places.get(number, -1) > self._next:
                break
            # Otherwise it is shown before the frame at which decoding started, and may lack what it refers to.
        self._frames = iter(())
        return None

    def _told_order(self) -> tuple[list[int], VideoFrame, bool] | None:
        """Packets of all frames, as the container tells them and the first ones prove; the first frame; True."""
        shown = order_by_time(self._track.packets) if self._track.tells_order else None
        frames = list(islice(self._track.decode(), self._track.num_probed)) if shown else []
        if not shown or [number for number, _ in frames] != shown[: self._track.num_probed]:
            return None
        has_fields = any(frame.interlaced_frame for _, frame in frames)
        return None if has_fields else (shown, frames[0][1], True)

    def _counted(self) -> tuple[list[int], VideoFrame, bool]:
        """Packets of all frames that decoding gives; the first frame; False."""
        track, shown, first, has_fields = self._track, list[int](), None, False
        log.info("video %s: all its frames are decoded once, to count them", self._path)
        for number, frame in track.decode():
            first = frame if first is None else first
            has_fields |= frame.interlaced_frame
            shown.append(number)
        if first is None:
            raise ValueError(track.damage(0, 0) if track.failures else f"{self._path} {NO_FRAMES}")
        lost = lost_packets(track.packets, shown) if track.is_one_to_one and not has_fields else []
        torn = [number for number, packet in enumerate(track.packets) if not packet.is_whole]
        # What precedes the first frame belongs to one that began before the file did.
        damaged = [number for number in chain(track.failures, lost, torn) if number > shown[0]]
        if damaged:
            raise ValueError(track.damage(sum(number < min(damaged) for number in shown), min(damaged)))
        return shown, first, False


class _Track:
    """The packets of the video track that players show, by number, and what they decode to.

    Every decoding opens the file anew, so that it does not depend on what was decoded before.
    """

    def __init__(self, path: Path):
        self._path = path
        self.failures: dict[int, str] = {}
        """Packets that do not decode, and why."""
        container, stream = _open(path)
        with container:
            name, codec = container.format.name, stream.codec_context.codec.canonical_name
            self.packets, self._num_torn = list[Packet](), 0
            is_mp4, is_matroska = name.startswith("mov,"), name.startswith("matroska,")
            size = stream.width, stream.height
            self.crop = read_crop(path, is_mp4, stream.index, size) if is_mp4 or is_matroska else None
            self.is_plain = is_mp4 and codec == "h264" and len(container.streams.video) == 1 and not self.crop
            """Whether decoding begins anew at every key frame, as far as a look at the packets tells."""
            has_palette = stream.codec_context.pix_fmt == "pal8"  # which comes with the first packet alone
            for packet in _demux(container, stream):
                is_whole = not packet.is_corrupt or name == "mpegts"
                self._num_torn += packet.is_corrupt
                is_key = packet.is_keyframe and not (has_palette and self.packets)
                is_shown = packet.size > 0 and not packet.is_discard
                where = packet.pts, packet.dts, packet.pos, packet.size
                self.packets.append(Packet(*where, is_key, is_shown, is_whole))
                self.is_plain &= not packet.is_keyframe or _begins_anew(packet, stream.codec_context.extradata)
            self.is_one_to_one = codec in ONE_FRAME_A_PACKET
            """Whether every packet gives a frame, unless it is a field."""
            self.num_probed = PROBED_MP4 if is_mp4 else PROBED
            self.tells_order = self.is_one_to_one and (is_mp4 or is_matroska)
            """Whether the container knows the packets of all frames."""
            self.time_base = stream.time_base or Fraction(1)
            self.rate = float(stream.average_rate or stream.guessed_rate or DEFAULT_RATE)
            num_listed = len(stream.index_entries)
            self._seconds = (container.duration or 0) / av.time_base if is_matroska else 0
        num_bytes, whole = path.stat().st_size, told_size(path)
        if num_bytes < whole:
            raise ValueError(
                f"video {path} is cut short: it has {num_bytes:,} of the {whole:,} bytes that it tells of; {COPY_AGAIN}"
            )
        if len(self.packets) < num_listed:
            raise ValueError(
                f"video {path} is cut short or damaged: of {num_listed} frames that it lists, {len(self.packets)} are "
                f"there; {COPY_AGAIN}"
            )

    @cached_property
    def _numbers(self) -> dict[tuple[int | None, ...], int]:
        """By what a packet keeps after a jump, before which the container may not tell its dts."""
        return {(packet.position, packet.size, packet.pts): number for number, packet in enumerate(self.packets)}

    def decode(self, start: int = 0) -> Frames:
        """What decoding gives from a packet on; after a failure it goes on, as players do."""
        container, stream, packets = self._opened_at(start)
        with container:
            for number, packet in packets:
                if number >= start and packet.size:
                    packet.pts = number
                    yield from self._decoded(stream, packet, number)
            yield from self._decoded(stream, None, len(self.packets) - 1)

    def damage(self, frame: int, packet: int) -> str:
        """What to say of a frame that does not come of its packet."""
        why = self.failures.get(packet, "its data give no picture")
        return f"frame {frame} of video {self._path} does not decode: {why}; {COPY_AGAIN}"

    def warn(self, num_frames: int) -> None:
        """Say where frames seem to be missing that nothing else tells of."""
        num_gaps = count_gaps(self.packets)
        if self._num_torn or num_gaps:
            log.warning(
                "video %s: some of its %d frames may be damaged, or others missing (%d gaps in time, %d torn packets)",
                *(self._path, num_frames, num_gaps, self._num_torn),
            )
        end = float(max(packet.pts or 0 for packet in self.packets) * self.time_base)
        if end + MISSING_SECONDS < self._seconds:
            log.warning("video %s may be cut short: its frames end at %.1f of %.1f s", self._path, end, self._seconds)

    def _opened_at(self, start: int) -> tuple[InputContainer, VideoStream, Numbered]:
        """The file, its track, and packets that begin at a number, or before it."""
        container, stream = _open(self._path)
        if start:
            packets = self._jumped(container, stream, start)
            if packets is not None:
                return container, stream, packets
            container.close()
            container, stream = _open(self._path)
        return container, stream, enumerate(_demux(container, stream))

    def _jumped(self, container: InputContainer, stream: VideoStream, start: int) -> Numbered | None:
        """Packets after a jump; None where they begin behind the one that is wanted, or nobody knows where."""
        time = self.packets[start].dts
        if time is None:
            return None
        try:
            container.seek(time, stream=stream)
        except FFmpegError:
            return None  # not every container can
        packets = _demux(container, stream)
        first = next(packets, None)
        number = self._numbers.get((first.pos, first.size, first.pts), start + 1) if first else start + 1
        return enumerate(chain([first], packets), number) if first and number <= start else None

    def _decoded(self, stream: VideoStream, packet: AvPacket | None, number: int) -> Frames:
        try:
            frames = stream.codec_context.decode(packet)
        except FFmpegError as error:
            self.failures[number] = _words(error)
            return
        for frame in frames:
            origin = -1 if frame.pts is None else frame.pts
            if frame.is_corrupt:
                self.failures[origin] = "its data are damaged"
            else:
                yield origin, frame


class _RgbConverter:
    """Frames as RGB, cropped and upright, all of the size of the first, by the filters that FFmpeg's own programs use.

    The matrix and range of colours are the stream's (BT.601 where it has none), chroma is interpolated bicubically
    where FFmpeg interpolates it at all, alpha is dropped, HDR is mapped to SDR.
    """

    def __init__(self, path: Path, crop: Crop | None):
        self._path, self._crop = path, crop
        self._kind: tuple[object, ...] = ()
        self._scaling = "flags=bicubic"
        self._clock = count()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        """(H, W, 3) uint8."""
        colours = (frame.format.name, frame.colorspace, frame.color_range, frame.color_trc)
        kind = (frame.width, frame.height, *colours)
        if kind != self._kind:
            self._graph, self._source = self._filters(frame)
            self._kind = kind
        frame.pts = next(self._clock)
        self._source.push(frame)
        pixels = np.ascontiguousarray(self._graph.vpull().to_ndarray())
        self._scaling = f"{pixels.shape[1]}:{pixels.shape[0]}:flags=bicubic"
        return pixels

    def _filters(self, frame: VideoFrame) -> tuple[Graph, FilterContext]:
        """A graph for frames like this one, and where they enter it."""
        graph, is_hdr = Graph(), frame.color_trc in HDR_TRANSFERS
        source = _add_source(graph, frame)
        cut = "iw-{0}-{1}:ih-{2}-{3}:{0}:{2}".format(*self._crop) if self._crop else ""
        filters = [graph.add("crop", cut)] if cut else []
        filters += [graph.add(name, arguments) for name, arguments in _turns(frame, self._path)]
        if is_hdr:
            table = self._sdr_table(frame)
            shelf, look_up = _add_source(graph, table), graph.add("haldclut")
            shelf.link_to(look_up, input_idx=1)
            colours = ":in_color_matrix=bt2020" if frame.colorspace == UNSPECIFIED else ""
            filters += [graph.add("scale", self._scaling + colours), graph.add("format", "rgb48le"), look_up]
        else:
            filters.append(graph.add("scale", self._scaling))
        graph.link_nodes(source, *filters, graph.add("format", "rgb24"), graph.add("buffersink"))
        try:
            graph.configure()
        except FFmpegError as error:
            raise ValueError(
                f"frames of video {self._path} cannot be made RGB: nothing converts {frame.format.name} with matrix "
                f"{frame.colorspace} of H.273; name another by: ffmpeg -i IN -vf setparams=colorspace=bt709 OUT.mp4"
            ) from error
        if is_hdr:
            shelf.push(table)
            shelf.push(None)  # the only one, for all frames
        return graph, source

    def _sdr_table(self, frame: VideoFrame) -> VideoFrame:
        """SDR's colours for those of HDR, as a picture that a filter looks them up in."""
        name, light_of = HDR_TRANSFERS[frame.color_trc]
        if not self._kind:
            log.warning("video %s is HDR (%s): its colours are mapped to SDR", self._path, name)
        table = VideoFrame.from_ndarray(hald_table(light_of), format="rgb48le")
        table.pts = 0
        return table


def _add_source(graph: Graph, frame: VideoFrame) -> FilterContext:
    about = {"video_size": f"{frame.width}x{frame.height}", "pix_fmt": frame.format.name, "time_base": "1/1"}
    colours = {"colorspace": str(int(frame.colorspace)), "range": str(int(frame.color_range))}
    return graph.add("buffer", **about, **colours)


def _turns(frame: VideoFrame, path: Path) -> list[tuple[str, str]]:
    """Filters that lay a picture on the screen as its display matrix says.

    A pixel (x, y) is shown at (a x + c y, b x + d y): after a transposition, or none, come flips.

    Source: ISO/IEC 14496-12, 8.3.2 (Track Header Box).
    """
    # Asked for where it may have changed only: PyAV keeps a frame that was asked until the garbage collector comes.
    graph = Graph()
    source = _add_source(graph, frame)
    graph.link_nodes(source, graph.add("sidedata", f"mode=delete:type={EXIF}"), graph.add("buffersink")).configure()
    source.push(frame)
    matrix: Any = graph.vpull().side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return []
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    is_transposed = abs(b) > abs(a)
    straight, aslant = ((c, b), (a, d)) if is_transposed else ((a, d), (b, c))
    if max(map(abs, aslant)) > MAX_ASLANT * max(map(abs, straight)):
        mirrored = "mirrored and " if a * d < b * c else ""
        raise ValueError(f"video {path} is {mirrored}turned by no quarter turn; store its frames upright")
    across, down = straight
    turn = [("transpose", "cclock_flip")] if is_transposed else []
    return turn + [("hflip", "")] * (across < 0) + [("vflip", "")] * (down < 0)


def _open(path: Path) -> tuple[InputContainer, VideoStream]:
    """A file and the track in it that players show: the default one, or that with most pixels, but no cover picture.

    Raises:
        ValueError: FFmpeg cannot read it, or knows no such track or not its codec.
    """
    brand = iso_brand(path)
    if brand in HEIF_BRANDS:
        raise ValueError(
            f"video {path} is a HEIF or AVIF picture, of which FFmpeg may decode a part only; store it as JPEG, or as "
            f"MP4 if it moves"
        )
    try:
        # An absolute path, because FFmpeg takes what stands before a colon for a protocol.
        container = av.open(str(path.absolute()), metadata_errors="replace")
    except FFmpegError as error:
        no_index = "an MP4 without index, as an interrupted recording or download leaves it: copy or download it again"
        reason = stand_in(path, is_text=True) or f": {no_index if brand else _words(error)}"
        raise ValueError(f"video {path} does not decode{reason}") from error
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        raise ValueError(f"{path} {NO_FRAMES}")
    stream = max(streams, key=_prominence)
    if stream.codec_context is None:
        raise ValueError(
            f"video {path} is of a codec that PyAV {av.__version__} does not decode; make it H.264 by: "
            f"ffmpeg -i IN OUT.mp4"
        )
    # Threads for slices alone: with one for each frame, PyAV loses whole frames behind a damaged one.
    stream.thread_type, stream.codec_context.thread_count = "SLICE", DECODER_THREADS
    return container, stream


def _prominence(stream: VideoStream) -> tuple[bool, int]:
    is_default = bool(stream.disposition & Disposition.default)
    return is_default, 0 if stream.codec_context is None else stream.width * stream.height


def _demux(container: InputContainer, stream: VideoStream) -> Iterator[AvPacket]:
    """Packets of a track; AVI has empty ones where a frame is to be shown for longer.

    Raises:
        ValueError: the file cannot be read to its end.
    """
    try:
        for packet in container.demux(stream):
            if packet.size or packet.dts is not None:  # PyAV's last is neither
                yield packet
    except FFmpegError as error:
        raise ValueError(f"video {container.name} cannot be read to its end: {_words(error)}; {COPY_AGAIN}") from error


def _begins_anew(packet: AvPacket, settings: bytes | None) -> bool:
    """Whether a packet of H.264 in MP4 makes the decoder forget what was before, and leaves the settings as they are.

    Other key frames may refer to what was before, and become right bit by bit only.

    Source: ISO/IEC 14496-15, 5.3.3 (settings) and 5.3.2 (units with their lengths before them).
    """
    if not settings or len(settings) < 5:
        return False
    data, width, at = bytes(packet), (settings[4] & 3) + 1, 0
    kinds = set()
    while at + width < len(data):
        kinds.add(data[at + width] & 31)
        at += width + int.from_bytes(data[at : at + width], "big")
    return IDR in kinds and SETTINGS not in kinds


def _is_plain(frame: VideoFrame, path: Path) -> bool:
    """8-bit 4:2:0 that is neither turned nor HDR: whatever converts it to RGB gives the same."""
    is_sdr = frame.color_trc not in HDR_TRANSFERS
    return frame.format.name in ("yuv420p", "yuvj420p") and not _turns(frame, path) and is_sdr


def _words(error: FFmpegError) -> str:
    return error.strerror or type(error).__name__


# --------------------------------------------------------------------------------------- HDR colours on an SDR screen
#
# One table for all colours. Light is taken as BT.2100 defines it. Up to ``KNEE`` of SDR white, which BT.2408 puts at
# 203 cd/m2, it stays what it is; brighter light, up to the 1000 cd/m2 that nearly all HDR is mastered for, is
# compressed into the rest by its largest component, so that hues stay. Colours beyond BT.709 are cut off.

HALD_LEVEL = 8
"""Of FFmpeg's haldclut: its cube is the edge of a table of 64 levels per colour, which is a picture of 512 x 512."""
SDR_WHITE, PEAK = 203.0, 1000.0
"""cd/m2."""
KNEE = 0.7
"""Of SDR white."""
SDR_GAMMA = 2.4
"""BT.1886."""
BT709_OF_BT2020 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]]
)
"""Linear BT.709 of linear BT.2020 (BT.2087)."""
LUMINANCE = np.array([0.2627, 0.6780, 0.0593])
"""Of linear BT.2020."""


def pq_light(signal: np.ndarray) -> np.ndarray:
    """cd/m2 of signals from 0 to 1 (SMPTE ST 2084)."""
    root = signal ** (1 / 78.84375)
    return 10000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)


def hlg_light(signal: np.ndarray) -> np.ndarray:
    """cd/m2 on a screen of ``PEAK``, of signals (..., 3) from 0 to 1 (BT.2100)."""
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    return PEAK * (scene @ LUMINANCE)[..., None] ** 0.2 * scene


HDR_TRANSFERS: dict[int, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    16: ("PQ", pq_light),
    18: ("HLG", hlg_light),
}
"""Number of the transfer function in H.273 -> its name, and the light of a signal (..., 3)."""


def hald_table(light_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """(512, 512, 3) uint16: SDR's signal for every colour of HDR, in the order of FFmpeg's haldclut (red fastest)."""
    levels = np.linspace(0, 1, HALD_LEVEL**2)
    blue, green, red = np.meshgrid(levels, levels, levels, indexing="ij")
    light = light_of(np.stack([red, green, blue], axis=-1).reshape(-1, 3)) / SDR_WHITE
    light = np.maximum(light @ BT709_OF_BT2020.T, 0)
    brightest = np.maximum(light.max(axis=-1, keepdims=True), 1e-9)
    signal = (light * _compressed(brightest) / brightest) ** (1 / SDR_GAMMA)
    side = HALD_LEVEL**3
    return np.rint(65535 * np.clip(signal, 0, 1)).astype(np.uint16).reshape(side, side, 3)


def _compressed(light: np.ndarray) -> np.ndarray:
    """From 0 to ``PEAK`` into 0 to 1: the same up to the knee, then a curve that leaves it without a corner."""
    above, end = (np.maximum(light - KNEE, 0) / (1 - KNEE), (PEAK / SDR_WHITE - KNEE) / (1 - KNEE))
    return np.minimum(light, KNEE) + (1 - KNEE) * np.minimum(above * (1 + above / end**2) / (1 + above), 1)
