import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import ExifTags, Image

from glus.config import DatasetConfig, Layout
from glus.data.frames import DatasetVideo, FileVideo, FolderVideo, FrameStore, flipped_axis, open_video
from glus.pictures import write_movie


def picture(seed, height=20, width=30):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "train" / "JPEGImages" / "v"
    folder.mkdir(parents=True)
    Image.fromarray(picture(0)).save(folder / "00000.jpg", quality=95)
    Image.fromarray(picture(1)).save(folder / "00005.png")
    return FrameStore(DatasetConfig(name="d", layout=Layout.mevis, root=str(tmp_path), split="train"))


def test_a_frame_is_rgb_whatever_its_suffix(store):
    assert store.path("v", "00000").suffix == ".jpg"
    assert store.read("v", "00000").shape == (20, 30, 3)
    np.testing.assert_array_equal(store.read("v", "00005"), picture(1))
    assert store.size("v", "00005") == store.size("v", "00000") == (20, 30)


def test_a_missing_frame_is_named(store):
    with pytest.raises(FileNotFoundError, match=r"d/v/00001 is missing; expected .*JPEGImages/v/00001.jpg"):
        store.read("v", "00001")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 99])
def test_a_frame_that_does_not_decode_is_named(store, damage):
    path = store.path("v", "00000")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"frame d/v/00000 does not decode: .*00000.jpg"):
        store.read("v", "00000")


def test_a_dataset_video_reads_by_index(store):
    video = DatasetVideo(store, "v", ("00000", "00005"))
    assert (len(video), video.names) == (2, ("00000", "00005"))
    np.testing.assert_array_equal(video.read(1), picture(1))


def test_a_folder_of_any_names_is_read_in_natural_order(tmp_path):
    for number, name in enumerate(("img2.png", "img10.PNG", "img1.jpeg", "7.png")):
        Image.fromarray(picture(number)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no frame")
    video = open_video(tmp_path)
    assert isinstance(video, FolderVideo)
    assert video.names == ("7", "img1", "img2", "img10")
    np.testing.assert_array_equal(video.read(3), picture(1))


def test_a_grey_picture_becomes_rgb(tmp_path):
    Image.fromarray(picture(0)[..., 0]).save(tmp_path / "a.png")
    assert open_video(tmp_path).read(0).shape == (20, 30, 3)


def test_folders_that_are_no_video_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no frames"):
        open_video(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no video at .*nowhere"):
        open_video(tmp_path / "nowhere")
    for name in ("a.png", "a.jpg"):
        Image.fromarray(picture(0)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"several pictures called 'a'"):
        open_video(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_stands_as_its_orientation_says(store, orientation):
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:5, :10] = 250  # a bright corner at the top left
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}  # fmt: skip
    stored = Image.fromarray(upright)
    stored = stored.transpose(undo[orientation]) if orientation > 1 else stored
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    folder = store.folder / "photos"
    folder.mkdir()
    for suffix in ("png", "jpg"):
        stored.save(folder / f"{suffix}.{suffix}", exif=exif)
        assert np.abs(store.read("photos", suffix).astype(int) - upright).max() <= (0 if suffix == "png" else 60)
        assert store.read("photos", suffix)[2, 2].min() > 200
        assert store.size("photos", suffix) == (20, 30)
        assert store.is_turned("photos", suffix) == (orientation > 1)
    np.testing.assert_array_equal(open_video(folder).read(1), upright)


def test_grey_of_16_bits_is_scaled(tmp_path):
    grey = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    for suffix in ("png", "tif"):
        Image.fromarray(grey).save(tmp_path / f"{suffix}.{suffix}")
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "z.tif")
    video = open_video(tmp_path)
    for index in range(2):
        np.testing.assert_array_equal(video.read(index)[..., 0], grey // 257)
    with pytest.raises(ValueError, match=r"/z does not decode: .*z.tif: grey values of more than 16 bits"):
        video.read(2)


def test_a_folder_accounts_for_every_file(tmp_path, caplog):
    for number, name in enumerate(("0.jpg", "1.tif", "2.bmp", "3.webp", "4.JFIF", "._5.jpg")):
        Image.fromarray(picture(number)).save(tmp_path / name, format="PNG")
    (tmp_path / "masks").mkdir()
    (tmp_path / "notes.txt").write_text("no frame")
    assert open_video(tmp_path).names == ("0", "1", "2", "3", "4")
    assert "5 pictures are read; 3 other entries are left out: ._5.jpg, masks, notes.txt" in caplog.text
    (tmp_path / "9.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(FileNotFoundError, match=r"9\.jpg is a link to .*gone\.jpg, which does not exist"):
        open_video(tmp_path)


def test_a_picture_too_large_for_a_frame_is_an_error_of_that_video(store):
    path = store.folder / "v" / "00009.png"
    Image.new("1", (20000, 10000)).save(path)
    for access in (store.read, store.size):
        with pytest.raises(ValueError, match=r"frame d/v/00009 is too large: .*00009.png"):
            access("v", "00009")


def test_names_are_found_however_they_are_written(store):
    (store.folder / "cafe\u0301").mkdir()
    Image.fromarray(picture(3)).save(store.folder / "cafe\u0301" / "ne\u0301.PNG")
    np.testing.assert_array_equal(store.read("caf\u00e9", "n\u00e9"), picture(3))
    with pytest.raises(FileNotFoundError, match=r"d/caf\u00e9/na is missing"):
        store.read("caf\u00e9", "na")


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="its name is empty"):
        open_video("")


def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)], check=True)


def write_clip(path, num_frames, width=72, height=32):
    """Frame n is grey of level 8n, but for a red corner at the top left."""
    frames = np.repeat(8 * np.arange(num_frames, dtype=np.uint8), height * width * 3).reshape(-1, height, width, 3)
    frames[:, :16, :16] = (250, 0, 0)
    write_movie(path, frames, frames_per_second=5)
    return path


def levels(frames):
    """The frame numbers that ``write_clip`` has drawn."""
    return [round(float(frame[20:-4, 20:-4].mean()) / 8) for frame in frames]


@pytest.mark.parametrize("width", [48, 72])  # decord pads the rows of the narrow one
def test_a_video_file_is_decoded_by_index(tmp_path, width):
    video = open_video(write_clip(tmp_path / "clip.mp4", 3, width))
    assert isinstance(video, FileVideo)
    assert video.names == ("00000", "00001", "00002")
    assert video.frames_per_second == 5
    frames = [video.read(index) for index in (2, 0, 1)]
    assert all(frame.shape == (32, width, 3) and frame.dtype == np.uint8 for frame in frames)
    assert levels(frames) == [2, 0, 1]


@pytest.mark.parametrize("order", [range(30), range(29, -1, -1), [3, 0, 29, 14, 2, 28]], ids=["up", "down", "jumps"])
def test_frames_are_the_same_in_any_order_and_from_many_threads(tmp_path, order, monkeypatch):
    monkeypatch.setattr("glus.data.frames.KEPT_BYTES", 0)  # so that frames are forgotten within this short clip
    video = FileVideo(write_clip(tmp_path / "clip.mp4", 30))
    with ThreadPoolExecutor(4) as pool:
        assert levels(pool.map(video.read, order)) == list(order)


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("flips", [[], ["-display_hflip"]], ids=["", "mirrored"])
def test_a_frame_stands_as_ffmpeg_shows_it(tmp_path, turn, flips):
    """In all eight positions that a display matrix of quarter turns and flips can give."""
    clip, laid = write_clip(tmp_path / "clip.mp4", 3), tmp_path / "laid.mp4"
    ffmpeg("-display_rotation", turn, *flips, "-i", clip, "-c", "copy", laid)
    ffmpeg("-i", laid, "-frames:v", 1, tmp_path / "frame.png")
    shown, frame = np.array(Image.open(tmp_path / "frame.png"), int), open_video(laid).read(0)
    assert frame.shape == shown.shape
    assert min(frame.strides) > 0  # torch takes no others
    assert np.abs(frame - shown).mean() < 2
    assert all(np.abs(np.flip(frame, axes) - shown).mean() > 10 for axes in (0, 1, (0, 1)))


def test_a_mirrored_video_aslant_is_refused(tmp_path):
    laid = tmp_path / "laid.mp4"
    ffmpeg("-display_rotation", 30, "-display_hflip", "-i", write_clip(tmp_path / "clip.mp4", 3), "-c", "copy", laid)
    with pytest.raises(ValueError, match=r"laid.mp4 is mirrored and turned by no quarter turn"):
        open_video(laid)


def test_only_mp4_has_a_display_matrix(tmp_path):
    """Its boxes may be long (64-bit sizes) or go on to the end of the file; other containers have none."""
    clip = write_clip(tmp_path / "clip.mp4", 3)
    ffmpeg("-display_vflip", "-i", clip, "-c", "copy", tmp_path / "laid.mp4")
    ffmpeg("-i", clip, "-c", "copy", tmp_path / "clip.mkv")
    data = (tmp_path / "laid.mp4").read_bytes()
    moov = data[data.index(b"moov") - 4 :]
    (tmp_path / "long.mp4").write_bytes(struct.pack(">I4sQ", 1, b"free", 16 + 5) + bytes(5) + bytes(4) + moov[4:])
    for name, axis in (("clip.mp4", None), ("laid.mp4", 0), ("clip.mkv", None), ("long.mp4", 0)):
        assert flipped_axis(tmp_path / name) == axis


def box(kind, *contents, long=False):
    """Of MP4; its size may be a 64-bit number."""
    content = b"".join(contents)
    size = len(content) + (16 if long else 8)
    return struct.pack(">I4sQ", 1, kind, size) + content if long else struct.pack(">I4s", size, kind) + content


@pytest.mark.parametrize(
    ("version", "end", "axis"),
    [
        (0, 84, 0),
        (1, 96, 0),
        (0, 92, 0),  # more than the standard has
        (0, 75, None),  # cut short
        (1, 84, None),
        (2, 96, None),  # unknown
        (0, 0, None),
    ],
)
@pytest.mark.parametrize("long", [False, True])
def test_the_display_matrix_is_found_in_every_form_of_its_box(tmp_path, version, end, axis, long):
    """Of the video track, upside down; the track of sound before it is not looked at."""
    upside_down = struct.pack(">9i", 1 << 16, 0, 0, 0, -1 << 16, 0, 0, 0, 1 << 30)
    header = (bytes([version]).ljust(52 if version else 40, b"\0") + upside_down).ljust(96, b"\0")[:end]
    sound, video = (box(b"mdia", box(b"hdlr", bytes(8), kind, bytes(12))) for kind in (b"soun", b"vide"))
    tracks = box(b"trak", sound), box(b"trak", video, box(b"tkhd", header, long=long))
    (tmp_path / "a.mp4").write_bytes(box(b"ftyp", b"isom") + box(b"moov", *tracks, long=long))
    assert flipped_axis(tmp_path / "a.mp4") == axis


def test_a_variable_rate_video_gives_each_frame_once(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 10)
    late = "setpts=if(lt(N\\,5)\\,N*0.2\\,1+(N-5)*0.6)/TB"
    ffmpeg("-i", clip, "-vf", late, "-fps_mode", "vfr", tmp_path / "variable.mp4")
    video = FileVideo(tmp_path / "variable.mp4")
    assert levels(map(video.read, range(len(video)))) == list(range(10))
    assert 2 < video.frames_per_second < 5


def test_a_file_without_frames_is_named(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", tmp_path / "sound.mp4")
    ffmpeg("-i", write_clip(tmp_path / "clip.mp4", 3), "-frames:v", 0, "-c", "copy", tmp_path / "empty.mp4")
    for name in ("sound.mp4", "empty.mp4"):
        with pytest.raises(ValueError, match=rf"{name} holds no video stream, or one without frames"):
            open_video(tmp_path / name)


def test_damage_in_the_middle_of_a_video_is_named(tmp_path):
    clip = tmp_path / "clip.mp4"
    noise = "nullsrc=s=64x48:r=30:d=2,geq=random(1)*255:128:128"
    ffmpeg("-f", "lavfi", "-i", noise, "-g", 10, "-movflags", "+faststart", clip)
    data = bytearray(clip.read_bytes())
    middle = len(data) // 2
    data[middle : middle + len(data) // 8] = bytes(len(data) // 8)
    clip.write_bytes(data)
    video = FileVideo(clip)
    assert video.read(0).shape == (48, 64, 3)
    with pytest.raises(ValueError, match=r"frame \d+ of video .*clip.mp4 does not decode"):
        list(map(video.read, range(len(video))))


def test_a_file_that_is_no_video_is_named(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no video at all")
    with pytest.raises(ValueError, match=r"clip.mp4 does not decode"):
        open_video(tmp_path / "clip.mp4")
