"""Turn a run or checkpoint into one self-contained model folder: all weights, LoRA merged, config, tokenizer, a card.

    python tools/export.py --weights outputs/shapes --output outputs/shapes_export --dtype fp16

The folder needs none of the files the run started from, and is what ``weights=`` of every other program takes.
``--push owner/name`` uploads it to Hugging Face, where ``weights=owner/name`` finds it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from omegaconf import OmegaConf

from glus.config import Precision
from glus.config.jobs import user_errors, user_path
from glus.evaluation.report import left_out
from glus.files import atomic_folder, read_object
from glus.log import run_info
from glus.models.build import DTYPES
from glus.models.foreign import hub_id, is_hub_id
from glus.models.pretrained import CONFIG_FILE, LoadedModel, find_model_folder, load_to_merge, save_merged

RUN_FILES = ("metrics.jsonl", "run.json")
CARD = Path(__file__).with_name("model_card.md")


def export(weights: Path, output: Path, dtype: torch.dtype, scores: Sequence[Path] = (), licence: str = "") -> None:
    """Write the folder; it must not exist.

    Args:
        weights: a run, a checkpoint, or an export.
        output: the new folder.
        dtype: of the stored weights; they are computed with in the model's own precision.
        scores: see ``card``.
        licence: see ``card``.

    Raises:
        FileExistsError: ``output`` exists.
        FileNotFoundError, ValueError: ``weights`` cannot be loaded.
    """
    if output.exists():
        raise FileExistsError(f"--output {output} exists: choose another folder, or remove it")
    loaded, source = load_to_merge(weights), find_model_folder(weights)
    with atomic_folder(output) as temporary:
        save_merged(temporary, loaded, dtype, source.name)
        settings = (temporary / CONFIG_FILE).read_text()
        (temporary / "README.md").write_text(card(loaded, source, dtype, settings, scores, licence))
        for file in (run_of(source) / name for name in RUN_FILES):
            if file.is_file():
                shutil.copyfile(file, temporary / file.name)


def run_of(source: Path) -> Path:
    """The run that a checkpoint lies in; any other model folder is its own."""
    return source.parents[1] if source.parent.name == "checkpoints" else source


def card(
    loaded: LoadedModel, source: Path, dtype: torch.dtype, config: str, scores: Sequence[Path], licence: str
) -> str:
    """A model card: what the weights are, what they were made of and how, and what they reached.

    Args:
        loaded: before it was merged.
        source: its folder.
        dtype: of the stored weights.
        config: config.yaml beside them.
        scores: folders with a report.json.
        licence: of the weights, as Hugging Face spells it; "" where those that they started from decide.
    """
    merged = (".lora_", ".new_rows")
    parameters = sum(p.numel() for n, p in loaded.glus.named_parameters() if not any(part in n for part in merged))
    record = run_of(source) / "run.json"
    origin = read_object(record) if record.is_file() else {"command": "unknown"}
    reports = [_whole_report(folder) for folder in scores]
    starts, datasets = origins(run_of(source) / "config.yaml")
    data = ModelCardData(
        license=licence or "other",
        license_name=None if licence else "as-the-models-it-started-from",
        library_name="glus",
        pipeline_tag="image-segmentation",
        tags=["referring-video-object-segmentation", "video"],
        base_model=starts or None,
        datasets=datasets or None,
        model_name="GLUS",
        eval_results=[result for report in reports for result in results(report)] or None,
    )
    content = ModelCard.from_template(
        data,
        template_path=str(CARD),
        parameters=parameters,
        dtype=str(dtype).removeprefix("torch."),
        checkpoint=source.name,
        reports=reports,
        origin=json.dumps(origin, indent=2),
        version=run_info()["versions"]["glus"],
        config=config.rstrip(),
    ).content
    return f"{content}\n"


def _whole_report(folder: Path) -> dict[str, Any]:
    """Of scored predictions; ValueError if its means are not those of the whole split."""
    report = read_object(folder / "report.json")
    if lines := left_out(report):
        raise ValueError(f"--scores {folder}: {'; '.join(lines)}; a card takes scores of a whole split only")
    return report


def origins(config: Path) -> tuple[list[str], list[str]]:
    """Hub ids of the published models that a run started from, and names of the datasets that it saw."""
    if not config.is_file():
        return [], []
    settings = OmegaConf.to_container(OmegaConf.load(config))
    assert isinstance(settings, dict)
    model, own = settings["model"], settings.get("paths", {}).values()
    parts = ["llm", "clip", "segmenter"]
    places = [model["weights"]] if model["weights"] else [model[part]["weights"] for part in parts]
    ids = (hub_id(place) or (place if is_hub_id(place) else "") for place in places if place)
    found = [name for name in dict.fromkeys(ids) if name and name.split("/")[0] not in own]
    return found, list(settings.get("data", {}).get("mixture", {}))


def results(report: Mapping[str, Any]) -> Iterator[EvalResult]:
    """J, F and J&F of a report, over all sentences."""
    for key, name in (("j", "J"), ("f", "F"), ("jf", "J&F")):
        yield EvalResult(
            task_type="image-segmentation",
            task_name="Referring video object segmentation",
            dataset_type=report["dataset"],
            dataset_name=report["dataset"],
            dataset_split=report["split"],
            metric_type=name,
            metric_name=f"{name}, mean over sentences, percent",
            metric_value=round(report["mean_over_sentences"][key], 2),
        )


def push(folder: Path, name: str, is_private: bool) -> str:
    """Upload an exported folder to Hugging Face, as the user that ``hf auth login`` has logged in.

    Args:
        folder: the export.
        name: ``owner/name``; made if it is not there.
        is_private: whether nobody else may see it, if it is made.

    Returns:
        The address of the commit.

    Raises:
        ValueError: no such name can be.
        OSError: the server refuses, or is out of reach.
    """
    if not is_hub_id(name):
        raise ValueError(f"--push {name}: expected owner/name")
    api = HfApi()
    api.create_repo(name, private=is_private, exist_ok=True)
    return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by glus"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=user_path, required=True, help="run, checkpoint or model folder")
    parser.add_argument("--output", type=user_path, required=True, help="new folder")
    parser.add_argument("--dtype", choices=Precision.__members__, default="bf16", help="of the stored weights")
    parser.add_argument(
        "--scores", type=user_path, action="append", default=[], help="scored predictions, for the card"
    )
    parser.add_argument("--licence", default="", help="of the weights, as Hugging Face spells it, for the card")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to Hugging Face, too")
    parser.add_argument("--private", action="store_true", help="with --push: let nobody else see it")
    options = parser.parse_args(arguments)
    with user_errors():
        dtype = DTYPES[Precision(options.dtype)]
        export(options.weights, options.output, dtype, options.scores, options.licence)
        print(options.output)
        if options.push:
            print(push(options.output, options.push, options.private))


if __name__ == "__main__":
    main()
