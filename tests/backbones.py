"""Models of the other families, so small that tests build and run them in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glus.config import LlmConfig, MemoryConfig, ModelConfig, VisionConfig
from glus.data.chat.chatml import train_json_vocabulary
from tests.conftest import SENTENCES, tiny_segmenter

TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
INTERNVL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": [32, 32],
    "patch_size": [8, 8],
}
QWEN2_5_VL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 8,
    "window_size": 32,
    "fullatt_block_indexes": [1],
}
QWEN3_VL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 8,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2],
}
VISION = {"internvl": INTERNVL, "qwen3_vl": QWEN3_VL, "qwen2_5_vl": QWEN2_5_VL}
FAMILY_NAMES = ("internvl", "qwen3_vl")
"""Those with which everything is tested; what Qwen2.5-VL has of its own is its tower and the names of its tensors."""
VOCABULARY_SIZE = 420


def backbone_config(family: str, tokenizer: Path, **fields: Any) -> ModelConfig:
    """Grouped-query attention, two deepstack levels, LoRA, new rows, SAM2 at 64 pixels."""
    is_qwen = family != "internvl"
    rope = {key: value for key, value in ROPE.items() if family == "qwen3_vl" or key != "mrope_interleaved"}
    own: dict[str, Any] = {"rope_parameters": rope} if is_qwen else {}
    own |= {"head_dim": 12} if family == "qwen3_vl" else {"bos_token_id": None, "eos_token_id": None}
    text = {**TEXT, **own, **fields.pop("text", {})}
    vision = {**VISION[family], **fields.pop("vision", {})}
    sizes = {"context_size": 32, "query_size": 32, **fields.pop("sizes", {})}
    tied = fields.pop("tied", not is_qwen)
    rows = fields.pop("rows", VOCABULARY_SIZE)
    llm = LlmConfig(text, rows, str(tokenizer), lora_rank=2, lora_dropout=0.0, tied=tied)
    trainable = ["lora", "embeddings_new_rows", "lm_head_new_rows", "seg_head", "projector", "mask_decoder"]
    return ModelConfig(
        llm=llm,
        segmenter=tiny_segmenter(),
        memory=MemoryConfig(num_frames=3),
        trainable=trainable,
        family=family,
        vision=VisionConfig(vision, **sizes),
        **fields,
    )


def write_vocabulary(folder: Path) -> Path:
    """A small ``tokenizer.json``; [SEG] gets the row behind its own."""
    train_json_vocabulary(folder, SENTENCES, VOCABULARY_SIZE - 1)
    return folder
