"""The report page: scored runs side by side, in one HTML file that needs no network; strips and movies of sentences are
drawn for it as for ``show.py``."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from glus.config import DatasetConfig, QuerySampling, Window
from glus.data.benchmarks.index import open_masks, read_expressions
from glus.data.frames import DatasetVideo, FrameStore
from glus.data.masks import MaskStore, Size
from glus.data.predictions import open_predictions, read_answers
from glus.data.sampling import clip_window, context_indices_eval, query_window
from glus.evaluation.packed import read_complete
from glus.evaluation.runs import ScoredRun, common_sentences, compare_runs, different_settings, doubts, most_changed
from glus.painter import SENTENCE_COLOURS, Colour, Painter, numbers, palette
from glus.pictures import fit, side_by_side, strip, titled, write_movie
from glus.types import Expression, Video

MAX_PICTURE_BYTES = 14 * 2**20
"""Of all pictures and movies, before they become text that is a third longer; then no more movies are put in."""
_MOVIE_SIDE, _STRIP_SIDE, _STRIP_FRAMES = 320, 200, 6
"""Longer sides of frames in pixels, and frames of a strip."""
_FRAMES_PER_SECOND = 8
TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
"""Of pages."""

MemoryRule = Callable[[int, int, int], list[int]]
"""``models.glus.memory_frames``, which this package does not import: it would load torch."""
ReadMasks = Callable[[Expression, Sequence[int], Size], dict[str, np.ndarray]]
"""From a sentence, frames and their size to (F, H, W) bool masks by source."""


def build_page(
    dataset: DatasetConfig,
    runs: Sequence[ScoredRun],
    memory_rule: MemoryRule,
    num_sentences: int = 3,
    preface: str = "",
) -> str:
    """The page as HTML.

    Args:
        dataset: the split that the runs predicted.
        runs: at least one; later ones are held against the first.
        memory_rule: see ``MemoryRule``.
        num_sentences: shown of each sort: best and worst of the last run, most changed between the first and the last.
        preface: HTML that comes first.

    Raises:
        FileNotFoundError, ValueError: the dataset is not there or not the one that was scored, or a prediction cannot
            be read.
    """
    title = f"{runs[0].report['dataset']} ({runs[0].report['split']})"
    if title != (given := f"{dataset.name} ({dataset.split})"):
        raise ValueError(f"the runs are scored on {title}, but dataset is {given}: give the dataset they predicted")
    return TEMPLATES.get_template("page.html").render(
        preface=preface,
        title=title,
        runs=runs,
        rows=compare_runs(runs),
        doubts=doubts(runs),
        protocol=runs[0].report["protocol"],
        curves=training_curves(runs),
        settings=different_settings(runs),
        costs=_costs(runs),
        sentences=list(_sentences(dataset, runs, common_sentences(runs), memory_rule, num_sentences)),
    )


def training_curves(runs: Sequence[ScoredRun]) -> str:
    """SVG of loss and validation over the steps, for the runs whose training is still there; else ""."""
    files = {run.label: run.training / "metrics.jsonl" for run in runs if run.training}
    if not files:
        return ""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for label, file in files.items():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be cut, or half written
        for axis, key in zip(axes, ("total", "valid/J&F"), strict=True):
            points = [(record["step"], record[key]) for record in records if key in record]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else "")
    for axis, name in zip(axes, ("loss", "J&F of the validation during training"), strict=True):
        axis.set(xlabel="step", title=name)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend()
    return svg_text(figure)


def _costs(runs: Sequence[ScoredRun]) -> list[tuple[str, list[str]]]:
    """Stage -> milliseconds a frame in each run."""
    stages = dict.fromkeys(stage for run in runs for stage in run.cost.get("seconds", {}))

    def each(run: ScoredRun, seconds: float | None) -> str:
        return "-" if seconds is None else f"{1000 * seconds / max(1, run.cost['frames']):.1f}"

    rows = [(stage, [each(run, run.cost.get("seconds", {}).get(stage)) for run in runs]) for stage in stages]
    return [*rows, ("elapsed", [each(run, run.cost.get("elapsed")) for run in runs])] if rows else []


def _sentences(
    dataset: DatasetConfig, runs: Sequence[ScoredRun], names: Sequence[str], memory_rule: MemoryRule, count: int
) -> Iterator[dict[str, Any]]:
    """What the page shows of a sentence, best and worst of the last run and most changed, each once.

    Yields:
        ``expression``, ``why``, ``scores`` (label of a run, J&F in percent), ``strip`` and ``movie`` (data URIs; ""
        where the page has reached its size), ``traces`` (see ``_trace``).
    """
    ranked = sorted(names, key=lambda name: runs[-1].scores[name].jf)
    changed = most_changed(runs[0], runs[-1], names)[:count] if len(runs) > 1 else []
    chosen: dict[str, str] = {}
    for why, some in (("most changed", changed), ("worst", ranked[:count]), ("best", ranked[::-1][:count])):
        chosen |= {name: why for name in some if name not in chosen}
    expressions = {f"{e.video}/{e.exp_id}": e for e in read_expressions(dataset)}
    if lost := [name for name in names if name not in expressions]:
        raise ValueError(f"{dataset.name} ({dataset.split}) no longer has {lost[0]}: score the runs on what it is now")
    frames, masks, used = FrameStore(dataset), open_masks(dataset), 0
    for name, why in chosen.items():
        expression = expressions[name]
        video = DatasetVideo(frames, expression.video, expression.frames)
        read = open_sources(masks, {run.label: run.folder for run in runs}, [expression])
        row = draw_strip(expression.text, expression, video, read, _STRIP_FRAMES, long_side=_STRIP_SIDE)
        picture = cv2.imencode(".jpg", row[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
        movie = _movie(expression, video, read) if used < MAX_PICTURE_BYTES else b""
        used += len(picture) + len(movie)
        yield {
            "expression": expression,
            "why": why,
            "scores": [(run.label, run.scores[name].jf) for run in runs],
            "strip": _uri(picture, "image/jpeg"),
            "movie": _uri(movie, "video/mp4"),
            "traces": [_trace(run, expression, memory_rule) for run in runs if run.made_by],
        }


def open_sources(truth: MaskStore | None, folders: Mapping[str, Path], sentences: Video) -> ReadMasks:
    """A reader of all masks of some sentences about one video, which raises ValueError where one is missing.

    Args:
        truth: the source "ground truth", which comes first, empty in frames without one; None where it is not public.
        folders: of predictions, by what they are called.
        sentences: about the video.
    """
    opened = {source: open_predictions(folder, sentences) for source, folder in folders.items()}
    annotated = {} if truth is None else {expression: truth.annotated(expression) for expression in sentences}

    def read(expression: Expression, frames: Sequence[int], size: Size) -> dict[str, np.ndarray]:
        masks = {}
        if truth is not None:
            known = [place for place, frame in enumerate(frames) if annotated[expression][frame]]
            masks["ground truth"] = np.zeros((len(frames), *size), bool)
            masks["ground truth"][known] = truth.read(expression, [frames[place] for place in known], size)
        for source, predictions in opened.items():
            masks[source] = read_complete(predictions, expression, frames, size).to_dense() > 0
        return masks

    return read


def draw_strip(
    text: str,
    expression: Expression,
    video: DatasetVideo,
    read: ReadMasks,
    num_frames: int,
    colour: Colour = SENTENCE_COLOURS[0],
    long_side: int = 256,
) -> np.ndarray:
    """``strip`` of a sentence, over frames spread over the video, with a row for each source of masks."""
    chosen = sorted(set(context_indices_eval(len(video), num_frames)))
    frames = [video.read(index) for index in chosen]
    rows = read(expression, chosen, frames[0].shape[:2])
    return strip(text, [video.names[index] for index in chosen], frames, rows, colour, long_side)


def movie_frames(sentences: Video, video: DatasetVideo, read: ReadMasks, long_side: int) -> Iterator[np.ndarray]:
    """Every frame of a video, once for each source of masks, with all sentences in their colours."""
    painters = defaultdict[str, Painter](lambda: Painter(numbers(len(sentences)), palette(len(sentences))))
    for index, name in enumerate(video.names):
        frame = video.read(index)
        masks = [read(expression, [index], frame.shape[:2]) for expression in sentences]
        panels = []
        for source in masks[0]:
            scaled = fit(frame, np.concatenate([of_one[source] for of_one in masks]), long_side)
            panels.append(titled(painters[source].draw(*scaled, name), source))
        yield side_by_side(panels)


def _movie(expression: Expression, video: DatasetVideo, read: ReadMasks) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "movie.mp4"
        write_movie(path, movie_frames([expression], video, read, _MOVIE_SIDE), _FRAMES_PER_SECOND)
        return path.read_bytes()


def _trace(run: ScoredRun, expression: Expression, memory_rule: MemoryRule) -> dict[str, Any]:
    """What one run's model saw of a sentence, and what it answered.

    Where sentences start from key frames of their own, prompts and memories count from those, which predictions do not
    hold: then only the context frames are named.

    Returns:
        ``label`` of the run; ``plot``, an SVG of P([SEG]) and area over the frames; ``context``, the names of these
        frames; ``rows`` of some frames: name, query frames of the prompt, memories read, P([SEG]), share of the frame
        that is covered.
    """
    settings, names = run.made_by["identity"], expression.frames
    frames, inference, memory = settings["frames"], settings["inference"], settings["model"]["memory"]
    answers = read_answers(run.folder, expression)
    rows = []
    for index in sorted(set(context_indices_eval(len(names), _STRIP_FRAMES))):
        query = recalled = "counted from its key frame"
        if settings["key_frames"] is None:
            order = range(len(names))
            if inference["window"] == Window.clips.value:
                shown = clip_window(order, index, frames["num_query"])
            else:
                sampling = QuerySampling(frames["query_sampling"])
                shown = query_window(order, index, frames["num_query"], sampling)
            read = memory_rule(index, memory["num_frames"], inference["memory_stride"]) if memory["enabled"] else []
            query, recalled = (", ".join(names[number] for number in chosen) or "-" for chosen in (shown, read))
        answer = answers[index]
        rows.append((names[index], query, recalled, f"{answer['score']:.3f}", f"{100 * answer['area']:.1f} %"))
    context = [names[number] for number in context_indices_eval(len(names), frames["num_context"])]
    return {"label": run.label, "plot": _timeline(answers, names, context), "context": context, "rows": rows}


def _timeline(answers: Sequence[Mapping[str, Any]], names: Sequence[str], context: Sequence[str]) -> str:
    figure = Figure(figsize=(9, 1.6), layout="constrained")
    axis = figure.subplots()
    steps = range(len(answers))
    axis.plot(steps, [answer["score"] for answer in answers], label="P([SEG])")
    axis.fill_between(steps, [answer["area"] for answer in answers], alpha=0.4, color="C1", label="area")
    for name in context:
        axis.axvline(list(names).index(name), color="0.6", linestyle=":", linewidth=1)
    axis.set(ylim=(0, 1.05), xlim=(0, max(1, len(answers) - 1)), xlabel="frame (dotted: context frames)")
    axis.legend(loc="center left", fontsize=8)
    return svg_text(figure)


def svg_text(figure: Figure) -> str:
    """Text stays text, so that it takes the page's font and little room."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "glus"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}" if data else ""
