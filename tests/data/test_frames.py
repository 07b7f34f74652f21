import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image

from glus.config import DatasetConfig, Layout
from glus.data.frames import DatasetVideo, FileVideo, FolderVideo, FrameStore, open_video


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


@pytest.mark.parametrize("width", [48, 72])  # decord pads the rows of the narrow one
def test_a_video_file_is_decoded_by_index(tmp_path, width):
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    with imageio.get_writer(tmp_path / "clip.mp4", fps=5, macro_block_size=8) as writer:
        for colour in colours:
            writer.append_data(np.full((32, width, 3), colour, np.uint8))
    video = open_video(tmp_path / "clip.mp4")
    assert isinstance(video, FileVideo)
    assert video.names == ("00000", "00001", "00002")
    for index in (2, 0, 1):
        frame = video.read(index)
        assert frame.shape == (32, width, 3)
        assert frame.dtype == np.uint8
        assert frame[..., index].min() > 200
        assert frame.sum() < 260 * 32 * width


def test_a_file_that_is_no_video_is_named(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no video at all")
    with pytest.raises(ValueError, match=r"clip.mp4 does not decode"):
        open_video(tmp_path / "clip.mp4")
