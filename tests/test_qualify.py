"""Qualifying a machine: each stage at a tiny size, what is judged and how, resuming, failing, and the page."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from glus.config import GIB, nominal_tflops
from tests.conftest import tiny_model_config
from tests.programs import run_program
from tools import qualify
from tools.benchmark_inference import compare_masks
from tools.benchmarks import plain, stages
from tools.benchmarks.measuring import Sizes, choose_sizes
from tools.benchmarks.stages import MACHINE_TESTS, run_stage

TINY = Sizes(videos=1, procedures=("ours",), predictions=((2, 4),), frame_size=(64, 64), plain_frames=2, mask_videos=1)


@pytest.fixture
def random_sizes(monkeypatch: pytest.MonkeyPatch) -> Sizes:
    """The way of the full size, with random weights, at the size of the tests' model."""
    config = tiny_model_config(plain.SHIPPED_MODEL, 32004)
    monkeypatch.setattr(plain, "model_config", lambda size: config)
    return dataclasses.replace(TINY, model="glus_7b")


# Stages


def test_environment_names_machine_peaks_and_versions(tmp_path: Path) -> None:
    record = run_stage("environment", tmp_path, TINY)
    assert json.loads((tmp_path / "environment.json").read_text())["verdict"] == record["verdict"] == "PASS"
    assert record["values"]["versions"]["torch"] == torch.__version__
    assert all(value > 0 for value in record["values"]["peaks"].values())


@pytest.mark.parametrize("stage", ["gpu_tests", "quantisation"])
def test_what_needs_a_gpu_is_absent_without_one(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record = run_stage(stage, tmp_path, TINY)
    assert (record["verdict"], record["reason"]) == ("absent", "there is no GPU")


def test_full_size_is_written_and_loaded_with_the_same_answers(tmp_path: Path, random_sizes: Sizes) -> None:
    assert run_stage("full_size", tmp_path, random_sizes)["verdict"] == "PASS"
    record = run_stage("loading", tmp_path, random_sizes)
    assert record["verdict"] == "PASS"
    assert [goal["found"] for goal in record["goals"]] == ["0.00%", "0.00%"]
    file = tmp_path / stages.WEIGHTS_FOLDER / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # not to write what is mapped
    tensors["mllm.llama.lm_head.weight"] *= -1
    file.unlink()
    save_file(tensors, file)
    assert run_stage("loading", tmp_path, random_sizes)["verdict"] == "FAIL"


def test_weights_that_are_not_finite_fail(tmp_path: Path, random_sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    build = plain.build_predictor

    def damaged(size: str) -> object:
        predictor = build(size)
        with torch.no_grad():
            predictor.glus.mllm.llama.lm_head.weight[31000, 0] = math.inf
        return predictor

    monkeypatch.setattr(plain, "build_predictor", damaged)
    with pytest.raises(ValueError, match="the LLM's answer is not finite"):
        run_stage("full_size", tmp_path, random_sizes)
    monkeypatch.setattr(stages, "answers", lambda *_: (np.zeros((1, 1, 2, 2), bool), np.ones((1, 1))))
    assert run_stage("full_size", tmp_path, random_sizes)["verdict"] == "FAIL"


def test_a_full_disk_leaves_loading_out(tmp_path: Path, random_sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    record = run_stage("full_size", tmp_path, random_sizes)
    assert (record["verdict"], record["values"]["written"]) == ("PASS", "no: 0 GiB free")
    assert run_stage("loading", tmp_path, random_sizes)["reason"].startswith("no room on the disk")


def test_training_measures_procedures(tmp_path: Path) -> None:
    record = run_stage("training", tmp_path, TINY)
    assert record["verdict"] == "PASS"
    assert record["values"]["procedures"]["ours"]["seconds"] > 0


def test_a_step_of_a_run_is_measured(tmp_path: Path) -> None:
    """In a process of its own, as DeepSpeed's process group needs it."""
    assert qualify.start_stage("plan", tmp_path) == 0, (tmp_path / "plan.log").read_text()[-3000:]
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["verdict"] == "PASS"
    first, second = record["values"]["losses"]
    assert second < first
    assert record["values"]["seconds"] > 0


def test_the_plan_is_that_of_the_optimizer_in_use(random_sizes: Sizes) -> None:
    from glus.config import BUCKET_NUMBERS, TrainConfig, TrainerConfig
    from glus.models.pretrained import build_glus
    from glus.train.plan import trace_micro_batch

    config = TrainConfig(model=plain.model_config(""), trainer=TrainerConfig(steps=1), output="")
    parameters = list(build_glus(config.model).parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    beside = stages.planned_bytes(config) - 4 * sum(parameter.numel() for parameter in parameters)
    activations = 2 * trace_micro_batch(config, 1, config.trainer.gradient_checkpointing).peak
    assert beside == pytest.approx(4 * 4 * trained + 4 * BUCKET_NUMBERS + activations, rel=0.01)


@pytest.mark.parametrize(("mfu", "nominal", "met"), [(0.6, 1000.0, True), (0.5, 1000.0, False), (0.5, None, True)])
def test_utilisation_is_of_the_makers_figure(mfu: float, nominal: float | None, met: bool) -> None:
    values = {"peak_tflops": 800.0, "procedures": {"ours": {"mfu": mfu}, "ours, checkpointing": {}}}
    assert [goal.is_met for goal in stages.judge_training(values, nominal)] == [met]
    assert not stages.judge_training({"peak_tflops": 800.0, "procedures": {"ours, checkpointing": {}}}, nominal)


@pytest.mark.parametrize(("peak", "met"), [(100, True), (109, True), (111, False), (89, False)])
def test_memory_is_to_be_near_the_plan(peak: float, met: bool) -> None:
    assert stages.judge_plan({"peak_bytes": peak, "planned_bytes": 100}).is_met is met


def test_prediction_compares_with_the_plain_procedure(tmp_path: Path) -> None:
    record = run_stage("prediction", tmp_path, TINY)
    assert (record["verdict"], record["goals"][0]["found"]) == ("PASS", "0")
    (measured,) = record["values"].values()
    assert measured["plain_counts"]["SAM2 images"] == 2 * 4
    (table,) = record["tables"]
    expected = {"seconds: llm", "frames_per_second_ratio", "plain_counts: SAM2 images"}
    assert expected <= {row[0] for row in table["rows"]}


@pytest.mark.parametrize(("ratio", "is_met"), [(10.0, True), (9.9, False)])
def test_a_gpu_is_to_be_ten_times_as_fast(ratio: float, is_met: bool) -> None:
    measured = {"frames_per_second_ratio": ratio, "pixels_that_differ_far_from_threshold": 5}
    assert stages.judge_prediction("", measured, torch.device("cuda")).is_met is is_met
    assert not stages.judge_prediction("", measured, torch.device("cpu")).is_met


def test_masks_are_compared_frame_by_frame() -> None:
    one = np.zeros((3, 4, 4), bool)
    one[0, :2], one[1, :2] = True, True
    other = one.copy()
    other[1, 1] = False
    compared = compare_masks(one, other)
    assert (compared["median IoU"], compared["mean IoU"], compared["least IoU"]) == (1.0, pytest.approx(2.5 / 3), 0.5)
    assert compared["share of pixels that differ"] == 4 / 48


@pytest.mark.slow
def test_masks_in_bfloat16_are_nearly_those_in_float32(tmp_path: Path) -> None:
    record = run_stage("masks", tmp_path, TINY)
    assert record["verdict"] == "PASS"
    assert 0 < record["values"]["share of pixels that differ"] < 0.01


@pytest.mark.parametrize(
    ("output", "met", "other"),
    [
        ("..\n2 passed in 1.20s", True, []),
        (".s\nSKIPPED [1] a.py:3: no\n1 passed, 1 skipped in 1s", True, ["SKIPPED [1] a.py:3: no"]),
        (".F\nFAILED a.py::bad - no\n1 failed, 1 passed in 1s", False, ["FAILED a.py::bad - no"]),
        ("E\nERROR a.py::bad\n1 passed, 1 error in 1s", False, ["ERROR a.py::bad"]),
        ("s\nSKIPPED [1] a.py:3: no\n1 skipped in 1s", False, ["SKIPPED [1] a.py:3: no"]),
        ("", False, []),
    ],
)
def test_results_of_pytest_are_read(output: str, met: bool, other: list[str]) -> None:
    found = stages.judge_tests(output)
    assert found.goals[0].is_met is met
    assert [row for table in found.tables for (row,) in table.rows] == other


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA L40S", 362),
        ("Tesla T4", None),
    ],
)
def test_peaks_of_cards(card: str, expected: float | None) -> None:
    assert nominal_tflops(card) == expected


@pytest.mark.parametrize(
    ("gib", "model", "videos", "first"),
    [(16, "tiny", 1, "ours"), (24, "glus_7b", 1, "ours, checkpointing"), (80, "glus_7b", 2, "ours")],
)
def test_sizes_follow_the_card(gib: int, model: str, videos: int, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=gib * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    sizes = choose_sizes(torch.device("cuda"))
    assert (sizes.model, sizes.videos, sizes.procedures[0]) == (model, videos, first)


def test_a_library_that_is_missing_leaves_a_stage_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> Callable[..., None]:
        def stage(*_: object) -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return stage

    monkeypatch.setitem(MACHINE_TESTS, "masks", without("hydra.core"))
    record = run_stage("masks", tmp_path, Sizes())
    assert (record["verdict"], record["reason"]) == ("absent", "hydra.core is not installed")
    monkeypatch.setitem(MACHINE_TESTS, "masks", without("glus.models.gone"))
    with pytest.raises(ModuleNotFoundError):
        run_stage("masks", tmp_path, Sizes())


# The command


class Machine:
    """Stands in for the processes of stages: writes what ``verdicts`` says, and remembers what was started."""

    def __init__(self, **verdicts: str):
        self.name, self.code, self.verdicts, self.started = "GPU", "first", verdicts, []

    def __call__(self, stage: str, folder: Path) -> int:
        self.started.append(stage)
        verdict = self.verdicts.get(stage, "PASS")
        if verdict == "interrupted":
            raise KeyboardInterrupt
        if verdict == "broken":
            (folder / f"{stage}.log").write_text("Traceback\nModuleNotFoundError: No module named 'sam2'\n\n")
            return 1
        goal = {"name": "MFU", "found": "44 %", "expected": ">= 45 %", "is_met": verdict == "PASS"}
        table = {"title": f"Table of {stage}", "columns": ["a", "b"], "rows": [["x|y", "2"]]}
        record = {"stage": stage, "verdict": verdict, "machine": self.name, "torch": "2", "seconds": 1.0}
        record |= {"sizes": {"model": "glus_7b"}, "code": self.code}
        record |= {"goals": [goal], "tables": [table]} if verdict != "absent" else {"reason": "no GPU"}
        (folder / f"{stage}.json").write_text(json.dumps(record))
        return 0


ALL = list(MACHINE_TESTS)


def read_page(folder: Path) -> str:
    """Without what aligns the cells of its tables."""
    return re.sub(" +", " ", (folder / "qualify.md").read_text())


def test_a_machine_that_passes(tmp_path: Path) -> None:
    (tmp_path / stages.WEIGHTS_FOLDER).mkdir()
    assert qualify.qualify(ALL, tmp_path, Machine(gpu_tests="absent")) == 0
    page = read_page(tmp_path)
    assert "GPU, torch 2: what was tried is as expected; not measured here: gpu_tests." in page
    assert "with the full size, random weights." in page
    assert "| training | **PASS** | MFU: 44 % (>= 45 %) | 1 |" in page
    assert "## Table of training\n\n| a | b |\n| ---- | --- |\n| x\\|y | 2 |" in page
    assert [record["stage"] for record in json.loads((tmp_path / "qualify.json").read_text())] == ALL
    assert not (tmp_path / stages.WEIGHTS_FOLDER).exists()


def test_what_other_code_measured_is_measured_again(tmp_path: Path) -> None:
    qualify.qualify(ALL, tmp_path, Machine())
    same, other = Machine(), Machine()
    qualify.qualify(ALL, tmp_path, same)
    assert same.started == ["environment"]
    other.code = "mended"
    qualify.qualify(ALL, tmp_path, other)
    assert other.started == ALL


def test_a_stage_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    first = Machine(training="broken", prediction="FAIL")
    assert qualify.qualify(ALL, tmp_path, first) == 1
    assert first.started == ALL
    page = read_page(tmp_path)
    assert "do not rely on it yet (training, prediction)" in page
    assert "| training | **ERROR** | ModuleNotFoundError: No module named 'sam2' | 0 |" in page
    again = Machine()
    assert qualify.qualify(ALL, tmp_path, again) == 1  # what missed its goal was measured, and stands
    assert again.started == ["environment", "training"]


def test_without_an_environment_the_other_stages_run_all_the_same(tmp_path: Path) -> None:
    machine = Machine(environment="broken")
    assert qualify.qualify(ALL, tmp_path, machine) == 1
    assert machine.started == ALL


def test_weights_stay_for_a_stage_that_is_to_be_done_again(tmp_path: Path) -> None:
    (tmp_path / stages.WEIGHTS_FOLDER).mkdir()
    assert qualify.qualify(ALL, tmp_path, Machine(loading="broken")) == 1
    assert (tmp_path / stages.WEIGHTS_FOLDER).is_dir()
    assert qualify.qualify(ALL, tmp_path, Machine()) == 0
    assert not (tmp_path / stages.WEIGHTS_FOLDER).exists()


def test_what_was_interrupted_goes_on(tmp_path: Path) -> None:
    (tmp_path / stages.WEIGHTS_FOLDER).mkdir()
    assert qualify.qualify(ALL, tmp_path, Machine(prediction="interrupted")) == 130
    assert "not measured here: prediction, masks" in (tmp_path / "qualify.md").read_text()
    assert (tmp_path / stages.WEIGHTS_FOLDER).is_dir()
    again = Machine()
    assert qualify.qualify(ALL, tmp_path, again) == 0
    assert again.started == ["environment", *ALL[ALL.index("prediction") :]]


def test_results_of_another_machine_do_not_count(tmp_path: Path) -> None:
    qualify.qualify(ALL, tmp_path, Machine())
    other = Machine()
    other.name = "another GPU"
    qualify.qualify(ALL, tmp_path, other)
    assert other.started == ALL


def test_a_process_that_dies_is_told_by_its_signal(tmp_path: Path) -> None:
    assert qualify.describe_failure(-4, tmp_path / "none.log").startswith("ended by SIGILL; ONEDNN_MAX_CPU_ISA")
    assert qualify.describe_failure(-11, tmp_path / "none.log") == "ended by SIGSEGV"
    assert qualify.describe_failure(1, tmp_path / "none.log") == "exit status 1"
    (tmp_path / "killed.log").write_text("a warning that has nothing to do with it\n")
    assert qualify.describe_failure(-9, tmp_path / "killed.log").startswith("ended by SIGKILL; ")


def test_a_stage_that_takes_too_long_is_stopped_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qualify, "TIME_LIMIT", 0.01)
    record = qualify.record_stage("environment", tmp_path, qualify.start_stage)
    assert (record["verdict"], record["reason"]) == ("ERROR", "stopped after 0 s")


def test_the_command_as_a_user_runs_it(tmp_path: Path) -> None:
    """A library that is missing fails the stages that need it, and only these."""
    stub = tmp_path / "stub" / "sam2"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'sam2'\")\n")
    only = ["--only", "full_size", "--output", tmp_path / "out"]
    result = run_program("tools/qualify.py", *only, PYTHONPATH=str(stub.parent))
    assert result.returncode == 1
    assert "environment: PASS" in result.stderr
    assert "full_size: ERROR" in result.stderr
    assert "No module named 'sam2'" in (tmp_path / "out" / "qualify.md").read_text()
