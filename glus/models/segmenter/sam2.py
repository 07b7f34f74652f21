"""SAM2 as GLUS uses it: the only file that imports sam2.

GLUS calls SAM2's parts one by one and differs from SAM2's own tracker in what it feeds them: the prompt is the [SEG]
embedding alone, memory is read without temporal encoding and object pointers, and the memory encoder sees the
memory-*conditioned* feature (released GLUS.py:187-286, 729-777).
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from glus.batch import row_index

SAM2_MEAN = (0.485, 0.456, 0.406)
SAM2_STD = (0.229, 0.224, 0.225)
STABILITY_DELTA = 0.05
STABILITY_THRESHOLD = 0.98
"""sam2's build_sam2(apply_postprocessing=True): a mask is stable if shifting its threshold by +-delta changes its
area by less than 2 %."""
MAX_ENCODED = 32
"""Frames that the image encoder takes at a time. It attends within 1,024 windows of each, as so many rows of a batch,
of which CUDA's attention kernels take 65,535."""
BACKBONE_STRIDE = 16
"""Pixels of SAM2's input per cell of its image feature."""
_DECODER = "segmenter.sam.sam_mask_decoder."
IDENTITY_GAMMA = 1e-6
"""Layer scale at which a fuser block of the memory encoder is practically the identity: its value before loading."""


@dataclass(frozen=True)
class FrameFeatures:
    """SAM2's features of a batch of frames; after ``condition``, those that decoder and memory encoder see.

    The features of a single frame stand for any number of rows, also at some of the levels only.
    """

    high_NChw: tuple[torch.Tensor, torch.Tensor]
    """(N, C/8, S/4, S/4) and (N, C/4, S/8, S/8)."""
    image_NChw: torch.Tensor
    """(N, C, S/16, S/16)."""
    position_1Chw: torch.Tensor
    """(1, C, S/16, S/16): 2-D sine encoding."""
    dense_position_1Chw: torch.Tensor
    """(1, C, S/16, S/16): random-frequency encoding, for the mask decoder."""

    def rows(self, index: torch.Tensor | Sequence[int]) -> FrameFeatures:
        """The features of some frames, repeated as often as ``index`` names them."""
        return self._chosen(index if isinstance(index, torch.Tensor) else row_index(index, self.image_NChw.device))

    def frame(self, index: int) -> FrameFeatures:
        """The features of one frame, without a copy."""
        return self._chosen(slice(index, index + 1))

    def _chosen(self, where: torch.Tensor | slice) -> FrameFeatures:
        high = (self.high_NChw[0][where], self.high_NChw[1][where])
        return replace(self, high_NChw=high, image_NChw=self.image_NChw[where])


@dataclass(frozen=True)
class DecodedMasks:
    """The mask decoder's answer to one prompt per row."""

    logits_Nmm: torch.Tensor
    """Chosen mask, low resolution, any real number; > 0 is foreground."""
    all_logits_N4mm: torch.Tensor
    """The single mask and the three alternatives."""
    predicted_iou_N4: torch.Tensor
    """In [0, 1]."""
    stability_N: torch.Tensor
    """Of the single mask, in [0, 1]."""
    used_multimask_N: torch.Tensor
    """bool: the fallback replaced the single mask."""
    object_logits_N: torch.Tensor
    """Of whether the object is in the frame."""

    @property
    def predicted_iou_N(self) -> torch.Tensor:
        """Of the single mask."""
        return self.predicted_iou_N4[:, 0]


def build_sam2(variant: str, overrides: dict[str, Any]) -> nn.Module:
    """A ``sam2.modeling.sam2_base.SAM2Base`` with random weights.

    sam2's own ``build_sam2`` needs the global Hydra it initialises on import, which clashes with an application's;
    so the packaged YAML is read directly, and a Hydra that only the import initialised is cleared. Inside
    ``torch.device("meta")`` it is built on the CPU first, since sam2 reads numbers from tensors while it is built.

    Args:
        variant: file name of a packaged configuration, such as ``sam2_hiera_l`` or ``sam2.1_hiera_b+``.
        overrides: dotted keys below its ``model`` -> value. The attention's ``feat_sizes`` follow ``image_size``.

    Raises:
        ValueError: no such variant, or its parts do not take an override.
    """
    config = _packaged_config(variant)
    for key, value in overrides.items():
        OmegaConf.update(config, f"model.{key}", value, merge=False, force_add=True)
    # Stated here, or the rotary encodings would be recomputed at the first forward pass and kept: as tensors that
    # autograd refuses, should that pass run under inference_mode.
    side = config.model.image_size // BACKBONE_STRIDE
    for attention in ("self_attention", "cross_attention"):
        OmegaConf.update(config, f"model.memory_attention.layer.{attention}.feat_sizes", [side, side], merge=False)
    device = torch.empty(0).device
    try:
        with torch.device("cpu") if device.type == "meta" else nullcontext():
            sam: Any = instantiate(config.model, _recursive_=True)
    except InstantiationException as error:
        raise ValueError(f"model.segmenter.overrides do not fit {variant}: {error}") from error
    for part in (sam.image_encoder.neck, sam.memory_encoder):
        part.position_encoding = _OnePosition(part.position_encoding)
    return sam.to(device)


def _packaged_config(variant: str) -> DictConfig:
    """A configuration that sam2 packages; the global Hydra is left as it was found."""
    had_hydra = GlobalHydra.instance().is_initialized()
    folder = importlib.resources.files("sam2") / "configs"
    if not had_hydra:
        GlobalHydra.instance().clear()
    configs = {
        Path(str(file)).stem: file
        for family in ("sam2", "sam2.1")
        for file in (folder / family).iterdir()
        if str(file).endswith(".yaml")
    }
    if variant not in configs:
        raise ValueError(f"model.segmenter.variant={variant!r}: sam2 packages {', '.join(sorted(configs))}")
    config = OmegaConf.create(configs[variant].read_text())
    assert isinstance(config, DictConfig)
    return config


def stability_scores(logits_Nmm: torch.Tensor) -> torch.Tensor:
    """Share of a mask's area that survives raising the threshold from -delta to +delta: (N,) float32 in [0, 1].

    1 where even the larger area is empty (sam2's ``_get_stability_scores``).
    """
    inner_N = (logits_Nmm > STABILITY_DELTA).flatten(1).sum(-1).float()
    outer_N = (logits_Nmm > -STABILITY_DELTA).flatten(1).sum(-1).float()
    return torch.where(outer_N > 0, inner_N / outer_N, torch.ones_like(outer_N))


class _OnePosition(nn.Module):
    """A position encoding that is made for one frame, since all have the same: sam2's copies it for each.

    Nor is it copied from the device that the model was on before, as sam2 would in every frame, waiting each time.

    Args:
        encoding: a ``sam2.modeling.position_encoding.PositionEmbeddingSine``.
    """

    def __init__(self, encoding: nn.Module):
        super().__init__()
        self.encoding = encoding

    def forward(self, features_NChw: torch.Tensor) -> torch.Tensor:
        """(1, C, h, w)."""
        known: dict[tuple[int, int], torch.Tensor] = self.encoding.cache  # type: ignore[assignment]
        size = (features_NChw.shape[-2], features_NChw.shape[-1])
        if size in known:
            known[size] = known[size].to(features_NChw.device)
        return self.encoding(features_NChw[:1])


def is_trained(*modules: nn.Module) -> bool:
    """Whether any parameter takes gradients."""
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


class Sam2Segmenter(nn.Module):
    """SAM2 as a ``Segmenter``.

    What ``requires_grad`` nowhere runs under no_grad: the image encoder if it is frozen; memory attention and memory
    encoder if they are frozen, unless ``memory_gradient`` asks for gradients *through* them. ``note_trained`` tells
    which these are; looking at all parameters in every frame would take milliseconds.

    Args:
        sam: a SAM2Base.
        multimask_fallback: whether inference is to ``decode`` with the fallback; it changes nothing here.
        memory_gradient: let gradients flow from frame to frame: through stored memories, and through memory attention
            and memory encoder though they are frozen.
        is_fuser_identity: keep the memory encoder's fuser at the layer scale ``IDENTITY_GAMMA``.
    """

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "mask_decoder": ("segmenter.sam.sam_mask_decoder.",),
        "image_encoder": ("segmenter.sam.image_encoder.",),
        "memory": ("segmenter.sam.memory_attention.", "segmenter.sam.memory_encoder.", "segmenter.sam.no_mem_embed"),
        "prompt_encoder": ("segmenter.sam.sam_prompt_encoder.",),
    }
    NEVER_UPDATED: ClassVar[tuple[str, ...]] = (
        f"{_DECODER}conv_s0.",
        f"{_DECODER}conv_s1.",
        f"{_DECODER}iou_prediction_head.",
        f"{_DECODER}pred_obj_score_head.",
        *(f"{_DECODER}output_hypernetworks_mlps.{i}." for i in (1, 2, 3)),
    )
    """Parameters of the mask decoder that are declared trainable, as released, yet never learn: the convolutions run
    with the image encoder, under no_grad while that is frozen, and the other heads' outputs reach no loss, but for what
    ``loss.weights.mask_iou`` and ``object_score`` train. Without
    ``trainer.weight_decay`` (0, as released) they keep their values; with it they shrink, as what learns does."""

    def __init__(
        self,
        sam: nn.Module,
        multimask_fallback: bool,
        memory_gradient: bool = False,
        is_fuser_identity: bool = False,
    ):
        super().__init__()
        self.sam: Any = sam
        self.multimask_fallback = multimask_fallback
        self.memory_gradient = memory_gradient
        self.is_fuser_identity = is_fuser_identity
        self.image_size: int = sam.image_size  # type: ignore[assignment]
        self.width: int = sam.hidden_dim  # type: ignore[assignment]
        self.complete()
        self.note_trained()

    def note_trained(self) -> None:
        """To be called when ``requires_grad`` of parameters has changed."""
        self._encoder_is_trained = is_trained(self.sam.image_encoder)
        self._memory_is_trained = is_trained(self.sam.memory_attention, self.sam.memory_encoder)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.sam.no_mem_embed.dtype

    def prepare_frames(self, frames_FHWC: torch.Tensor) -> torch.Tensor:
        """SAM2's input: (F, H, W, 3) uint8 -> (F, 3, S, S) float32, squashed to a square (aspect ratio is not kept)."""
        pixels = frames_FHWC.permute(0, 3, 1, 2).to(torch.float32) / 255
        side = (self.image_size, self.image_size)
        pixels = F.interpolate(pixels, side, mode="bilinear", align_corners=False, antialias=True)
        # Numbers, for the reasons given in ClipEncoder.
        return torch.stack([(pixels[:, c] - SAM2_MEAN[c]) / SAM2_STD[c] for c in range(3)], dim=1)

    def encode_frames(self, image_F3SS: torch.Tensor) -> FrameFeatures:
        """Image features of prepared frames.

        The decoder's two high-resolution projections run here, once per frame, hence under the encoder's no_grad.
        """
        parts = [self._encode(images) for images in image_F3SS.split(MAX_ENCODED)]
        high_4, high_8, image = (
            torch.cat(levels) if len(levels) > 1 else levels[0] for levels in zip(*parts, strict=True)
        )
        position_1Chw = self.sam.image_encoder.neck.position_encoding(image).to(self.dtype)
        return FrameFeatures((high_4, high_8), image, position_1Chw, self.dense_position(*image.shape[2:]))

    def _encode(self, image_F3SS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._encoder_is_trained):
            out = self.sam.forward_image(image_F3SS.to(self.dtype))
            high_4, high_8, image = (level.to(self.dtype) for level in out["backbone_fpn"])
        return high_4, high_8, image

    def condition(self, frame: FrameFeatures, memories_NTChw: torch.Tensor | None) -> FrameFeatures:
        """The frame as it looks with memories in mind; without any, the no-memory embedding is added.

        Args:
            frame: N rows, or 1 row that stands for all.
            memories_NTChw: T of each row; an unordered set, since there is no temporal encoding.
        """
        with self._memory_grad():
            if memories_NTChw is None:
                return replace(frame, image_NChw=frame.image_NChw + self.sam.no_mem_embed.view(1, -1, 1, 1))
            n, t = memories_NTChw.shape[:2]
            self._move_rotary(memories_NTChw.device)
            position_1Chw = self.memory_position(memories_NTChw[:, 0])
            conditioned = self.sam.memory_attention(
                curr=_cells(frame.image_NChw).expand(-1, n, -1),
                curr_pos=_cells(frame.position_1Chw).expand(-1, n, -1),
                memory=memories_NTChw.flatten(3).permute(1, 3, 0, 2).flatten(0, 1),
                memory_pos=_cells(position_1Chw).repeat(t, n, 1),
            )
        return replace(frame, image_NChw=conditioned.permute(1, 2, 0).unflatten(2, frame.image_NChw.shape[2:]))

    def memory_position(self, memory_NChw: torch.Tensor) -> torch.Tensor:
        """(1, C_mem, h, w): 2-D sine encoding, the same for every memory."""
        position: torch.Tensor = self.sam.memory_encoder.position_encoding(memory_NChw)
        return position.to(self.dtype)

    def _move_rotary(self, device: torch.device) -> None:
        """Move the rotary frequencies, plain tensors in sam2, once: copied in every frame, a GPU would be waited for
        each time. Left to sam2, they would move under inference_mode, and training could not use them afterwards."""
        with torch.inference_mode(False):
            for layer in self.sam.memory_attention.layers:
                for part in (layer.self_attn, layer.cross_attn_image):
                    part.freqs_cis = part.freqs_cis.to(device)

    def decode(self, conditioned: FrameFeatures, prompt_NC: torch.Tensor, fallback: bool = False) -> DecodedMasks:
        """Masks for one prompt embedding per row; its tokens are the only sparse ones, there is no mask prompt.

        Args:
            conditioned: N rows.
            prompt_NC: of each row; n C channels are n tokens.
            fallback: replace an unstable mask by the alternative of highest predicted IoU.
        """
        n, (c, h, w) = len(prompt_NC), conditioned.image_NChw.shape[1:]
        dense = self.sam.sam_prompt_encoder.no_mask_embed.weight.view(1, c, 1, 1).expand(n, c, h, w)
        logits, iou, _, object_logits = self.sam.sam_mask_decoder.predict_masks(
            image_embeddings=conditioned.image_NChw.expand(n, -1, -1, -1),
            image_pe=conditioned.dense_position_1Chw,
            sparse_prompt_embeddings=prompt_NC.unflatten(1, (-1, self.width)),
            dense_prompt_embeddings=dense,
            repeat_image=False,
            high_res_features=list(conditioned.high_NChw),
        )
        single = logits[:, 0]
        stability = stability_scores(single)
        use = torch.zeros_like(stability, dtype=torch.bool)
        if fallback:
            use = stability < STABILITY_THRESHOLD
            best = logits[torch.arange(n, device=logits.device), 1 + iou[:, 1:].argmax(-1)]
            single = torch.where(use[:, None, None], best, single)
        return DecodedMasks(single, logits, iou, stability, use, object_logits[:, 0])

    def memorize(self, conditioned: FrameFeatures, logits_Nmm: torch.Tensor) -> torch.Tensor:
        """Memory of a frame with its predicted masks, soft, not binarised: (N, C_mem, h, w). Its gradient history is
        cut unless ``memory_gradient``."""
        with self._memory_grad():
            side = (self.image_size, self.image_size)
            logits_N1SS = F.interpolate(logits_Nmm[:, None].float(), side, mode="bilinear", align_corners=False)
            mask = torch.sigmoid(logits_N1SS.to(self.dtype))
            mask = mask * self.sam.sigmoid_scale_for_mem_enc + self.sam.sigmoid_bias_for_mem_enc
            out = self.sam.memory_encoder(conditioned.image_NChw, mask, skip_mask_sigmoid=True)
        memory: torch.Tensor = out["vision_features"]
        return memory if self.memory_gradient else memory.detach()

    def step_bytes(self, num_memories: int, size: tuple[int, int]) -> int:
        """Bytes that one row takes, at most, while a frame is conditioned, decoded and memorised, without gradients.

        Counted are, whichever is more, a layer of memory attention (memories and positions; keys, values and their
        rotation, which is in float32) or the decoder's and memory encoder's maps, and the masks at the frame's size.

        Args:
            num_memories: that the row reads.
            size: (H, W) of the frame.
        """
        width, each = self.width, self.dtype.itemsize
        memory_width = self.sam.mem_dim
        cells = (self.image_size // BACKBONE_STRIDE) ** 2
        attention = num_memories * cells * (3 * memory_width * each + width * (4 * each + 8))
        maps = 16 * cells * width * each + 12 * self.image_size**2
        return max(attention + 8 * cells * width * each, maps) + 5 * size[0] * size[1]

    def dense_position(self, h: int, w: int) -> torch.Tensor:
        """(1, C, h, w): random-frequency encoding of a grid, in the dtype of its Gaussian matrix.

        sam2 1.1.0 computes the grid in float32 and fails on a bfloat16 matrix; the released GLUS computed in bfloat16.
        """
        gaussian = self.sam.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        ones = torch.ones((h, w), device=gaussian.device, dtype=gaussian.dtype)
        grid = torch.stack([(ones.cumsum(1) - 0.5) / w, (ones.cumsum(0) - 0.5) / h], dim=-1)
        angles = (2 * grid - 1) @ gaussian * (2 * math.pi)
        return torch.cat([angles.sin(), angles.cos()], dim=-1).permute(2, 0, 1)[None]

    def mask_prompt(self, masks_RHW: torch.Tensor) -> torch.Tensor:
        """SAM2's own words for masks: the mean click embedding over a mask's pixels, at the length of one click.

        One embedding for one object (about a click on its centre), several, or none (then SAM2's "no point"). It is a
        prompt of a small SAM2's pre-training; the method has none.

        Args:
            masks_RHW: 0 or 1, any type.

        Returns:
            (R, C) without gradient to the masks.
        """
        encoder = self.sam.sam_prompt_encoder
        side = self.image_size // 4
        share = F.interpolate(masks_RHW[:, None].to(self.dtype), (side, side), mode="area").flatten(1)
        area = share.sum(1, keepdim=True)
        mean = F.normalize(share @ self.dense_position(side, side)[0].flatten(1).T, dim=1)
        click = mean * math.sqrt(self.width / 2) + encoder.point_embeddings[1].weight  # |(sin, cos)|^2 sums to C / 2
        return torch.where(area > 0, click, encoder.not_a_point_embed.weight)

    def complete(self) -> None:
        """See ``Segmenter``; the fuser's scales are what the released evaluator (unknowingly) resets."""
        with torch.no_grad():
            for layer in self.sam.memory_encoder.fuser.layers if self.is_fuser_identity else ():
                layer.gamma.fill_(IDENTITY_GAMMA)

    @property
    def stages(self) -> Mapping[str, tuple[nn.Module, ...]]:
        """See ``Segmenter``; the decoder also computes outside its modules, up to the losses."""
        sam = self.sam
        return {
            "SAM2 image encoder": (sam.image_encoder,),
            "SAM2 memory and decoder": (sam.memory_encoder, sam.sam_mask_decoder.transformer),
        }

    def _memory_grad(self) -> torch.autograd.grad_mode.set_grad_enabled:
        is_wanted = self.memory_gradient or self._memory_is_trained or self._encoder_is_trained
        return torch.set_grad_enabled(torch.is_grad_enabled() and is_wanted)


def _cells(map_NChw: torch.Tensor) -> torch.Tensor:
    """(h w, N, C): as sam2's memory attention takes maps."""
    return map_NChw.flatten(2).permute(2, 0, 1)
