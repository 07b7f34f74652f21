"""predict.py, show.py and segment_video.py as a user runs them."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glus.config import DatasetConfig, Precision, PredictConfig, PredictionForm, SettingsConfig, ShowConfig
from glus.data.benchmarks.index import read_expressions
from glus.data.loader import training_expressions
from glus.data.masks import decode_rle
from glus.evaluation.report import write_report
from glus.evaluation.score import score_predictions
from glus.inference.job import load_for_split
from glus.inference.video_run import STAGES
from glus.types import Expression
from tests.edits import edit_json
from tests.inference.conftest import contents
from tests.programs import ROOT, environment, load_script, run_program


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_program(f"scripts/{script}", *arguments, CUDA_VISIBLE_DEVICES="")


def masks_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


@pytest.fixture(scope="module")
def predictions(dataset: DatasetConfig, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "predictions"
    result = run("predict.py", *overrides(dataset, model_folder, folder))
    assert result.returncode == 0, result.stderr
    assert f"3 of 3 videos, 18 frames, {num_masks(dataset)} masks" in result.stdout
    assert "3/3 videos" in result.stderr, "progress, where there is no terminal"
    return folder


@pytest.fixture
def config(dataset: DatasetConfig, model_folder: Path, tmp_path: Path) -> PredictConfig:
    return PredictConfig(dataset=dataset, weights=str(model_folder), output=str(tmp_path / "out"))


def overrides(dataset: DatasetConfig, weights: Path | str, output: Path) -> list[str]:
    return [f"dataset.root={dataset.root}", f"weights={weights}", f"output={output}"]


def num_masks(dataset: DatasetConfig) -> int:
    return sum(len(expression.frames) for expression in read_expressions(dataset))


def test_predictions_are_complete_and_counted(predictions: Path, dataset: DatasetConfig):
    report = score_predictions(dataset, predictions)
    assert not report.problems
    assert not report.warnings
    summary = json.loads((predictions / "cost.json").read_text())
    assert summary["masks"] == num_masks(dataset) == len(masks_below(predictions))
    assert 0 < summary["without_seg"] <= summary["masks"], "a random model rarely says [SEG]"
    empty = sum(not np.array(Image.open(predictions / name)).any() for name in masks_below(predictions))
    assert summary["empty_masks"] == empty
    assert summary["frames"] == 18
    assert all(summary["seconds"][stage] > 0 for stage in (*STAGES, "write"))


@pytest.fixture(scope="module")
def codes(dataset: DatasetConfig, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same predictions as run-length codes."""
    folder = tmp_path_factory.mktemp("codes")
    config = PredictConfig(dataset=dataset, weights=str(model_folder), output=str(folder))
    load_script("predict").predict(replace(config, format=PredictionForm.rle))
    return folder


def test_codes_hold_the_same_masks(predictions: Path, codes: Path):
    found = {}
    for file in codes.glob("*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            for exp_id, code in line["masks"].items():
                found[f"{file.stem}/{exp_id}/{line['frame']}.png"] = decode_rle(code, line["size"])
    assert found.keys() == masks_below(predictions).keys()
    for name, mask in found.items():
        np.testing.assert_array_equal(np.array(Image.open(predictions / name)) > 0, mask > 0)


def test_codes_get_the_scores_of_pngs(predictions: Path, codes: Path, dataset: DatasetConfig, tmp_path: Path):
    of_codes, of_pngs = tmp_path / "codes", tmp_path / "pngs"
    done = run("score.py", f"dataset.root={dataset.root}", f"predictions={codes}", f"output={of_codes}")
    assert done.returncode == 0, done.stdout + done.stderr
    write_report(score_predictions(dataset, predictions), of_pngs)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (of_codes, of_pngs)]
    assert [report.pop("predictions") for report in reports] == [str(codes), str(predictions)]
    assert reports[0] == reports[1]
    assert (of_codes / "per_expression.csv").read_text() == (of_pngs / "per_expression.csv").read_text()
    assert 0 < reports[0]["mean_over_sentences"]["jf"] < 100
    assert not reports[0]["mean_over_sentences"]["num_incomplete"]


def test_every_job_of_a_sweep_predicts_into_a_folder_of_its_own(
    predictions: Path, dataset: DatasetConfig, model_folder: Path, tmp_path: Path
):
    weights, out = f"{tmp_path / 'nowhere'},{model_folder}", tmp_path / "out"
    result = run("predict.py", "-m", *overrides(dataset, weights, out), "inference.memory_stride=1,3")
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 2, "of the two jobs that have no weights"
    assert sorted(path.name for path in out.iterdir()) == ["2", "3"]
    assert contents(out / "3") == contents(predictions)
    assert contents(out / "2") != contents(predictions)


def test_a_finished_folder_is_left_as_it_is(predictions: Path, config: PredictConfig, dataset: DatasetConfig):
    before = {path: path.stat().st_mtime_ns for path in predictions.rglob("*.png")}
    summary = load_script("predict").predict(replace(config, output=str(predictions)))
    assert (summary.done, summary.masks) == (3, num_masks(dataset))
    assert {path: path.stat().st_mtime_ns for path in predictions.rglob("*.png")} == before


def test_another_setting_is_one_clear_message(predictions: Path, dataset: DatasetConfig, model_folder: Path):
    other = run("predict.py", *overrides(dataset, model_folder, predictions), "inference.memory_stride=1")
    assert other.returncode == 1
    message = other.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert "inference.memory_stride: 3 there, 1 now" in message
    assert "inference.memory_stride: 1 instead of the model folder's 3" in other.stdout + other.stderr


def test_a_video_that_another_process_has_is_left_to_it(predictions: Path, config: PredictConfig):
    predict = load_script("predict").predict
    out = Path(config.output)
    assert predict(replace(config, max_videos=1)).done == 1
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'r+')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX, 1, 2); print(flush=True); sys.stdin.read()"  # the second video
    )
    command = [sys.executable, "-c", hold, str(out / "predict.json")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert predict(config).done == 2
        other.kill()
    assert predict(config).done == 3
    assert contents(out) == contents(predictions)


def test_an_unreadable_frame_is_named_and_the_other_videos_are_predicted(
    predictions: Path, config: PredictConfig, dataset: DatasetConfig, tmp_path: Path
):
    broken = shutil.copytree(dataset.root, tmp_path / "broken")
    names = {expression.video: expression.frames for expression in read_expressions(dataset)}
    video = sorted(names)[1]
    frame = next(broken.glob(f"valid/JPEGImages/{video}/{names[video][3]}.*"))
    good = frame.read_bytes()
    frame.write_bytes(good[: len(good) // 2])
    config = replace(config, dataset=replace(dataset, root=str(broken)))
    predict = load_script("predict").predict
    message = rf"1 of 3 videos could not be predicted \(2 are done\)(?s:.*){video}/{names[video][3]} does not decode"
    with pytest.raises(ValueError, match=message):
        predict(config)
    assert not [name for name in contents(Path(config.output)) if name.startswith(video)]
    frame.write_bytes(good)
    predict(config)
    assert contents(Path(config.output)) == contents(predictions)


def test_half_a_character_is_named_before_a_model_is_loaded(
    config: PredictConfig, dataset: DatasetConfig, tmp_path: Path
):
    """All sentences are part of what marks a folder, so that no video may be predicted before this one is mended."""
    broken = shutil.copytree(dataset.root, tmp_path / "broken")
    first = read_expressions(dataset)[0]
    edit_json(
        broken / "valid/meta_expressions.json",
        lambda content: content["videos"][first.video]["expressions"][first.exp_id].update(exp="a \ud83d"),
    )
    config = replace(config, dataset=replace(dataset, root=str(broken)), weights=str(tmp_path))
    with pytest.raises(ValueError, match=f"the sentence of {first.name} is no text"):
        load_for_split(config, read_expressions(config.dataset))
    with pytest.raises(ValueError, match=f"the sentence of {first.name} is no text"):
        training_expressions(config.dataset, num_query=2)


@pytest.mark.slow
def test_torchrun(predictions: Path, dataset: DatasetConfig, model_folder: Path, tmp_path: Path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "scripts/predict.py")]
    arguments = [*launcher, *overrides(dataset, model_folder, tmp_path / "out")]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(predictions)
    assert "3 of 3 videos" in done.stdout


def test_show(predictions: Path, dataset: DatasetConfig, tmp_path: Path):
    config = ShowConfig(
        dataset=dataset, predictions=str(predictions), output=str(tmp_path),
        max_videos=1, num_expressions=2, num_frames=3,
    )  # fmt: skip
    program = load_script("show")
    apart = [Expression("d", video, exp_id, "", (), (), ()) for video, exp_id in ("a0", "b0", "a1")]
    chosen = program.choose_videos(apart, replace(config, max_videos=2))
    assert [[expression.exp_id for expression in video] for video in chosen] == [["0", "1"], ["0"]]
    show = program.show
    written = show(config)
    assert [path.suffix for path in written] == [".png", ".png", ".mp4", ".gif"]
    assert all(path.stat().st_size > 1000 for path in written)
    with Image.open(written[0]) as image:
        assert image.width == 3 * 256 + 2 * 6
    with pytest.raises(ValueError, match="the split has no 'nobody'"):
        show(replace(config, videos=["nobody"]))
    with pytest.raises(ValueError, match="is missing"):
        show(replace(config, predictions=str(tmp_path)))


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in (1, 2, 10):
        Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)).save(folder / f"img{number}.png")
    return folder


def test_segment_video(frames: Path, model_folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    arguments = ("--video", frames, "--weights", model_folder, "--output", out, "--text", "The cat.", "--text", "a dog")
    result = run("segment_video.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["a-dog", "overlay.mp4", "segmentation.json", "the-cat"]
    summary = json.loads((out / "segmentation.json").read_text())
    assert [sentence["text"] for sentence in summary["sentences"]] == ["The cat.", "a dog"]
    for sentence in summary["sentences"]:
        assert [answer["frame"] for answer in sentence["frames"]] == ["img1", "img2", "img10"]
        for answer in sentence["frames"]:
            with Image.open(out / sentence["folder"] / f"{answer['frame']}.png") as image:
                assert image.size == (50, 30)
                assert np.mean(np.array(image) == 255) == pytest.approx(answer["area"], abs=1e-6)
            assert 0 <= answer["score"] <= 1
    assert not list(tmp_path.glob(".*"))

    main = load_script("segment_video").main
    with pytest.raises(SystemExit, match="add --overwrite"):
        main([*map(str, arguments)])

    part = (*arguments[:5], tmp_path / "part", "--text", "a dog", "--start", "1", "--every", "1", "--key-frames", "2")
    result = run("segment_video.py", *part, "--window", "clips", "--no-memory-enabled")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "part" / "a-dog").glob("*.png")) == ["img10.png", "img2.png"]
    assert "inference.window: clips instead of the model folder's sliding" in result.stderr
    assert "model.memory.enabled: False instead of the model folder's True" in result.stderr
    assert "frames: 2, sentences: 1, device: " in result.stderr
    with pytest.raises(SystemExit, match=r"error: --key-frames first: expected a frame's number for each sentence"):
        main([*map(str, part[:-1]), "first", "--overwrite"])
    with pytest.raises(SystemExit, match=r"inference.chunk_frames=0: expected at least 1"):
        main([*map(str, part), "--overwrite", "--chunk-frames", "0"])

    # A movie is a video file like any other.
    movie = (
        "--video",
        out / "overlay.mp4",
        "--weights",
        model_folder,
        "--text",
        "x",
        "--output",
        tmp_path / "of_movie",
    )
    main([*map(str, movie)])
    assert sorted(path.name for path in (tmp_path / "of_movie/x").glob("*.png")) == [f"0000{i}.png" for i in range(3)]


@pytest.mark.parametrize("precision", [None, *Precision])
def test_segment_video_computes_in_the_precision_that_is_asked_for(
    precision: Precision | None, monkeypatch: pytest.MonkeyPatch
):
    script, asked = load_script("segment_video"), []

    def stop(*_: object, settings: SettingsConfig, **__: object) -> None:
        asked.append(settings.precision)
        raise ValueError("far enough")

    monkeypatch.setattr(script, "segment", stop)
    option = ["--precision", precision.value] if precision else []
    with pytest.raises(SystemExit, match="far enough"):
        script.main(["--video", "v", "--text", "x", "--weights", "w", "--output", "o", *option])
    assert asked == [precision]


def test_segment_video_prints_what_a_terminal_of_ascii_can_show(
    frames: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii", write_through=True))
    arguments = ("--video", frames, "--weights", model_folder, "--text", "猫", "--output", tmp_path / "out")
    load_script("segment_video").main([*map(str, arguments)])
    assert b"\\u732b: found in 3 of 3 frames" in printed.getvalue()
    assert (tmp_path / "out/猫/img1.png").is_file()


def test_segment_video_knows_the_home_folder(frames: Path, model_folder: Path, tmp_path: Path, monkeypatch):
    """Which no shell writes into ``--output=~/x``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    main = load_script("segment_video").main
    main(["--video=~/frames", f"--weights={model_folder}", "--text=x", "--output=~/out"])
    assert (tmp_path / "out/x/img1.png").is_file()
    with pytest.raises(SystemExit):
        main(["--video=", f"--weights={model_folder}", "--text=x", "--output=~/out2"])


def test_segment_video_says_what_is_wrong(frames: Path, model_folder: Path, tmp_path: Path):
    (frames / "img2.png").write_bytes(b"not a picture")
    arguments = ("--video", frames, "--weights", model_folder, "--text", "x", "--output", tmp_path / "out")
    with pytest.raises(SystemExit, match=r"^error: .*img2"):
        load_script("segment_video").main([*map(str, arguments)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames"], "nothing is left of it"
