"""GLUS in a web page: a video or picture and sentences in; an overlay, a plot and masks out; needs ``glus[demo]``."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from glus.data.frames import open_video
from glus.files import PROJECT
from glus.inference.predictor import VideoPredictor
from glus.inference.segment import stream
from glus.inference.segmentation import MOVIE_FILE, Segmentation
from glus.painter import palette

if TYPE_CHECKING:
    import gradio

SAMPLE_VIDEO = PROJECT / "assets" / "example.mp4"
SAMPLE_SENTENCES = ("the star that turns yellow", "the star that turns red", "the purple object")
"""What the shipped model finds in the sample video, and one thing that is not there."""
_PAPER = "https://arxiv.org/abs/2504.07962"


def build_demo(predictor: VideoPredictor, name: str, folder: Path) -> gradio.Blocks:
    """The page, not yet served.

    Args:
        predictor: answers one visitor after another.
        name: of the model, shown to visitors.
        folder: where answers are written to.

    Raises:
        ImportError: gradio is not installed.
    """
    import gradio

    progress_bar = gradio.Progress()

    def answer(
        video: str | None, picture: str | None, sentences: str, progress: gradio.Progress = progress_bar
    ) -> tuple[str, str, Figure, str]:
        try:
            if video and picture:
                raise ValueError("a video and a picture: remove one of them (the cross at its corner)")
            if not (given := video or picture):
                raise ValueError("no video and no picture: drop one on the page, or take the sample")
            texts, source = sentences.splitlines(), open_video(given)
            frames = progress.tqdm(stream(source, texts, predictor), total=len(source), unit="frames")
            found = Segmentation(tuple(texts), list(frames), source)
            output = Path(tempfile.mkdtemp(dir=folder))
            found.save(output / "masks")
            archive = shutil.make_archive(str(output / "masks"), "zip", output / "masks")
        except (ValueError, OSError) as error:
            raise gradio.Error(str(error), print_exception=False) from error
        summary = "\n".join(f"- {found.describe(number)}" for number in range(len(texts)))
        return str(output / "masks" / MOVIE_FILE), summary, draw_timeline(found), archive

    with gradio.Blocks(title="GLUS", analytics_enabled=False) as page:
        gradio.Markdown(f"# GLUS\nSegments what sentences say, in every frame ([paper]({_PAPER})). Model: `{name}`.")
        with gradio.Row():
            with gradio.Column():
                with gradio.Tab("Video"):
                    video = gradio.Video(show_label=False, sources=["upload"])
                with gradio.Tab("Picture"):  # image_mode: as it is; else its EXIF orientation, say, would go
                    picture = gradio.Image(show_label=False, sources=["upload"], type="filepath", image_mode=None)
                sentences = gradio.Textbox(label="Sentences, one a line", lines=3, max_lines=28)
                button = gradio.Button("Segment", variant="primary")
                gradio.Examples([[str(SAMPLE_VIDEO), "\n".join(SAMPLE_SENTENCES)]], [video, sentences], label="Sample")
            with gradio.Column():
                overlay = gradio.Video(show_label=False, autoplay=True, loop=True, interactive=False)
                summary = gradio.Markdown()
                timeline = gradio.Plot(show_label=False)
                masks = gradio.File(label="Masks: a picture per sentence and frame", interactive=False)
        button.click(answer, [video, picture, sentences], [overlay, summary, timeline, masks])
    return page


def draw_timeline(found: Segmentation) -> Figure:
    """Share of the frame that each answer covers, and the probability of [SEG], over the frames."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    areas, scores = figure.subplots(2, sharex=True)
    for number, (text, colour) in enumerate(zip(found.texts, palette(len(found.texts)), strict=True)):
        answers = list(found.answers(number))
        style = {"color": [part / 255 for part in colour], "marker": ".", "label": text}
        areas.plot([100 * answer["area"] for answer in answers], **style)
        scores.plot([answer["score"] for answer in answers], **style)
    areas.set(ylabel="area, % of the frame", ylim=(0, None))
    scores.set(ylabel="P([SEG])", ylim=(-0.05, 1.05), xlabel="frame")
    scores.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*areas.get_legend_handles_labels(), fontsize="small", ncols=2, loc="outside upper left")
    return figure
