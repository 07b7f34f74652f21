"""Predictions of several models that are scored already, held against each other."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console

from glus.config import leaves
from glus.evaluation.report import MEANS, left_out, print_rows
from glus.files import read_object

NUM_RESAMPLES = 10_000
"""Of the bootstrap."""


@dataclass(frozen=True)
class SentenceScore:
    """J&F of one expression, in percent."""

    video: str
    text: str
    group: str
    jf: float


@dataclass(frozen=True)
class ScoredRun:
    """A folder of predictions with the files of ``scripts/predict.py`` and ``scripts/score.py``."""

    label: str
    folder: Path
    scores: Mapping[str, SentenceScore]
    """``<video>/<exp_id>`` -> its score; those that are counted in the means."""
    report: Mapping[str, Any]
    """report.json."""
    made_by: Mapping[str, Any]
    """predict.json: identity (settings, weights), command, versions; empty for predictions of other programs."""
    cost: Mapping[str, Any]
    """cost.json: frames, masks, seconds of each stage; or empty."""

    @property
    def training(self) -> Path | None:
        """The run folder that its weights come from, where it is still there: it has ``metrics.jsonl``."""
        weights = Path(self.made_by.get("weights", ""))
        near = [weights, *weights.parents[:2]] if self.made_by else []
        return next((folder for folder in near if (folder / "metrics.jsonl").is_file()), None)


@dataclass(frozen=True)
class Difference:
    """Second run minus first, J&F in percent over the sentences that both have."""

    mean: float
    low: float
    high: float
    """95 % interval, by resampling videos, and seeds where there are several. Infinite for a single video."""

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def read_run(folder: str | Path, label: str = "") -> ScoredRun:
    """Read what predicting and scoring left.

    Args:
        folder: of the predictions.
        label: of the run; default: the folder's name.

    Raises:
        FileNotFoundError: it is not scored.
        ValueError: a file is damaged, or report.json and per_expression.csv are not of one scoring.
    """
    folder = Path(folder)
    for name in ("report.json", "per_expression.csv"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: score it first (glus score predictions={folder} ...)")
    report = read_object(folder / "report.json")
    digest = sha256((folder / "per_expression.csv").read_bytes()).hexdigest()
    if report.get("per_expression_sha256", digest) != digest:
        raise ValueError(f"report.json and per_expression.csv in {folder} are not of one scoring: score it again")
    csv.field_size_limit(2**31 - 1)  # cells with all problems of a sentence, as they were written before 2026-12
    with (folder / "per_expression.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["is_counted"] == "True"]
    names = [f"{row['video']}/{row['exp_id']}" for row in rows]
    scores = [SentenceScore(row["video"], row["text"], row["group"], 100 * float(row["jf"])) for row in rows]
    made_by = _read_if_there(folder / "predict.json")
    cost = _read_if_there(folder / "cost.json") or _read_if_there(folder / "summary.json")  # its name before 2026-12
    return ScoredRun(label or folder.name, folder, dict(zip(names, scores, strict=True)), report, made_by, cost)


def read_runs(folders: Sequence[str | Path]) -> list[ScoredRun]:
    """Runs of one split, labelled by what tells their folders apart.

    Raises:
        FileNotFoundError, ValueError: see ``read_run``; also for runs of different splits.
    """
    runs = [read_run(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]
    splits = {(run.report["dataset"], run.report["split"]) for run in runs}
    if len(splits) > 1:
        raise ValueError(f"runs of different splits cannot be compared: {', '.join(map('/'.join, sorted(splits)))}")
    return runs


def common_sentences(runs: Sequence[ScoredRun]) -> list[str]:
    """Those that all runs have, in the order of the first."""
    return [name for name in runs[0].scores if all(name in run.scores for run in runs)]


def doubts(runs: Sequence[ScoredRun]) -> list[str]:
    """What a reader must know of what is compared: sentences that are in no mean, scores that may be old."""
    lines = [f"{run.label}: {line}" for run in runs for line in (*left_out(run.report), *_older_scores(run.folder))]
    num_all, num_common = len({name for run in runs for name in run.scores}), len(common_sentences(runs))
    if num_common < num_all:
        lines.append(f"{num_all - num_common} of {num_all} sentences are not in the means of every run, and left out")
    return lines


@dataclass(frozen=True)
class ComparedScores:
    """A kind of sentence, or all of them."""

    name: str
    num_sentences: int
    means: list[float]
    """J&F of each run, in percent."""
    changes: list[Difference]
    """Of all runs but the first, to the first."""
    is_mean: bool = False
    """Whether all sentences are in it."""


def compare_runs(runs: Sequence[ScoredRun]) -> list[ComparedScores]:
    """Kinds of sentences in the order of their first ones, then both means, over the sentences that all runs have.

    Raises:
        ValueError: there are none.
    """
    sentences = common_sentences(runs)
    if not sentences:
        raise ValueError(f"{', '.join(run.label for run in runs)} have no sentence in common that is scored")
    kinds: dict[str, list[str]] = {}
    for name in sentences:
        kinds.setdefault(runs[0].scores[name].group, []).append(name)
    groups = {kind or "(none)": [names] for kind, names in kinds.items()} if list(kinds) != [""] else {}
    over_kinds = {MEANS["mean_over_kinds"]: list(kinds.values())} if groups else {}
    over_all = {MEANS["mean_over_sentences"]: [sentences]}
    return [
        ComparedScores(
            title,
            sum(map(len, parts)),
            [float(np.mean([np.mean([run.scores[n].jf for n in names]) for names in parts])) for run in runs],
            [paired_difference(runs[0], run, *parts) for run in runs[1:]],
            is_mean=title not in groups,
        )
        for title, parts in {**groups, **over_all, **over_kinds}.items()
    ]


def paired_difference(first: ScoredRun, second: ScoredRun, *groups: Sequence[str]) -> Difference:
    """How much better the second run is, with a paired bootstrap over videos.

    Args:
        first: the run that is the base.
        second: the other.
        groups: of sentences; each group's mean counts the same.
    """
    names = [name for group in groups for name in group]
    changes = [second.scores[name].jf - first.scores[name].jf for name in names]
    kinds = [str(number) for number, group in enumerate(groups) for _ in group]
    return bootstrap(np.array([changes]), [first.scores[name].video for name in names], kinds)


def bootstrap(changes_SN: np.ndarray, videos: Sequence[str], kinds: Sequence[str]) -> Difference:
    """The mean over kinds of their mean changes, with an interval by drawing videos and seeds again (seeded: equal
    changes, equal numbers).

    Sentences of one video are not independent, nor are those of one trained model.

    Args:
        changes_SN: change of N sentences in each of S pairs of models.
        videos, kinds: of each sentence.
    """
    names, of_video = np.unique(videos, return_inverse=True)
    num_seeds, num_videos = len(changes_SN), len(names)
    rng = np.random.default_rng(0)
    drawn_RV = rng.multinomial(num_videos, np.full(num_videos, 1 / num_videos), NUM_RESAMPLES)
    drawn_RS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), NUM_RESAMPLES)
    means, resampled = [], []
    for kind in dict.fromkeys(kinds):
        chosen = np.array([other == kind for other in kinds])
        counts_V = np.bincount(of_video[chosen], minlength=num_videos)
        sums_SV = np.array([np.bincount(of_video[chosen], change_N[chosen], num_videos) for change_N in changes_SN])
        means.append(sums_SV.sum() / (num_seeds * counts_V.sum()))
        counts_R = num_seeds * (drawn_RV @ counts_V)
        sums_R = ((drawn_RS @ sums_SV) * drawn_RV).sum(1)
        # A draw without any video of a kind has the mean of the others.
        resampled.append(np.divide(sums_R, counts_R, out=np.full(NUM_RESAMPLES, np.nan), where=counts_R > 0))
    mean = float(np.mean(means))
    if num_videos == 1:
        return Difference(mean, -math.inf, math.inf)
    low, high = np.quantile(np.nanmean(resampled, axis=0), (0.025, 0.975))
    return Difference(mean, float(low), float(high))


def most_changed(first: ScoredRun, second: ScoredRun, names: Sequence[str]) -> list[str]:
    """The sentences by how much their score differs, the largest difference first."""
    return sorted(names, key=lambda name: -abs(second.scores[name].jf - first.scores[name].jf))


def print_runs(console: Console, runs: Sequence[ScoredRun], num_sentences: int) -> None:
    """The comparison as one table, and the sentences that differ most between the first and the last run."""
    rows = {}
    for row in compare_runs(runs):
        cells = {"sentences": str(row.num_sentences), runs[0].label: f"{row.means[0]:.1f}"}
        for run, mean, change in zip(runs[1:], row.means[1:], row.changes, strict=True):
            to_first = "difference" if len(runs) == 2 else f"{run.label} - {runs[0].label}"
            cells |= {run.label: f"{mean:.1f}", to_first: str(change)}
        rows[row.name] = cells
    report = runs[0].report
    print_rows(console, f"{report['dataset']} ({report['split']}), J&F in percent", "kind", rows)
    for line in doubts(runs):
        console.print(f"warning: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if len(runs) > 1:
        console.print("In brackets the 95 % interval, by a paired bootstrap over videos.", markup=False)
        first, last = runs[0], runs[-1]
        console.print(f"Sentences that changed most, {first.label} -> {last.label}:", markup=False, highlight=False)
        for name in most_changed(first, last, common_sentences(runs))[:num_sentences]:
            before, after = first.scores[name], last.scores[name]
            text = f"{after.jf - before.jf:+6.1f}  {before.jf:5.1f} -> {after.jf:5.1f}  {name}: {before.text}"
            console.print(f"{text} ({before.group})" if before.group else text, markup=False, highlight=False)


def different_settings(runs: Sequence[ScoredRun]) -> dict[str, list[str]]:
    """Key -> its value in each run, for all that the runs' predictions and trainings differ in; "-" where none is.

    Of a model that came without its training (an export, a published one) one line says so.
    """
    trainings = [_training_settings(run) for run in runs]
    recorded = [training for training in trainings if training]
    told = {key for key in dict.fromkeys(itertools.chain(*recorded)) if len({str(t.get(key)) for t in recorded}) > 1}
    every = [
        {"train": "recorded" if training else "not recorded"}
        | {key: value for key, value in training.items() if key in told}
        | leaves(run.made_by.get("identity", {}))
        for run, training in zip(runs, trainings, strict=True)
    ]
    keys = dict.fromkeys(key for settings in every for key in settings)
    rows = {key: [str(settings.get(key, "-")) for settings in every] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _training_settings(run: ScoredRun) -> dict[str, Any]:
    """By dotted key; nothing where the training is not there, or what is there is an export."""
    file = run.training and run.training / "config.yaml"
    settings: Any = OmegaConf.to_container(OmegaConf.load(file)) if file and file.is_file() else {}
    return leaves(settings, "train.") if "trainer" in settings else {}


def _older_scores(folder: Path) -> list[str]:
    """Than what ``predict.py`` writes at its end."""
    cost, report = folder / "cost.json", folder / "report.json"
    if not cost.is_file() or cost.stat().st_mtime_ns <= report.stat().st_mtime_ns:
        return []
    return ["cost.json is newer than report.json; if more was predicted since it was scored, score it again"]


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}


def _labels(folders: Sequence[str | Path]) -> list[str]:
    """The last part of each path in which they differ."""
    parts = [Path(folder).parts for folder in folders]
    for back in range(1, min(map(len, parts)) + 1):
        names = [path[-back] for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
