"""Each family as transformers itself runs it: its processor, its chat template, its forward pass over one conversation.

Nothing here calls the family's file: what is compared with it are other modules with the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from glus.config import ModelConfig
from glus.data.chat import Chat
from glus.data.chat.chatml import SYSTEM_LINE, train_json_vocabulary
from glus.data.chat.llava import ASSISTANT, SYSTEM, USER, train_vocabulary
from glus.data.sampling import CONTEXT, Turn
from glus.tokens import ADDED_TOKENS, IMAGE_ID, SEG, AnyVocabulary
from glus.types import Role

SENTENCES = [
    "the red circle",
    "the circle moving left",
    "the blue square that turns",
    "all shapes",
    "2 caf\u00e9s, left",
]
Shown = Sequence[tuple[np.ndarray, Role]]
"""Frames of a conversation in the order they are shown, and what as."""
MESSAGES = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
"""ChatML; IMAGE is what the family puts for a picture."""


class Reference(Protocol):
    """A family's own classes, with the weights of a model of ours."""

    def input_ids(self, turns: Sequence[Turn], shown: Shown) -> list[int]:
        """Of a whole conversation, ``IMAGE_ID`` at visual tokens."""

    def visual(self, frame_HW3: np.ndarray, role: Role) -> torch.Tensor:
        """Visual tokens (P, ...) of a frame."""

    def states(self, input_ids: np.ndarray, shown: Shown) -> torch.Tensor:
        """(L, D) of a whole conversation."""

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """Those that take gradients, under our names."""


def make_vocabulary_folder(config: ModelConfig, folder: Path) -> None:
    """Write a vocabulary that fits the model's tables, leaving a row for [SEG]."""
    if config.family == "llava":
        train_vocabulary(folder, SENTENCES, config.llm.vocab_size - len(ADDED_TOKENS))
    else:
        train_json_vocabulary(folder, SENTENCES, config.llm.vocab_size - 1)


def open_reference(config: ModelConfig, mllm: Any, chat: Chat) -> Reference:
    """The reference of a model.

    Raises:
        ValueError: its family has none here.
    """
    found: dict[str, Any] = {
        "llava": LlavaReference,
        "internvl": InternVLReference,
        "qwen3_vl": Qwen3VLReference,
        "qwen2_5_vl": Qwen25VLReference,
    }
    if config.family not in found:
        raise ValueError(f"model.family={config.family}: there is no reference in tools/parity/references.py")
    reference: Reference = found[config.family](config, mllm, chat)
    return reference


def _eager(module: Any) -> Any:
    """Another module with the same weights, whose LLM has transformers' plainest attention."""
    has_parts = hasattr(module.config, "vision_config")
    other = type(module)(copy.deepcopy(module.config))
    other.load_state_dict(module.state_dict())
    other.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"} if has_parts else "eager")
    return other.eval()


class LlavaReference(Reference):
    """CLIP and LLaMA of transformers, put together as LISA does. Its conversations are no template of transformers:
    what they are compared with is the text, piece by piece, through the SentencePiece model."""

    def __init__(self, config: ModelConfig, mllm: Any, chat: Chat):
        from transformers import CLIPImageProcessorPil

        self._clip, self._ours = config.clip, mllm
        self._tower, self._llama = _eager(mllm.clip.vision_model), _eager(mllm.llama)
        self._projector = copy.deepcopy(mllm.projector)
        side = mllm.clip.image_size
        crop = {"height": side, "width": side}
        self._processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop)
        self._vocabulary: AnyVocabulary = chat.vocabulary

    def input_ids(self, turns: Sequence[Turn], shown: Shown) -> list[int]:
        """See ``Reference``."""
        words, added = self._vocabulary.encode, self._vocabulary.added_tokens
        image = [added["<im_start>"], *[IMAGE_ID] * self._ours.tokens_per_frame, added["<im_end>"]]
        num_context = len(shown) - len(turns)
        ids = [1, *words(f"{SYSTEM} {USER}"), *image * num_context, *(words(CONTEXT) if num_context else [])]
        for number, turn in enumerate(turns):
            left, _, right = turn.answer.partition(SEG)
            asked = words(f"{turn.question} {ASSISTANT} {left.rstrip()}".rstrip())
            ids += [*(words(USER) if number else []), *image, *asked, added[SEG], *words(right.strip()), 2]
        return ids

    def visual(self, frame_HW3: np.ndarray, role: Role) -> torch.Tensor:
        """See ``Reference``."""
        pixels = self._processor(frame_HW3, return_tensors="pt")["pixel_values"]
        seen = self._tower(pixel_values=pixels, output_hidden_states=True)
        patches = seen.hidden_states[self._clip.select_layer][0, 1:]
        return self._projector(patches.unflatten(0, (-1, self._clip.pool)).mean(1))

    def states(self, input_ids: np.ndarray, shown: Shown) -> torch.Tensor:
        """See ``Reference``."""
        ids = torch.from_numpy(input_ids)
        embeds = self._llama.get_input_embeddings()(ids.clamp(min=0)).clone()
        embeds[ids == IMAGE_ID] = torch.cat([self.visual(*one) for one in shown])
        return self._llama.model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """See ``Reference``."""
        llama = {f"llama.{name}": value for name, value in self._llama.named_parameters()}
        return {**llama, **{f"projector.{name}": value for name, value in self._projector.named_parameters()}}


class _Whole(Reference):
    """A family that transformers has as one class, beside a chat template and a tokenizer."""

    image: str
    """What the template and the processor have for a picture, if it is one token; each is a placeholder."""
    placeholder: str

    def __init__(self, config: ModelConfig, mllm: Any, chat: Chat):
        from transformers import AddedToken, Qwen2Tokenizer

        self.tokenizer = Qwen2Tokenizer.from_pretrained(str(chat.vocabulary.folder))
        self.tokenizer.add_tokens([AddedToken(SEG, special=True)])
        self.tokenizer.chat_template = MESSAGES.replace("IMAGE", self.image)
        self.image_id = int(self.tokenizer.convert_tokens_to_ids(self.placeholder))
        self.net, self.vision = _eager(mllm.net), config.vision
        self.net.config.image_token_id = self.image_id

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """See ``Reference``."""
        return {f"net.{name}": value for name, value in self.net.named_parameters()}

    def input_ids(self, turns: Sequence[Turn], shown: Shown) -> list[int]:
        """See ``Reference``."""
        picture, num_context = {"type": "image"}, len(shown) - len(turns)
        context = [picture] * num_context + ([{"type": "text", "text": CONTEXT}] if num_context else [])
        messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM_LINE}]
        for number, turn in enumerate(turns):
            asked = [*(context if number == 0 else ()), picture, {"type": "text", "text": turn.question}]
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": turn.answer}]
        pieces = self.tokenizer.apply_chat_template(messages, tokenize=False).split(self.placeholder)
        counts = [*(self.num_tokens(*one) for one in shown), 0]
        text = "".join(piece + self.placeholder * count for piece, count in zip(pieces, counts, strict=True))
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return [IMAGE_ID if number == self.image_id else number for number in ids]

    def num_tokens(self, frame_HW3: np.ndarray, role: Role) -> int:
        """Visual tokens of a frame."""
        return len(self.visual(frame_HW3, role))

    def ids(self, input_ids: np.ndarray) -> torch.Tensor:
        """(1, L) with the family's own placeholder."""
        return torch.from_numpy(np.where(input_ids == IMAGE_ID, self.image_id, input_ids))[None]

    def side(self, role: Role) -> int:
        """Of a frame, as the config gives it."""
        return self.vision.context_size if role is Role.context else self.vision.query_size


class InternVLReference(_Whole):
    """``InternVLForConditionalGeneration`` and ``GotOcr2ImageProcessor``. The class does not know frames of two sizes
    or pooled ones: then it gets their features in place of pixels."""

    image, placeholder = "<img><IMG_CONTEXT></img>\n", "<IMG_CONTEXT>"

    def pixels(self, frame_HW3: np.ndarray, role: Role) -> torch.Tensor:
        """What the processor makes of a frame: (3, h, w)."""
        from transformers import GotOcr2ImageProcessor

        size = {"height": self.side(role), "width": self.side(role)}
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        processor = GotOcr2ImageProcessor(size=size, image_mean=mean, image_std=std)
        return processor(frame_HW3, return_tensors="pt")["pixel_values"][0]

    def visual(self, frame_HW3: np.ndarray, role: Role) -> torch.Tensor:
        """See ``Reference``."""
        features = self.net.model.get_image_features(pixel_values=self.pixels(frame_HW3, role)[None]).pooler_output[0]
        if self.vision.pool == 1:
            return features
        side = int(len(features) ** 0.5)
        grid = features.T.unflatten(1, (side, side))[None]
        return F.avg_pool2d(grid, self.vision.pool)[0].flatten(1).T

    def states(self, input_ids: np.ndarray, shown: Shown) -> torch.Tensor:
        """See ``Reference``."""
        ids = self.ids(input_ids)
        if self.vision.pool == 1 and self.vision.context_size == self.vision.query_size:
            pixels = torch.stack([self.pixels(*one) for one in shown])
            return self.net.model(input_ids=ids, pixel_values=pixels, use_cache=False).last_hidden_state[0]
        embeds = self.net.get_input_embeddings()(ids).clone()
        embeds[ids == self.image_id] = torch.cat([self.visual(*one) for one in shown])
        return self.net.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0]


class Qwen3VLReference(_Whole):
    """``Qwen3VLForConditionalGeneration`` and ``Qwen2VLImageProcessor``."""

    image, placeholder = "<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>"
    mean, std = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]

    def _processed(self, frame_HW3: np.ndarray, role: Role) -> Any:
        from transformers import Qwen2VLImageProcessor

        vision, most = self.net.config.vision_config, self.side(role) ** 2
        factor = vision.patch_size * vision.spatial_merge_size
        processor = Qwen2VLImageProcessor(
            size={"shortest_edge": max(factor**2, most // 4), "longest_edge": most},
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            image_mean=self.mean,
            image_std=self.std,
        )
        return processor(frame_HW3, return_tensors="pt")

    def num_tokens(self, frame_HW3: np.ndarray, role: Role) -> int:
        """See ``_Whole``."""
        grid = self._processed(frame_HW3, role)["image_grid_thw"]
        return int(grid.prod()) // self.net.config.vision_config.spatial_merge_size**2

    def visual(self, frame_HW3: np.ndarray, role: Role) -> torch.Tensor:
        """See ``Reference``."""
        one = self._processed(frame_HW3, role)
        seen = self.net.model.visual(one["pixel_values"], grid_thw=one["image_grid_thw"])
        return torch.stack([seen.pooler_output, *getattr(seen, "deepstack_features", ())], dim=1)

    def states(self, input_ids: np.ndarray, shown: Shown) -> torch.Tensor:
        """See ``Reference``."""
        ids, frames = self.ids(input_ids), [self._processed(*one) for one in shown]
        self.net.model.rope_deltas = None
        return self.net.model(
            input_ids=ids,
            pixel_values=torch.cat([one["pixel_values"] for one in frames]),
            image_grid_thw=torch.cat([one["image_grid_thw"] for one in frames]),
            mm_token_type_ids=(ids == self.image_id).int(),
            use_cache=False,
        ).last_hidden_state[0]


class Qwen25VLReference(Qwen3VLReference):
    """``Qwen2_5_VLForConditionalGeneration``, with CLIP's normalisation."""

    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
