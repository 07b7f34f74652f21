"""LLaVA as LISA and GLUS use it: CLIP's pooled patch features in, LLaMA's states out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from glus import compat
from glus.batch import TokenRows
from glus.models.mllm.decoder import NAME, Decoder, Prefix, attend, llm_parts, plain_rotary
from glus.models.mllm.pixels import CLIP_MEAN, CLIP_STD
from glus.tokens import ChatStyle
from glus.types import Role

if TYPE_CHECKING:
    from transformers import CLIPVisionModel, LlamaForCausalLM


def build_vision_tower(architecture: dict[str, Any]) -> CLIPVisionModel:
    """A CLIP vision model with random weights.

    Args:
        architecture: fields of ``transformers.CLIPVisionConfig``.
    """
    compat.prepare_torchvision()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**architecture))


class ClipEncoder(nn.Module):
    """CLIP patch features, averaged over runs of ``pool`` consecutive patches.

    The pooling is one-dimensional over the raster sequence, before the projector, as in the released GLUS
    (``AvgPool1d`` in llava_arch.py); with 16 patches a row and ``pool=4`` a token is a quarter of a row.

    Args:
        vision_model: the tower.
        select_layer: index into its ``hidden_states``; the layers after it have weights but are not run.
        pool: patches per visual token.

    Raises:
        ValueError: there is no such layer, or the number of patches is not a multiple of ``pool``.
    """

    def __init__(self, vision_model: CLIPVisionModel, select_layer: int, pool: int):
        super().__init__()
        self.vision_model = vision_model
        self.select_layer = select_layer
        num_layers = len(vision_model.encoder.layers)
        if not -num_layers - 1 <= select_layer <= num_layers:
            raise ValueError(f"model.clip.select_layer={select_layer}: the tower has {num_layers} layers")
        self.num_run = select_layer % (num_layers + 1)
        """Layers that are run: ``hidden_states`` begins with the state before the first."""
        self.pool = pool
        config: Any = vision_model.config  # its sizes may be tuples elsewhere; CLIP's are numbers
        self.image_size: int = config.image_size
        self.width: int = config.hidden_size
        num_patches = (config.image_size // config.patch_size) ** 2
        if num_patches % pool:
            raise ValueError(
                f"model.clip.pool={pool}: {num_patches} patches a frame cannot be split into runs of {pool}"
            )
        self.tokens_per_frame = num_patches // pool

    def forward(self, crops_FCss: torch.Tensor) -> torch.Tensor:
        """Features of frames.

        Args:
            crops_FCss: (F, 3, s, s) uint8, RGB.

        Returns:
            (F, P, width) in the tower's dtype.
        """
        # Numbers, not buffers: casting the model to bfloat16 would round them by up to 0.2 %. Not tensors made here
        # either: copying them to a GPU would wait for it.
        scaled = crops_FCss.to(torch.float32) * (1 / 255)
        channels = [(scaled[:, c] - CLIP_MEAN[c]) / CLIP_STD[c] for c in range(3)]
        pixels = torch.stack(channels, dim=1)
        tower = self.vision_model
        states = tower.pre_layrnorm(tower.embeddings(pixels.to(tower.dtype)))
        for layer in tower.encoder.layers[: self.num_run]:
            states = layer(states, attention_mask=None)
        patches = states[:, 1:]  # without CLS
        return F.avg_pool1d(patches.transpose(1, 2), self.pool, self.pool).transpose(1, 2)


def clip_crop(frame_HW3: np.ndarray, size: int) -> np.ndarray:
    """The centre square that CLIP sees: bicubic resize of the shorter edge to ``size``, then a centre crop.

    The left and right of a wide frame never reach the language model. Equal to ``CLIPImageProcessor`` (its PIL
    form) of openai/clip-vit-large-patch14, before its rescaling: the long edge becomes ``int(size * long / short)``.

    Args:
        frame_HW3: (H, W, 3) uint8 RGB.
        size: side of CLIP's input in pixels.

    Returns:
        (size, size, 3) uint8 RGB.
    """
    height, width = frame_HW3.shape[:2]
    short, long = min(height, width), max(height, width)
    new_long = int(size * long / short)
    new_height, new_width = (size, new_long) if height <= width else (new_long, size)
    resized = Image.fromarray(frame_HW3).resize((new_width, new_height), Image.Resampling.BICUBIC)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return np.array(resized.crop((left, top, left + size, top + size)))


def _prepared(frame_HW3: np.ndarray, role: Role = Role.query, *, size: int) -> np.ndarray:
    """CLIP sees the same square in either role."""
    return clip_crop(frame_HW3, size)


def build_llama(architecture: dict[str, Any], vocab_size: int) -> LlamaForCausalLM:
    """A LLaMA with random weights, the attention of ``decoder.py``, rotary frequencies as ``plain_rotary`` makes
    them, and an untied head.

    Args:
        architecture: fields of ``transformers.LlamaConfig``.
        vocab_size: rows of the embedding table and of the head.
    """
    compat.prepare_torchvision()
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register(NAME, attend)
    fixed: dict[str, Any] = dict(
        vocab_size=vocab_size,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation=NAME,
    )
    llama = LlamaForCausalLM(LlamaConfig(**architecture, **fixed))
    llama.model.rotary_emb = plain_rotary(llama.model.rotary_emb)  # type: ignore[assignment]
    return llama


def rotary_frequencies(architecture: dict[str, Any]) -> torch.Tensor:
    """Radians per position of each pair of a head's channels: (head width / 2,) float32, on the CPU.

    Args:
        architecture: fields of ``transformers.LlamaConfig``.
    """
    compat.prepare_torchvision()
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with torch.device("cpu"):
        return LlamaRotaryEmbedding(LlamaConfig(**architecture)).inv_freq.detach().clone()


PROJECTOR_STD = 0.01


def build_projector(clip_width: int, width: int) -> nn.Linear:
    """The projector at random, to be loaded or trained.

    CLIP features are tens of times longer than word embeddings; a projector that starts small keeps visual tokens from
    drowning what the layers of an LLM that starts from nothing add to them.
    """
    projector = nn.Linear(clip_width, width)
    nn.init.normal_(projector.weight, std=PROJECTOR_STD)
    nn.init.zeros_(projector.bias)
    return projector


class Llava(nn.Module):
    """CLIP, a linear projector and LLaMA, as one ``Mllm``.

    Args:
        clip: what the LLM sees through.
        projector: CLIP width -> LLM width.
        llama: the LLM, with or without LoRA adapters.
    """

    PREFIXES: ClassVar[tuple[str, str]] = ("mllm.llama.model.", "mllm.llama.")
    """See ``Decoder``."""
    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "clip": ("mllm.clip.",),
        "projector": ("mllm.projector.",),
        **llm_parts(*PREFIXES),
    }
    PUBLISHED: ClassVar[tuple[tuple[str, str], ...]] = ()
    chat = ChatStyle("llava")
    roles: tuple[Role, ...] = (Role.query,)

    def __init__(self, clip: ClipEncoder, projector: nn.Linear, llama: LlamaForCausalLM):
        super().__init__()
        self.clip, self.projector, self.llama = clip, projector, llama
        self.width: int = llama.config.hidden_size
        self.tokens_per_frame = clip.tokens_per_frame
        self.visual_shape: tuple[int, ...] = (self.width,)
        self.prepare = partial(_prepared, size=clip.image_size)
        # No weights, so no file will bring them to a tower that is still without memory.
        embeddings = clip.vision_model.embeddings
        embeddings.register_buffer("position_ids", torch.arange(embeddings.num_positions)[None], persistent=False)
        self.decoder = Decoder(llama.model, llama, *self.PREFIXES)

    def grid(self, size_HW: tuple[int, int], role: Role) -> tuple[int, int]:
        """See ``Mllm``: pooled runs of patches have no rows."""
        return 1, self.tokens_per_frame

    def see(self, pixels_F3ss: torch.Tensor) -> torch.Tensor:
        """See ``Mllm``."""
        return self.projector(self.clip(pixels_F3ss))

    def states(
        self, rows: TokenRows, visual_TD: torch.Tensor, past: Sequence[Prefix] = (), keep: bool = False
    ) -> tuple[torch.Tensor, Prefix | None]:
        """See ``Mllm``."""
        return self.decoder.states(rows, self.decoder.splice(rows, visual_TD), past, keep)

    @property
    def stages(self) -> Mapping[str, nn.Module]:
        """See ``Mllm``."""
        return {"vision tower": self.clip, "LLM": self.llama.model}


def llava_of(glus: nn.Module) -> Llava:
    """The MLLM of a model, for whoever needs its insides: parity, benchmarks, the pre-training of small towers."""
    mllm = glus.mllm
    assert isinstance(mllm, Llava)
    return mllm
