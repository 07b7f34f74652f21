"""Which device a process uses, how, and when it refuses to."""

from __future__ import annotations

import copy
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glus import distributed
from glus.config import LlmConfig
from glus.models.mllm.llava import build_llama


def allocator() -> dict[str, str]:
    """What the environment says of CUDA's memory."""
    return {name: os.environ[name] for name in distributed.ALLOCATOR_VARIABLES if name in os.environ}


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As on a machine with a GPU; the list gets what is done to CUDA, in order."""
    done: list[str] = []
    for name in distributed.ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(f"use {device} {allocator()}"))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: done.append(f"cuDNN attention {on}"))
    return done


def test_cuda_starts_with_memory_that_grows_and_without_cudnn_attention(one_gpu: list[str]) -> None:
    assert distributed.use_device() == torch.device("cuda", 0)
    growing = dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True")
    assert one_gpu == [f"use cuda:0 {growing}", "cuDNN attention False"]


@pytest.mark.parametrize("name", distributed.ALLOCATOR_VARIABLES)
def test_what_the_environment_says_of_memory_stays(one_gpu: list[str], name: str) -> None:
    os.environ[name] = "max_split_size_mb:512"
    distributed.use_device()
    assert allocator() == {name: "max_split_size_mb:512"}


def test_a_cpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = copy.deepcopy(dict(os.environ)), torch.backends.cuda.cudnn_sdp_enabled()
    assert distributed.use_device() == torch.device("cpu")
    assert (dict(os.environ), torch.backends.cuda.cudnn_sdp_enabled()) == before


def test_peak_memory_is_in_gib_on_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2**40))
    assert 0.01 < distributed.peak_memory_gib() < 1000, "its own, not that of a larger process that started it"
    monkeypatch.setattr(distributed, "_STATUS", tmp_path / "of no Linux")
    for system, used in (("linux", 3 * 2**20), ("darwin", 3 * 2**30)):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(resource, "getrusage", lambda who, used=used: SimpleNamespace(ru_maxrss=used))
        assert distributed.peak_memory_gib() == 3


def test_a_large_model_is_not_started_on_a_cpu_by_accident(monkeypatch: pytest.MonkeyPatch, one_gpu: list[str]) -> None:
    distributed.check_size(7 * 10**9, allow_cpu=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    distributed.check_size(7 * 10**9, allow_cpu=True)
    distributed.check_size(10**8, allow_cpu=False)
    with pytest.raises(ValueError, match=r"no usable GPU, .* of 7.0 billion .*tools/doctor.py .*allow_cpu=true"):
        distributed.check_size(7 * 10**9, allow_cpu=False)


@pytest.mark.parametrize("architecture", [{}, {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3}])
def test_the_size_of_an_llm_follows_from_its_config(architecture: dict[str, int]) -> None:
    config = LlmConfig(architecture, vocab_size=32004, tokenizer="")
    with torch.device("meta"):
        llama = build_llama(config.architecture, config.vocab_size)
    assert config.num_parameters == pytest.approx(sum(p.numel() for p in llama.parameters()), rel=1e-3)


TWO_RANKS = """
import sys
from datetime import timedelta
import torch.distributed as dist
from glus import distributed

class Refused(FileNotFoundError):
    def __init__(self, folder, file):  # pickle would make it again from its text alone
        super().__init__(f"{folder} has no {file}")

class Odd(Exception):
    pass

def fail(error):
    raise error

rank = int(sys.argv[1])
group = dict(init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
dist.init_process_group("gloo", **group)
for error in (Refused("run", "config.yaml"), Odd("lambda")):
    error.unpicklable = lambda: None
    try:
        distributed.on_main(lambda: fail(error))
    except Exception as raised:
        print(type(raised).__name__, raised, flush=True)
print(distributed.on_main(lambda: distributed.rank()))
dist.destroy_process_group()
"""


def test_an_error_of_rank_0_that_cannot_be_pickled_reaches_the_others(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWO_RANKS]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    first, second = (process.communicate(timeout=120)[0].splitlines() for process in ranks)
    assert first == ["Refused run has no config.yaml", "Odd lambda", "0"]
    assert second == ["FileNotFoundError run has no config.yaml", "RuntimeError Odd: lambda", "0"]
