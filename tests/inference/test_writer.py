"""Predictions that are complete or absent, and that belong to one model."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from glus.config import DatasetConfig, InferenceConfig, ModelFolderConfig, PredictionForm
from glus.data.benchmarks.index import read_expressions
from glus.data.masks import decode_rle
from glus.inference.job import PredictionJob, prediction_identity
from glus.models.pretrained import LoadedModel
from glus.types import Expression, FrameResult, Video

IDENTITY = {"dataset": {"name": "d"}, "inference": {"memory_stride": 3}}
VIDEO = [Expression("d", "deep/er/video", exp_id, "the cat", ("f 1", "2"), (), ()) for exp_id in ("10", "a")]
MASK = np.array([[True, False, False], [False, False, False]])
ANSWER = (np.array([0.5]), np.array([True]), np.array([0.25]))
MARK = "predict.json"
FORMS = pytest.mark.parametrize("form", PredictionForm)


def results() -> list[FrameResult]:
    """Expression 10 is answered first in one frame, then in the other, as with key frames; expression a meanwhile."""
    answers = np.array([0.25, 0.75]), np.array([True, False]), np.array([0.625, 0.0])
    both = FrameResult(1, (0, 1), np.stack([MASK, ~MASK]), *answers)
    one = FrameResult(0, (0,), MASK[None] & False, *ANSWER)
    other = FrameResult(0, (1,), MASK[None], np.array([0.125]), np.array([True]), np.array([0.5]))
    return [both, one, other]


def write(job: PredictionJob, answers: Iterable[FrameResult], video: Video = VIDEO) -> None:
    assert sum(job.write(video, answers, {})) == 2 * len(video)


def open_job(folder: Path, form: PredictionForm = PredictionForm.png) -> PredictionJob:
    return PredictionJob(folder, IDENTITY, {}, form)


def everything_below(folder: Path) -> list[str]:
    """Files, without those that the job keeps for itself."""
    files = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MARK and not name.startswith(".records"))


def test_pngs_appear_together_under_the_names_of_the_frames(tmp_path):
    job = open_job(tmp_path)

    def observed() -> Iterator[FrameResult]:
        yield from results()
        assert not job.is_done(VIDEO)
        assert not (tmp_path / "deep/er/video/10").exists()

    write(job, observed())
    assert job.is_done(VIDEO)
    names = ("2.png", "answers.json", "f 1.png")
    assert everything_below(tmp_path) == [f"deep/er/video/{exp_id}/{name}" for exp_id in ("10", "a") for name in names]
    with Image.open(tmp_path / "deep/er/video/10/2.png") as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.array(image), MASK * np.uint8(255))
    assert json.loads((tmp_path / "deep/er/video/a/answers.json").read_text()) == [
        {"frame": "2", "area": pytest.approx(5 / 6, abs=1e-6), "score": 0.75, "object_score": 0.0, "has_seg": False},
        {"frame": "f 1", "area": pytest.approx(1 / 6, abs=1e-6), "score": 0.125, "object_score": 0.5, "has_seg": True},
    ]


def test_codes_appear_together_a_line_per_result(tmp_path):
    job = open_job(tmp_path, PredictionForm.rle)

    def observed() -> Iterator[FrameResult]:
        yield from results()
        assert not job.is_done(VIDEO)

    write(job, observed())
    assert job.is_done(VIDEO)
    assert everything_below(tmp_path) == ["deep/er/video.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "deep/er/video.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == ["2", "f 1", "f 1"]
    assert lines[0]["size"] == [2, 3]
    assert lines[0]["scores"] == {"10": 0.25, "a": 0.75}
    assert lines[0]["has_seg"] == {"10": True, "a": False}
    assert lines[0]["object_scores"] == {"10": 0.625, "a": 0.0}
    np.testing.assert_array_equal(decode_rle(lines[0]["masks"]["a"], (2, 3)), ~MASK)
    assert lines[1]["masks"].keys() == {"10"}


@FORMS
def test_what_is_done_is_counted(tmp_path, form):
    job = open_job(tmp_path, form)
    clock = {"llm": 5.0}

    def timed() -> Iterator[FrameResult]:
        yield from results()
        clock["llm"] += 2.0

    assert list(job.write(VIDEO, timed(), clock)) == [2, 1, 1]
    other = [replace(VIDEO[0], video="other")]
    summary = job.conclude([VIDEO, other])
    assert json.loads((tmp_path / "cost.json").read_text()) == asdict(summary)
    assert (summary.videos, summary.done, summary.frames, summary.masks) == (2, 1, 2, 4)
    assert (summary.without_seg, summary.empty_masks) == (1, 1)
    assert summary.seconds["llm"] == 2.0
    assert 0 < summary.seconds["write"] < summary.elapsed
    assert "1 of 2 videos, 2 frames, 4 masks: 1 without [SEG] (25.0%), 1 empty (25.0%)" in summary.table()
    written = (tmp_path / "cost.json").stat().st_mtime_ns
    job.conclude([VIDEO, other])
    assert (tmp_path / "cost.json").stat().st_mtime_ns == written, "nothing was predicted since: scores are not older"


def test_a_lost_record_does_not_lose_the_run(tmp_path, caplog):
    """As in a copy without hidden files."""
    job, other = open_job(tmp_path), [replace(e, video="other") for e in VIDEO]
    write(job, results())
    shutil.rmtree(tmp_path / ".records")
    write(job, results(), other)
    summary = job.conclude([VIDEO, other])
    assert (summary.videos, summary.done, summary.frames, summary.masks) == (2, 2, 2, 4)
    assert "cost.json leaves out 1 of 2 videos" in caplog.text
    shutil.rmtree(tmp_path / ".records")
    assert (job.conclude([VIDEO, other]).done, job.conclude([VIDEO, other]).frames) == (2, 0)


@FORMS
def test_an_error_leaves_nothing(tmp_path, form):
    job = open_job(tmp_path, form)

    def unreadable() -> Iterator[FrameResult]:
        yield results()[0]
        raise ValueError("cannot read")

    with pytest.raises(ValueError, match="cannot read"):
        write(job, unreadable())
    assert everything_below(tmp_path) == []


@FORMS
def test_what_is_given_up_leaves_nothing(tmp_path, form):
    writing = open_job(tmp_path, form).write(VIDEO, results(), {})
    next(writing)
    writing.close()
    assert everything_below(tmp_path) == []


@FORMS
def test_a_missing_mask_is_no_finished_video(tmp_path, form):
    job = open_job(tmp_path, form)
    with pytest.raises(AssertionError):
        write(job, results()[:2])
    assert everything_below(tmp_path) == []


@FORMS
def test_what_a_killed_run_left_is_not_taken_over(tmp_path, form):
    killed, clean = tmp_path / "killed", tmp_path / "clean"

    def interrupted() -> Iterator[FrameResult]:
        first, *others = (replace(result, frame=1 - result.frame) for result in results())
        yield first
        while not any("tmp" in name for name in everything_below(clean)):
            time.sleep(0.01)
        shutil.copytree(clean, killed)  # what kill -9 would leave at this moment
        yield from others

    write(open_job(clean, form), interrupted())
    job = open_job(killed, form)
    assert not job.is_done(VIDEO)
    write(job, results())
    assert job.is_done(VIDEO)
    assert everything_below(killed) == everything_below(clean), "the same files, and nothing temporary"


def test_expressions_that_a_killed_run_finished_are_left_alone(tmp_path):
    job = open_job(tmp_path)
    write(job, [replace(result, rows=(0,), **first_row(result)) for result in results()[:2]], VIDEO[:1])
    before = (tmp_path / "deep/er/video/10/2.png").stat().st_mtime_ns
    write(job, results())
    assert (tmp_path / "deep/er/video/10/2.png").stat().st_mtime_ns == before
    assert (tmp_path / "deep/er/video/a/2.png").is_file()


def first_row(result: FrameResult) -> dict[str, np.ndarray]:
    return {name: getattr(result, name)[:1] for name in ("masks_RHW", "scores_R", "has_seg_R", "object_scores_R")}


@FORMS
def test_a_full_disk_is_one_clear_message_and_leaves_nothing(tmp_path, form, monkeypatch):
    """The second write to the disk fails, in the thread that writes."""
    job = open_job(tmp_path, form)
    opened, real_open = [], Path.open

    def open_on_a_full_disk(path: Path, mode: str = "r", **options: object) -> object:
        opened.append(path)
        if "tmp" in str(path) and mode in ("a", "wb") and len(opened) > 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real_open(path, mode, **options)

    monkeypatch.setattr(Path, "open", open_on_a_full_disk)
    message = r"cannot write .*deep/er.*: No space left .* MiB free .* run the same command"
    with pytest.raises(OSError, match=message):
        write(job, results())
    monkeypatch.undo()
    assert everything_below(tmp_path) == []
    write(open_job(tmp_path, form), results())
    assert job.is_done(VIDEO)


@pytest.mark.parametrize("name", ["summary.json", "Cost.JSON/x", "predict.json", ".records", "report.json"])
def test_a_video_that_is_called_as_a_file_of_ours_is_refused_before_the_first_frame(tmp_path, name):
    videos = [VIDEO, [replace(expression, video=name) for expression in VIDEO]]
    with pytest.raises(ValueError, match=rf"video '{name}' and a file of this program would share .*another id"):
        open_job(tmp_path).run(videos, process=pytest.fail)
    assert everything_below(tmp_path) == []


@FORMS
@pytest.mark.parametrize("is_case_blind", [False, True])
def test_videos_whose_names_differ_in_case_alone_need_a_disk_that_tells_them_apart(tmp_path, form, is_case_blind):
    videos = [[Expression("d", name, "0", "the cat", ("1",), (), ())] for name in ("a/b", "A/b")]
    job = open_job(tmp_path, form)
    if is_case_blind:
        (tmp_path / MARK.upper()).symlink_to(MARK)
        with pytest.raises(ValueError, match=r"video 'A/b' and video 'a/b' would share .*upper from lower case"):
            job.run(videos, process=pytest.fail)
    else:
        job.run(videos, process=lambda video: job.write(video, [FrameResult(0, (0,), MASK[None], *ANSWER)], {}))
        assert all(map(job.is_done, videos))


def test_what_is_finished_is_kept_is_said_where_it_is_true(tmp_path, monkeypatch):
    videos = [[Expression("d", name, "0", "the cat", ("1",), (), ())] for name in "ab"]
    job = open_job(tmp_path)

    def process(video: Video) -> Iterator[int]:
        if video[0].video == "b":
            raise OSError("cannot write b: No space left on device")
        return job.write(video, [FrameResult(0, (0,), MASK[None], *ANSWER)], {})

    with pytest.raises(OSError, match="No space left on device; what is finished is kept"):
        job.run(videos, process)
    assert list(map(job.is_done, videos)) == [True, False]


def test_masks_need_room_before_the_first_frame(tmp_path, monkeypatch):
    job = open_job(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * 4096 - 1))
    with pytest.raises(OSError, match="4 files take at least"):
        job.run([VIDEO], process=pytest.fail)


def test_processes_claim_a_video_each(tmp_path):
    """A lock is its process's own, so another process has to try."""
    other = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'r+')\n"
        "for video in (1, 2):\n"
        "    try: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, video)\n"
        "    except OSError: print(False)\n"
        "    else: print(True)"
    )
    command = [sys.executable, "-c", other, str(tmp_path / MARK)]

    def claimed_by_other() -> list[str]:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    job = open_job(tmp_path)
    with job.locked(1) as is_mine:
        assert is_mine
        assert claimed_by_other() == ["False", "True"]
    assert claimed_by_other() == ["True", "True"]


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("glus.inference.job.fcntl.lockf", lockf)
    with pytest.raises(OSError, match=r"predict.json cannot be locked \(No locks available\).*choose output on"):
        open_job(tmp_path)


def test_another_model_setting_or_form_is_refused(tmp_path):
    PredictionJob(tmp_path, IDENTITY, {"run": 1}, PredictionForm.png)
    PredictionJob(tmp_path, IDENTITY, {"run": 2}, PredictionForm.png)
    assert json.loads((tmp_path / MARK).read_text()) == {"identity": {**IDENTITY, "form": "png"}, "run": 1}
    other = {**IDENTITY, "inference": {"memory_stride": 1}}
    with pytest.raises(ValueError, match=r"inference.memory_stride: 3 there, 1 now.*choose another output"):
        PredictionJob(tmp_path, other, {}, PredictionForm.png)
    with pytest.raises(ValueError, match=r"form: png there, rle now"):
        open_job(tmp_path, PredictionForm.rle)


def test_an_identity_cut_short_by_a_kill_is_written_anew(tmp_path):
    (tmp_path / MARK).write_text('{"identity": {"data')
    open_job(tmp_path)
    assert json.loads((tmp_path / MARK).read_text())["identity"] == {**IDENTITY, "form": "png"}


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds 'thesis.tex' but no predict.json"):
        open_job(tmp_path)
    assert everything_below(tmp_path) == ["thesis.tex"]


def test_a_file_is_no_folder_of_predictions(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file; expected the name of a folder for predictions"):
        PredictionJob(tmp_path / "file", IDENTITY, {}, PredictionForm.png)
    assert (tmp_path / "file").read_text() == "mine"


def test_identity_tells_what_decides_masks(
    dataset: DatasetConfig, tiny_model: LoadedModel, model_folder: Path, tmp_path: Path
):
    expressions = read_expressions(dataset)
    settings = tiny_model.config
    identity = prediction_identity(dataset, expressions, model_folder, settings)
    assert identity == json.loads(json.dumps(identity))

    moved = replace(dataset, root="elsewhere")
    model = replace(settings.model, llm=replace(settings.model.llm, tokenizer="elsewhere"))
    assert prediction_identity(moved, expressions, model_folder, replace(settings, model=model)) == identity

    slower = replace(settings, inference=InferenceConfig(chunk_frames=1, token_budget=1, memory_gb=0.5))
    assert prediction_identity(dataset, expressions, model_folder, slower) == identity
    assert "existence_threshold" not in identity["inference"]  # those of before there was one go on
    never = replace(settings, inference=InferenceConfig(existence_threshold=0.0))
    assert prediction_identity(dataset, expressions, model_folder, never) == identity

    strided = replace(settings, inference=InferenceConfig(memory_stride=7))
    deciding = replace(settings, inference=InferenceConfig(existence_threshold=0.5))
    longer = replace(settings, frames=replace(settings.frames, num_query=8))
    assert isinstance(longer, ModelFolderConfig)
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "exp_avg.safetensors").write_bytes(b"what training goes on with")
    assert prediction_identity(dataset, expressions, copy, settings) == identity
    with (copy / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x01")
    renamed = [replace(expressions[0], text="another sentence"), *expressions[1:]]
    key_frames = tmp_path / "key_frames.json"
    key_frames.write_text("{}")
    others = [
        prediction_identity(dataset, expressions, model_folder, settings, key_frames),
        prediction_identity(dataset, expressions, model_folder, strided),
        prediction_identity(dataset, expressions, model_folder, deciding),
        prediction_identity(dataset, expressions, model_folder, longer),
        prediction_identity(dataset, expressions, copy, settings),
        prediction_identity(dataset, renamed, model_folder, settings),
        prediction_identity(replace(dataset, split="train"), expressions, model_folder, settings),
    ]
    assert all(other != identity for other in others)
