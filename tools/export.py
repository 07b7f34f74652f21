"""Turn a run or checkpoint into one self-contained model folder: all weights, LoRA merged, config, tokenizer, a card.

    python tools/export.py --weights outputs/shapes --output outputs/shapes_export --dtype fp16

The folder needs none of the files the run started from, and is what ``weights=`` of every other program takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from glus.config import Precision
from glus.config.jobs import user_errors, user_path
from glus.files import atomic_folder
from glus.log import run_info
from glus.models.build import DTYPES
from glus.models.pretrained import CONFIG_FILE, LoadedModel, find_model_folder, load_to_merge, save_merged

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
    loaded, source = load_to_merge(weights), find_model_folder(weights)
    with atomic_folder(output) as temporary:
        save_merged(temporary, loaded, dtype, source.name)
        (temporary / "README.md").write_text(card(loaded, source, dtype, (temporary / CONFIG_FILE).read_text()))
        for name in RUN_FILES:
            if (weights / name).is_file():
                shutil.copyfile(weights / name, temporary / name)


def card(loaded: LoadedModel, source: Path, dtype: torch.dtype, config: str) -> str:
    """What the weights are and how they were made, as Markdown.

    Args:
        loaded: before it was merged.
        source: its folder.
        dtype: of the stored weights.
        config: config.yaml beside them.
    """
    merged = (".lora_", ".new_rows")
    parameters = sum(p.numel() for n, p in loaded.glus.named_parameters() if not any(part in n for part in merged))
    run_file = source.parents[1] / "run.json" if source.parent.name == "checkpoints" else source / "run.json"
    origin = json.loads(run_file.read_text()) if run_file.is_file() else {"command": "unknown"}
    return f"""# A GLUS model

{parameters:,} parameters, stored as {str(dtype).removeprefix("torch.")}; checkpoint {source.name}.

Made by

```json
{json.dumps(origin, indent=2)}
```

and exported with glus {run_info()["versions"]["glus"]}. Settings that travel with the weights:

```yaml
{config.rstrip()}
```
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=user_path, required=True, help="run, checkpoint or model folder")
    parser.add_argument("--output", type=user_path, required=True, help="new folder")
    parser.add_argument("--dtype", choices=Precision.__members__, default="bf16", help="of the stored weights")
    options = parser.parse_args(arguments)
    with user_errors():
        export(options.weights, options.output, DTYPES[Precision(options.dtype)])
    print(options.output)


if __name__ == "__main__":
    main()
