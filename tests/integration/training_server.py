"""Runs ``scripts/train.py`` again and again, each time in forked processes, with a fault at a chosen place.

Importing what training needs takes longer than a tiny training; here it is done once. Requests are lines of JSON:
``{"config": file, "fault": [name, rank, step], "processes": number, "env": {}, "deepspeed": {}}``, the last of which
changes DeepSpeed's config. Steps count from 1. A fault happens on one rank only, when it trains that step.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator  # noqa: TID251  # which the product does not replace
from omegaconf import OmegaConf

from glus import distributed
from glus.batch import GlusOutput
from glus.config import TrainConfig, load_config
from glus.data.dataset import Mixture
from glus.losses.contrastive import ContrastiveQueue
from glus.models.weight_files import SafetensorsFile
from glus.train import engine as engine_module
from glus.train.checkpoint import Checkpoints
from glus.train.engine import Engine
from glus.train.trainer import Trainer
from tests.programs import free_port

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import train

OUTPUTS = {"nan_masks": "mask_logits_NQmm", "nan_embeddings": "seg_embeds_NQC"}
"""Fault -> field of the model's output that becomes NaN."""


def _after(owner: type, name: str, fault: Callable[..., Any]) -> None:
    """Let ``fault(result, self, *args)`` give the result of a method."""
    method = getattr(owner, name)
    setattr(owner, name, lambda self, *args: fault(method(self, *args), self, *args))


def _before(owner: type, name: str, fault: Callable[..., Any]) -> None:
    """Call ``fault(self, *args)`` before a method."""
    method = getattr(owner, name)
    setattr(owner, name, lambda self, *args: (fault(self, *args), method(self, *args))[1])


def _blind_deepspeed() -> None:
    """Let none of DeepSpeed's optimizers look for gradients that are not finite, as most do not before 0.19.8."""
    for name, module in list(sys.modules.items()):
        if name.startswith("deepspeed.runtime"):
            if hasattr(module, "is_invalid_grad_norm"):
                module.is_invalid_grad_norm = lambda norm: False
            if hasattr(module, "DeepSpeedZeroOptimizer"):
                module.DeepSpeedZeroOptimizer.has_overflow = lambda *_, **__: False
            if hasattr(module, "DeepSpeedZeroOptimizer_Stage3"):
                module.DeepSpeedZeroOptimizer_Stage3.has_overflow = lambda *_, **__: False


class Fault:
    """Knows the step that is trained, and whether the fault is due."""

    def __init__(self, name: str, rank: int, step: int):
        self.name, self.rank, self.step = name, rank, step
        self.now = 0

    def install(self) -> None:
        _before(Trainer, "train_step", self._start_step)
        if self.name in (*OUTPUTS, "nan_gradient", "unseen_nan_gradient", "huge_masks", "hang"):
            _after(Engine, "__call__", self._spoil)
        if self.name == "unseen_nan_gradient":
            _blind_deepspeed()
        if self.name == "no_contrastive_terms":
            _after(ContrastiveQueue, "count_terms", lambda count, *_: 0 if self.is_due else count)
            _after(ContrastiveQueue, "candidates", lambda found, *_: [None] * len(found) if self.is_due else found)
        if self.name == "kill_while_saving":
            _before(SafetensorsFile, "append", lambda *_: self.is_due and os.kill(os.getpid(), signal.SIGKILL))
        if self.name == "disk_full":
            _before(Checkpoints, "save", self._fill_disk)
        if self.name == "loader_hangs":
            _before(Mixture, "__getitem__", self._hang)
        if self.name == "clock_skew":
            clock = time.monotonic
            time.monotonic = lambda: clock() * (1e6 if distributed.rank() == self.rank else 1)

    @property
    def is_due(self) -> bool:
        return self.now == self.step and distributed.rank() == self.rank

    def _start_step(self, trainer: Trainer, step: int) -> None:
        self.now = step + 1
        if self.is_due and self.name == "tell_of_waits":
            get_accelerator().synchronize = lambda *_: print("DeepSpeed waits for the device")
        if self.is_due and self.name == "loader_hangs":
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        if self.is_due and self.name.startswith("SIG"):  # as a scheduler does: to loader processes too
            loaders = [str(child.pid) for child in multiprocessing.active_children()]
            subprocess.run(["kill", f"-{self.name.removeprefix('SIG')}", *loaders, str(os.getpid())], check=True)

    def _hang(self, mixture: Mixture, number: int) -> None:
        """From the samples of the step on, of which there are two; a signal comes while they are waited for."""
        if number >= 2 * (self.step - 1) and distributed.rank() == self.rank:
            time.sleep(600)

    def _spoil(self, output: GlusOutput, *_: object) -> GlusOutput:
        if self.is_due and self.name in ("nan_gradient", "unseen_nan_gradient"):
            output.mask_logits_NQmm.register_hook(lambda gradient: gradient * torch.nan)
        elif self.is_due and self.name == "huge_masks":
            return output._replace(mask_logits_NQmm=output.mask_logits_NQmm * 1e6)
        elif self.is_due and self.name == "hang":
            time.sleep(600)
        elif self.is_due:
            field = OUTPUTS[self.name]
            return output._replace(**{field: getattr(output, field) * torch.nan})
        return output

    def _fill_disk(self, checkpoints: Checkpoints, *_: object) -> None:
        if self.is_due:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def change_deepspeed_config(changes: dict[str, Any]) -> None:
    """Let engines be made with other values of DeepSpeed's settings, by section."""
    make = engine_module._deepspeed_config

    def make_other(*args: Any) -> dict[str, Any]:
        config = make(*args)
        return config | {section: config[section] | values for section, values in changes.items()}

    engine_module._deepspeed_config = make_other


def run_rank(request: dict[str, Any], rank: int, port: int) -> None:
    """Train as one of the ranks, in a forked process of its own that writes to a file of its own."""
    output = os.open(f"{request['config']}.rank_{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["processes"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **request["env"]}
    Fault(*request["fault"]).install()
    change_deepspeed_config(request["deepspeed"])
    sys.argv = ["scripts/train.py"]
    try:
        sys.exit(train.train(load_config(TrainConfig, OmegaConf.load(request["config"]))))
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        train.leave_process_group()
    print(f"process group: {'joined' if dist.is_initialized() else 'left'}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def main() -> None:
    """Answer each request (a line of JSON) with the exit codes of its ranks; a signal's is negative."""
    for line in sys.stdin:
        request = json.loads(line)
        ranks, port = [], free_port()
        for rank in range(request["processes"]):
            ranks.append(os.fork())
            if not ranks[-1]:
                run_rank(request, rank, port)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]
        print(f"codes {json.dumps(codes)}", flush=True)


if __name__ == "__main__":
    main()
