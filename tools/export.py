"""Turn a run or checkpoint into one self-contained model folder: all weights, LoRA merged, config, tokenizer, a card.

    python tools/export.py --weights outputs/shapes --output outputs/shapes_export --dtype fp16

The folder needs none of the files the run started from, and is what ``weights=`` of every other program takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from glus.config import to_yaml
from glus.files import atomic_folder
from glus.log import run_info
from glus.models.build import UNQUANTIZED, LoadedModel, find_model_folder, load_model, merged_tensors, save_model
from glus.models.weight_files import LazyTensor
from glus.models.weights import Target

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MERGED_PARTS = ("lora", "embeddings_new_rows", "lm_head_new_rows")
"""Parts of ``model.trainable`` that an export no longer has."""
RUN_FILES = ("metrics.jsonl", "run.json")


def export(weights: Path, output: Path, dtype: torch.dtype) -> None:
    """Write the folder; it must not exist.

    Args:
        weights: a run, a checkpoint, or an export.
        output: the new folder.
        dtype: of the stored weights; they are computed with in the model's own precision.

    Raises:
        FileExistsError: ``output`` exists.
        FileNotFoundError, ValueError: ``weights`` cannot be loaded.
    """
    if output.exists():
        raise FileExistsError(f"--output {output} exists: choose another folder, or remove it")
    loaded = load_model(weights, settings=UNQUANTIZED, as_trained=True, target=Target(stays_on_disk=True))
    tensors = {name: LazyTensor.of(value).to(dtype) for name, value in merged_tensors(loaded).items()}
    config = loaded.config
    config.model.llm.lora_rank = 0
    config.model.trainable = [part for part in config.model.trainable if part not in MERGED_PARTS]
    config.model.weights = None
    config.model.clip.weights = config.model.llm.weights = config.model.segmenter.weights = None
    config.model.llm.tokenizer = "."
    source = find_model_folder(weights)
    with atomic_folder(output) as temporary:
        save_model(temporary, tensors, config, loaded.vocabulary, metadata={"source": source.name})
        (temporary / "README.md").write_text(card(loaded, source, dtype))
        for name in RUN_FILES:
            if (weights / name).is_file():
                shutil.copyfile(weights / name, temporary / name)


def card(loaded: LoadedModel, source: Path, dtype: torch.dtype) -> str:
    """What the weights are and how they were made, as Markdown."""
    merged = (".lora_", ".new_rows")
    parameters = sum(p.numel() for n, p in loaded.glus.named_parameters() if not any(part in n for part in merged))
    run_file = source.parents[1] / "run.json" if source.parent.name == "checkpoints" else source / "run.json"
    origin = json.loads(run_file.read_text()) if run_file.is_file() else {"command": "unknown"}
    return "\n".join(
        [
            "# A GLUS model",
            "",
            f"{parameters:,} parameters, stored as {str(dtype).removeprefix('torch.')}; checkpoint {source.name}.",
            "",
            "Made by",
            "",
            "```json",
            json.dumps(origin, indent=2),
            "```",
            "",
            f"and exported with glus {run_info()['versions']['glus']}. Settings that travel with the weights:",
            "",
            "```yaml",
            to_yaml(loaded.config).rstrip(),
            "```",
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="run, checkpoint or model folder")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the stored weights")
    options = parser.parse_args(arguments)
    try:
        export(options.weights, options.output, DTYPES[options.dtype])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(options.output)


if __name__ == "__main__":
    main()
