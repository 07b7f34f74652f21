"""Turn published checkpoints into a model folder of ours, or a model of ours into the authors' layout.

    python tools/convert_weights.py --weights weights/GLUS-A --output weights/glus_a
    python tools/convert_weights.py --weights weights/LISA-7B-v1 --sam2 weights/sam2_hiera_large.pt --output start
    python tools/convert_weights.py --to-release --weights outputs/glus_s --output outputs/glus_s_released

Of another family than LLaVA, the last line writes the MLLM alone as transformers reads it, [SEG] in its tokenizer.
A merged GLUS checkpoint holds everything but CLIP; LISA-7B-v1 needs SAM2's file beside it. What is matched, dropped
knowingly, missing, unexpected or of the wrong shape is printed by the names in the file; anything amiss stops it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from glus.config import FuserGamma, Precision, SegHeadInit, SegmenterConfig, read_config
from glus.config.jobs import user_errors, user_path
from glus.models.build import DTYPES
from glus.models.pretrained import is_untied, load_to_merge, merged_tensors, save_merged
from glus.models.published import save_published
from glus.models.release import build_release, read_release, save_release
from glus.models.weight_files import GB
from glus.models.weights import ON_DISK, LoadReport, MisfitError
from glus.tokens import JsonVocabulary

DEFAULT_SHARD_GB = 10.0


def convert_weights(
    weights: str,
    output: Path,
    segmenter: SegmenterConfig,
    clip: str | None = None,
    seg_head_init: SegHeadInit = SegHeadInit.random,
    dtype: torch.dtype | None = None,
) -> dict[str, LoadReport]:
    """Write a model folder from a merged GLUS checkpoint, or from LISA where ``segmenter`` names SAM2's file.

    Args:
        weights: folder or hub id of the checkpoint.
        output: the new folder.
        segmenter: which SAM2.
        clip: folder or hub id of the CLIP; None: the one that the checkpoint names.
        seg_head_init: whether LISA's [SEG] head is kept.
        dtype: of the stored weights; None keeps theirs, where one type holds all exactly.

    Returns:
        Where weights came from -> what was loaded.

    Raises:
        FileExistsError: ``output`` exists.
        FileNotFoundError, ValueError: a file is missing or does not fit.
    """
    _refuse_existing(output)
    fuser_gamma, segmenter.fuser_gamma = segmenter.fuser_gamma, FuserGamma.checkpoint  # the file keeps the true scales
    model, reports = build_release(read_release(weights, segmenter, clip, seg_head_init), ON_DISK)
    model.config.model.segmenter.fuser_gamma = fuser_gamma
    save_merged(output, model, dtype, Path(weights).name)
    return reports


def convert_to_release(
    weights: Path, output: Path, dtype: torch.dtype | None, file_format: str | None, shard_bytes: int
) -> dict[str, int]:
    """Write a run, checkpoint or model folder in the authors' layout, LoRA merged; of another family than LLaVA the
    MLLM alone as transformers reads it.

    Args:
        weights: the model.
        output: the new folder.
        dtype: of the stored weights; None keeps theirs.
        file_format: ``bin`` or ``safetensors``; None: what the layout is published in.
        shard_bytes: size of a file at most.

    Returns:
        What was written -> number of tensors.

    Raises:
        FileExistsError: ``output`` exists.
        FileNotFoundError, ValueError: ``weights`` cannot be loaded, or the layout cannot hold it.
    """
    _refuse_existing(output)
    model = load_to_merge(weights)
    config = model.config.model
    if config.family == "llava":
        return save_release(output, model, dtype, file_format == "safetensors", shard_bytes)
    if file_format == "bin":
        raise ValueError(f"--format bin: a folder of the family {config.family} holds safetensors")
    tensors = merged_tensors(model, dtype or DTYPES[config.precision])
    is_tied = config.llm.tied and not is_untied(config)
    assert isinstance(model.vocabulary, JsonVocabulary)
    count = save_published(output, model.glus.mllm, tensors, model.vocabulary, is_tied, shard_bytes)
    return {"tensors of the MLLM": count, "left out: tensors of the [SEG] head and SAM2": len(tensors) - count}


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise FileExistsError(f"--output {output} exists: choose another folder, or remove it")


def read_segmenter(file: Path | None, sam2: str | None) -> SegmenterConfig:
    """Settings of SAM2.

    Args:
        file: YAML or JSON with fields of ``SegmenterConfig``; None: the published SAM2.
        sam2: file of its weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it does not hold such fields.
    """
    segmenter = read_config(SegmenterConfig, file) if file else SegmenterConfig()
    segmenter.weights = sam2
    return segmenter


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", required=True, help="folder of a checkpoint, or owner/name on Hugging Face")
    parser.add_argument("--output", type=user_path, required=True, help="new folder")
    parser.add_argument("--sam2", help="file of SAM2's weights, for LISA, which has none")
    parser.add_argument("--segmenter", type=user_path, help="YAML or JSON: variant, overrides; default: sam2_hiera_l")
    parser.add_argument("--clip", help="folder or hub id of the CLIP; default: the one the checkpoint names")
    parser.add_argument("--seg-head-init", choices=SegHeadInit.__members__, help="with --sam2; default: random")
    parser.add_argument("--seed", type=int, default=0, help="of a [SEG] head at random")
    parser.add_argument("--dtype", choices=Precision.__members__, help="of the stored weights; default: exact")
    parser.add_argument("--to-release", action="store_true", help="the other direction: --weights is ours")
    parser.add_argument("--format", choices=("bin", "safetensors"), help="with --to-release; default: as theirs")
    parser.add_argument("--shard-gb", type=float, help="with --to-release: size of a file at most; default: 10")
    options = parser.parse_args(arguments)
    foreign = ("sam2", "segmenter", "clip", "seg_head_init") if options.to_release else ("format", "shard_gb")
    for name in foreign:
        if getattr(options, name) is not None:
            wanted = "makes no sense with" if options.to_release else "needs"
            parser.error(f"--{name.replace('_', '-')} {wanted} --to-release")
    if options.seg_head_init and not options.sam2:
        parser.error("--seg-head-init needs --sam2: a merged GLUS brings its own [SEG] head")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.WARNING)
    dtype = DTYPES[Precision(options.dtype)] if options.dtype else None
    torch.manual_seed(options.seed)
    with user_errors():
        try:
            if options.to_release:
                shard_bytes = int((options.shard_gb or DEFAULT_SHARD_GB) * GB)
                written = convert_to_release(Path(options.weights), options.output, dtype, options.format, shard_bytes)
                print("\n".join(f"{what}  {number}" for what, number in written.items()))
            else:
                segmenter = read_segmenter(options.segmenter, options.sam2)
                head = SegHeadInit(options.seg_head_init or SegHeadInit.random)
                reports = convert_weights(options.weights, options.output, segmenter, options.clip, head, dtype)
                print("\n\n".join(f"{source}\n{report.table()}" for source, report in reports.items()))
        except MisfitError as error:
            sys.exit(f"{error.report.table()}\nerror: {error}")
        print(options.output)


if __name__ == "__main__":
    main()
