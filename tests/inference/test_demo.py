"""The page of ``glus demo`` in a real browser: type a sentence, press, see an overlay, take the masks."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glus.data.frames import open_video
from glus.inference.demo import SAMPLE_SENTENCES, SAMPLE_VIDEO, build_demo, draw_timeline
from glus.inference.segment import load, segment
from tests.programs import ROOT, environment, free_port

WAIT = 300
"""Seconds that a busy machine may take to start the server, or to answer."""
PIXELS = """
const video = arguments[0], canvas = document.createElement("canvas");
[canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
const context = canvas.getContext("2d");
context.drawImage(video, 0, 0);
return [canvas.height, canvas.width, ...context.getImageData(0, 0, canvas.width, canvas.height).data];
"""


def test_the_shipped_model_finds_what_the_sample_has() -> None:
    found = segment(SAMPLE_VIDEO, SAMPLE_SENTENCES, "glus_shapes")
    assert [frame.areas[2] for frame in found.frames] == [0] * len(found.frames)
    assert all(0.02 < area < 0.2 for frame in found.frames for area in frame.areas[:2])
    assert found.describe(0) == "the star that turns yellow: found in 16 of 16 frames"
    assert found.describe(2) == "the purple object: not found in 16 of 16 frames"
    areas, scores = draw_timeline(found).axes
    assert [line.get_label() for line in areas.lines] == list(SAMPLE_SENTENCES)
    assert len(scores.lines[0].get_ydata()) == 16


def test_the_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((ROOT / "scripts" / "own_video.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert "(16, 256, 256) bool" in printed
    assert "the purple object: not found in 16 of 16 frames" in printed
    assert "16 images, 32 masks" in printed
    assert "data:image/png" in names["found"]._repr_html_()


def test_the_page_answers_about_a_video_or_a_picture(tmp_path: Path) -> None:
    gradio = pytest.importorskip("gradio", reason="the page needs glus[demo]")
    page = build_demo(load("glus_shapes"), "glus_shapes", tmp_path)
    (answer,) = [function.fn for function in page.fns.values() if function.name == "answer"]
    picture = tmp_path / "picture.png"
    Image.fromarray(open_video(SAMPLE_VIDEO).read(0)).save(picture)
    for video, of, num_frames in ((str(SAMPLE_VIDEO), None, 16), (None, str(picture), 1)):
        overlay, summary, timeline, archive = answer(video, of, "the blue circle")
        assert summary == f"- the blue circle: found in {num_frames} of {num_frames} frames"
        assert len(open_video(overlay)) == len(timeline.axes[0].lines[0].get_ydata()) == num_frames
        with zipfile.ZipFile(archive) as files:
            assert sum(name.endswith(".png") for name in files.namelist()) == num_frames
    for video, of, message in ((None, None, "no video and no picture"), ("x.mp4", "x.png", "remove one of them")):
        with pytest.raises(gradio.Error, match=message):
            answer(video, of, "the blue circle")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server with the shipped model."""
    port, log = free_port(), tmp_path_factory.mktemp("demo") / "log"
    command = [sys.executable, ROOT / "scripts" / "demo.py", "--port", str(port)]
    with log.open("w") as file:
        server = subprocess.Popen([str(w) for w in command], env=environment(), stdout=file, stderr=subprocess.STDOUT)
    try:
        for _ in range(WAIT):
            assert server.poll() is None, log.read_text()
            if "Running on local URL" in log.read_text():
                break
            try:
                server.wait(timeout=1)
            except subprocess.TimeoutExpired:
                continue
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def browser() -> Iterator[Any]:
    """Debian's Chromium without a window."""
    from selenium import webdriver

    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert program, "no chromium: apt-get install chromium chromium-driver"
    assert driver, "no chromedriver: apt-get install chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1400"):
        options.add_argument(argument)
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.mark.slow
@pytest.mark.browser
def test_a_visitor_sees_an_overlay_and_takes_the_masks(address: str, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def until(css: str) -> Any:
        """The first element, once it is there."""
        return WebDriverWait(browser, WAIT).until(lambda _: browser.find_elements(By.CSS_SELECTOR, css))[0]

    def press(label: str) -> None:
        next(b for b in browser.find_elements(By.CSS_SELECTOR, "button") if b.text == label).click()

    browser.get(address)
    until("textarea").send_keys("the blue circle")
    press("Segment")
    assert "no video" in until(".toast-body").text  # an error is a sentence
    until("tr.tr-body").click()  # the sample
    WebDriverWait(browser, WAIT).until(lambda _: until("textarea").get_property("value") == "\n".join(SAMPLE_SENTENCES))
    until("textarea").clear()
    until("textarea").send_keys("the blue circle\nthe purple object")
    press("Segment")
    archive = until("a[download$='.zip']").get_attribute("href")
    said = browser.find_element(By.TAG_NAME, "body").text
    assert re.search(r"blue circle: found in 16 of 16 frames\s+the purple object: not found in 16 of 16 frames", said)

    video = until("video[src*='overlay']")
    WebDriverWait(browser, WAIT).until(lambda _: video.get_property("readyState") >= 2)
    height, width, *pixels = browser.execute_script(PIXELS, video)
    shown = np.array(pixels, np.int16).reshape(height, width, 4)[..., :3]
    browser.save_screenshot(str(tmp_path / "page.png"))
    plain = open_video(SAMPLE_VIDEO).read(0).astype(np.int16)
    assert width >= plain.shape[1]
    assert np.abs(shown[: plain.shape[0], : plain.shape[1]] - plain).max() > 60

    with urllib.request.urlopen(archive) as answer, zipfile.ZipFile(io.BytesIO(answer.read())) as files:
        names = [name for name in files.namelist() if name.endswith(".png")]
    assert len(names) == 2 * 16
