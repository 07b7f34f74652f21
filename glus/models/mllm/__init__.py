"""Multimodal LLMs, one file per family: what sees frames, reads conversations and answers with states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from glus.batch import TokenRows
from glus.config import Quantization

if TYPE_CHECKING:
    from glus.models.mllm.attention import Prefix


class Mllm(Protocol):
    """The seam where another family enters; a family is an ``nn.Module``. Training and inference call the
    same verbs."""

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]]
    """What ``model.trainable`` may name of the family: part -> substrings of the names of its parameters."""
    width: int
    """D."""
    tokens_per_frame: int
    """P."""
    max_length: int
    """Tokens of a conversation that it can read."""

    @property
    def prepare(self) -> Callable[[np.ndarray], np.ndarray]:
        """Makes of a frame, (H, W, 3) uint8 RGB, on the CPU what travels to the device of it, uint8."""

    @property
    def dtype(self) -> torch.dtype:
        """Of visual tokens and states."""

    @property
    def stages(self) -> Mapping[str, nn.Module]:
        """The parts that costs are told apart by."""

    def see(self, pixels_F3ss: torch.Tensor) -> torch.Tensor:
        """Visual tokens (F, P, D) of prepared frames, channels first; under no_grad what is frozen."""

    def states(
        self, rows: TokenRows, visual_TD: torch.Tensor, past: Sequence[Prefix] = (), keep: bool = False
    ) -> tuple[torch.Tensor, Prefix | None]:
        """Final states where rows are read.

        Args:
            rows: B rows of L tokens.
            visual_TD: the visual tokens that the rows show.
            past: what all rows continue, the oldest first; every token attends to all of it.
            keep: the rows are to be continued in turn.

        Returns:
            (R, D) states; keys and values of the rows if they are kept.
        """

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits (..., V) of states (..., D)."""

    def note_trained(self) -> None:
        """To be called when ``requires_grad`` of parameters has changed."""

    def checkpoint_gradients(self, on: bool = True) -> None:
        """From now on, recompute each layer in the backward pass instead of keeping its activations; or no more."""

    def compile_layers(self) -> None:
        """From now on, each layer runs compiled in training; names of tensors stay."""

    def quantize(self, quantization: Quantization, device: torch.device) -> Callable[[str, torch.Tensor], torch.Tensor]:
        """Make room for projections in fewer bits; returns what makes of a weight, by its name, what is held."""

    def complete(self, device: torch.device) -> None:
        """Give the last tensors their values, which come from no file but follow from what was loaded."""
