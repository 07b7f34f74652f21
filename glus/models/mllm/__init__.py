"""Multimodal LLMs, one file per family: what sees frames, reads conversations and answers with states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from glus.batch import TokenRows
from glus.tokens import ChatStyle
from glus.types import Role

if TYPE_CHECKING:
    from glus.models.mllm.decoder import Decoder, Prefix


class Mllm(Protocol):
    """The seam where another family enters; a family is an ``nn.Module``. Training and inference call the
    same verbs."""

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]]
    """What ``model.trainable`` may name of the family: part -> substrings of the names of its parameters."""
    PUBLISHED: ClassVar[tuple[tuple[str, str], ...]]
    """(how names of tensors begin in the family's published folders, how they begin here); empty where the parts come
    from several places."""
    chat: ChatStyle
    """How its conversations are written."""
    roles: tuple[Role, ...]
    """Those in which a frame looks different: context and query, or query alone, which context frames are seen like."""
    width: int
    """D."""
    visual_shape: tuple[int, ...]
    """Of one visual token: (D,), or (G, D) where more than its embedding goes into the LLM. One tensor, so that nothing
    of it can be left behind."""
    decoder: Decoder
    """The LLM."""

    @property
    def prepare(self) -> Callable[..., np.ndarray]:
        """Makes of a frame, (H, W, 3) uint8 RGB, and its ``Role`` (default: query) on the CPU what travels to the
        device of it, (h, w, 3) uint8."""

    def grid(self, size_HW: tuple[int, int], role: Role) -> tuple[int, int]:
        """Rows and columns of the visual tokens of a frame of this size; P is their product."""

    @property
    def stages(self) -> Mapping[str, nn.Module]:
        """The parts that costs are told apart by."""

    def see(self, pixels_F3hw: torch.Tensor) -> torch.Tensor:
        """Visual tokens (F, P, *visual_shape) of prepared frames, channels first; autograd keeps nothing
        of what is frozen, as pixels have no gradient."""

    def states(
        self, rows: TokenRows, visual: torch.Tensor, past: Sequence[Prefix] = (), keep: bool = False
    ) -> tuple[torch.Tensor, Prefix | None]:
        """Final states where rows are read.

        Args:
            rows: B rows of L tokens.
            visual: (T, *visual_shape), the visual tokens that the rows show.
            past: what all rows continue, the oldest first; every token attends to all of it.
            keep: the rows are to be continued in turn.

        Returns:
            (R, D) states; keys and values of the rows if they are kept.
        """
