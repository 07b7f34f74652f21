"""The recorded model, loaded as any published checkpoint is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from glus.config import FuserGamma, LlmConfig, ModelConfig
from glus.models.pretrained import LoadedModel
from glus.models.release import build_release, read_release
from glus.models.release_layout import GLUS
from glus.models.weights import IN_MEMORY, LoadReport, load, read_tensors
from tools.parity.fixture import Fixture
from tools.parity.report import Report


class Models:
    """Loads the recorded model when it is asked for.

    Args:
        fixture: names the checkpoint, CLIP and SAM2's architecture.
    """

    def __init__(self, fixture: Fixture):
        self._fixture = fixture
        self._loaded: dict[FuserGamma, tuple[LoadedModel, dict[str, LoadReport]]] = {}

    def frozen(self, gamma: FuserGamma) -> LoadedModel:
        """For inference; the same object each time, so whoever changes it changes it back.

        Raises:
            FileNotFoundError, ValueError: see ``read_release`` and ``build_release``.
        """
        return self.loaded(gamma)[0]

    def loaded(self, gamma: FuserGamma) -> tuple[LoadedModel, dict[str, LoadReport]]:
        """``frozen``, and for each of its files what was loaded."""
        if gamma not in self._loaded:
            checkpoint = read_release(self._fixture.checkpoint, self._fixture.segmenter, str(self._fixture.clip))
            checkpoint.config.segmenter = replace(self._fixture.segmenter, fuser_gamma=gamma)
            self._loaded[gamma] = build_release(checkpoint)
        return self._loaded[gamma]

    def trainable(self, lora: Path, detach: bool) -> LoadedModel:
        """A new one in training mode, as released: true gamma, LoRA with the recorded matrices; but no dropout.

        Args:
            lora: LoRA matrices under PEFT's names; rank and adapted projections are those of this file.
            detach: memories carry no gradient.

        Raises:
            FileNotFoundError, ValueError: a file is missing or does not fit.
        """
        adapters = GLUS.source(lora, read_tensors(lora))
        checkpoint = read_release(self._fixture.checkpoint, self._fixture.segmenter, str(self._fixture.clip))
        config = checkpoint.config
        config.llm.lora_rank, config.llm.lora_targets = _lora_shape(
            {name: value.shape for name, value in adapters.tensors.items()}, lora
        )
        config.llm.lora_alpha = LlmConfig().lora_alpha
        config.trainable = ModelConfig().trainable
        config.memory.detach = detach
        model, _ = build_release(checkpoint)
        names = [name for name in model.glus.state_dict() if ".lora_" in name]
        load(model.glus, lambda: replace(adapters, only=names), IN_MEMORY)
        model.glus.train()
        silence_dropout(model.glus)
        return model


def silence_dropout(module: nn.Module) -> None:
    """Set the probability of every dropout to 0: of layers, and in the fields where attention layers keep theirs."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("dropout_p", "attention_dropout"):
            if hasattr(part, name):
                setattr(part, name, 0.0)


def _lora_shape(adapters: dict[str, torch.Size], path: Path) -> tuple[int, list[str]]:
    """Rank of adapters, and the projections they adapt."""
    matches = {name: re.search(r"\.(\w+)\.lora_A\.", name) for name in adapters}
    targets = {match[1] for match in matches.values() if match}
    ranks = {adapters[name][0] for name, match in matches.items() if match}
    if len(ranks) != 1:
        raise ValueError(f"{path}: expected LoRA matrices of one rank, found ranks {sorted(ranks)}")
    return ranks.pop(), sorted(targets)


def replay_checkpoint(report: Report, fixture: Fixture, models: Models) -> None:
    """That the checkpoint loads, whole, and that its SAM2 is the one that the folder also holds by itself.

    Args:
        report: gets the rows.
        fixture: what to replay.
        models: the recorded model.
    """
    case = report.case("checkpoint")
    with case.errors_as_row("tensors"):
        model, reports = models.loaded(FuserGamma.checkpoint)
        for what, loaded in reports.items():
            problems = sum(len(names) for names in loaded.problems.values())
            case.differing(f"tensors of {what}", problems, loaded.matched + problems, str(loaded))
        if fixture.sam2_weights is None:
            case.absent("SAM2's own file", "fixture.json names none")
            return
        ours = model.glus.segmenter.sam.state_dict()
        recorded = read_tensors(fixture.sam2_weights)
        differing = {name for name in ours.keys() & recorded.keys() if not torch.equal(ours[name], recorded[name])}
        differing |= ours.keys() ^ recorded.keys()
        case.differing("SAM2's own file", len(differing), len(ours), ", ".join(sorted(differing)[:3]))
