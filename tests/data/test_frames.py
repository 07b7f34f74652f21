import os
import time

import numpy as np
import pytest
from PIL import ExifTags, Image

from glus.config import DatasetConfig, Layout
from glus.data.frames import DatasetVideo, FrameStore, open_video


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
    for suffix in ("png", "jpg", "tif", "webp"):
        stored.save(folder / f"{suffix}.{suffix}", exif=exif, lossless=True)
        assert np.abs(store.read("photos", suffix).astype(int) - upright).max() <= (60 if suffix == "jpg" else 0)
        assert store.read("photos", suffix)[2, 2].min() > 200
        assert store.size("photos", suffix) == (20, 30)
        assert store.is_turned("photos", suffix) == (orientation > 1)
    np.testing.assert_array_equal(open_video(folder).read(1), upright)
    for name in ("photo", "photo.mp4"):  # as chats and browsers call it
        (folder / name).write_bytes((folder / "png.png").read_bytes())
        np.testing.assert_array_equal(open_video(folder / name).read(0), upright)


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
    in_memory = Image.fromarray(grey)
    for given in (in_memory, [in_memory]):
        np.testing.assert_array_equal(open_video(given).read(0)[..., 0], grey // 257)


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


def test_a_folder_of_many_frames_is_opened_at_once(tmp_path):
    """Half an hour of video; compared with each other, its frames took minutes."""
    for number in range(20_000):
        (tmp_path / f"{number}.jpg").touch()
    begun = time.perf_counter()
    assert len(open_video(tmp_path)) == 20_000
    assert time.perf_counter() - begun < 10


def test_a_pipe_is_not_waited_for(tmp_path, caplog):
    Image.fromarray(picture(0)).save(tmp_path / "0.png")
    for name in ("1.png", "pipe.mp4"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} is a pipe or a device.*: save it to a file"):
            open_video(tmp_path / name)
    assert open_video(tmp_path).names == ("0",)
    assert "1 pictures are read; 2 other entries are left out: 1.png, pipe.mp4" in caplog.text


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


def test_a_missing_video_in_a_folder_of_others_is_not_another_of_its_name(store):
    """As ids of ReVOS have folders in front."""
    with pytest.raises(FileNotFoundError, match=r"d/TAO/v/00000 is missing"):
        store.read("TAO/v", "00000")
    (store.folder / "TAO" / "cafe\u0301").mkdir(parents=True)
    Image.fromarray(picture(3)).save(store.folder / "TAO" / "cafe\u0301" / "0.png")
    np.testing.assert_array_equal(store.read("TAO/caf\u00e9", "0"), picture(3))


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="its name is empty"):
        open_video("")


def test_a_photo_is_a_video_of_one_frame(store):
    path = store.path("v", "00005")
    video = open_video(path)
    assert (len(video), video.names) == (1, ("00000",))
    np.testing.assert_array_equal(video.read(0), picture(1))
    path.write_bytes(b"x" * 99)
    with pytest.raises(ValueError, match=r"frame 00005.png does not decode"):
        open_video(path)


def moving_pictures(num_frames=12):
    """A yellow bar on a ground that changes; each an Image."""
    frames = np.full((num_frames, 40, 60, 3), (10, 80, 200), np.uint8)
    for number, frame in enumerate(frames):
        frame[:, 4 * number : 4 * number + 8] = (255, 255, 0)
        frame[:8] = 20 * number
    return [Image.fromarray(frame) for frame in frames]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_an_animated_picture_is_read_in_any_order(tmp_path, suffix):
    first, *others = frames = moving_pictures()
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others, duration=80, lossless=True)
    video = open_video(tmp_path / f"a.{suffix}")
    assert len(video) == len(frames)
    for index in (*range(12), *range(11, -1, -1), 3, 9, 0):
        np.testing.assert_array_equal(video.read(index), np.array(frames[index]))
    os.rename(tmp_path / f"a.{suffix}", tmp_path / "a.jpg")
    assert len(open_video(tmp_path / "a.jpg")) == len(frames)


@pytest.mark.parametrize("suffix", ["webp", "png", "tif"])
def test_a_frame_of_several_pictures_is_refused(tmp_path, suffix):
    first, *others = moving_pictures()
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others, lossless=True)
    with pytest.raises(ValueError, match=rf"a\.{suffix}: it holds 12 pictures, expected one"):
        open_video(tmp_path).read(0)
    photo = tmp_path / "photo" / "0.jpg"
    photo.parent.mkdir()
    first.save(photo, format="MPO", save_all=True, append_images=others[:1])
    assert open_video(photo.parent).read(0).shape == open_video(photo).read(0).shape == np.array(first).shape


def test_a_damaged_animation_is_named(tmp_path):
    first, *others = moving_pictures()
    path = tmp_path / "a.webp"
    first.save(path, save_all=True, append_images=others, duration=80, lossless=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"(frame \d+ of video .*)?a.webp does not decode"):
        [open_video(path).read(index) for index in range(12)]
