"""What each program takes that runs a model, judges what it gave, makes a small one, or ablates it; training stands by
itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from glus.config.data import DatasetConfig, FramesConfig, PathsConfig
from glus.config.inference import PredictionConfig, SettingsConfig
from glus.config.loading import at_least, checked, require, share
from glus.config.model import ModelConfig


@dataclass
class SplitConfig:
    """What every program takes that goes through a split."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class RunConfig(SplitConfig):
    """What programs take that run a model over a split."""

    weights: str = MISSING
    """Model folder: a run, one of its checkpoints, or an export."""
    output: str = MISSING
    """Folder of the results: a new or empty one, or one that the same model and settings have begun."""
    max_videos: int | None = at_least(1, default=None)
    """Only the first so many videos, for a quick look; null: all."""
    allow_cpu: bool = False
    """Run an LLM of a billion parameters or more where no GPU is usable, instead of refusing to."""


class PredictionForm(Enum):
    """How predictions lie on disk."""

    png = "png"
    """``<video>/<exp_id>/<frame>.png``, 0 or 255: what benchmark servers and other tools take."""
    rle = "rle"
    """``<video>.jsonl``, COCO run-length codes, a line per frame: a file per video, and about as many bytes."""


@dataclass
class PredictConfig(RunConfig):
    """``scripts/predict.py``."""

    format: PredictionForm = PredictionForm.png
    """``png``: a file per mask, as benchmark servers and other tools take them. ``rle``: run-length codes, a file per
    video, about as many bytes."""
    inference: PredictionConfig = field(default_factory=PredictionConfig)


@dataclass
class ScoreFramesConfig(RunConfig):
    """``scripts/score_frames.py``, which writes scores and ``key_frames.json``."""

    inference: SettingsConfig = field(default_factory=lambda: SettingsConfig(num_query=1))
    """One query frame unless it says otherwise: what a sentence that starts there is asked with."""


@dataclass
class ShowConfig(SplitConfig):
    """``scripts/show.py``."""

    predictions: str = MISSING
    """Folder ``<video>/<exp_id>/<frame>.png``, as ``scripts/predict.py`` writes it."""
    output: str = MISSING
    """Folder for the pictures and movies; files of an earlier run with the same names are replaced."""
    max_videos: int = at_least(1, default=4)
    """Videos shown: the first ones of the split."""
    videos: list[str] | None = None
    """Ids of the videos to show instead."""
    num_expressions: int = at_least(1, default=4)
    """Sentences shown per video at most: the first of each group in turn."""
    num_frames: int = at_least(1, default=6)
    """Frames of a strip, spread over the video."""
    frames_per_second: int = at_least(1, default=8)
    """Speed of the movies."""


@dataclass
class WorkersConfig(SplitConfig):
    """What programs take that share a split among processes of the CPU."""

    num_workers: int = at_least(1, default=2)
    """Processes; results do not depend on it."""


class Missing(Enum):
    """What a missing prediction does to a score."""

    zero = "zero"
    drop = "drop"
    error = "error"


@dataclass
class ScoreConfig(WorkersConfig):
    """``scripts/score.py``."""

    predictions: str = MISSING
    """Folder of ``<video>/<exp_id>/<frame>.png`` (any non-zero pixel is foreground) or of ``<video>.jsonl``."""
    missing: Missing = Missing.zero
    """A missing prediction scores 0 and is listed, is dropped from the mean, or is an error."""
    output: str | None = None
    """Folder for report.json and per_expression.csv; default: ``predictions``."""
    max_videos: int | None = at_least(1, default=None)
    """Only the first so many videos, as ``predict.py max_videos``; null: all."""
    existence_threshold: float | None = share()
    """Also report what emptying masks below this would change (``inference.existence_threshold``). Null: nothing."""

    def __post_init__(self) -> None:
        self.output = self.output or self.predictions


@dataclass
class CalibrateConfig(WorkersConfig):
    """``tools/calibrate_existence.py``."""

    predictions: str = MISSING
    """Folder of complete predictions of ``scripts/predict.py``, made without ``inference.existence_threshold``."""
    output: str = MISSING
    """JSON file: the best threshold, and what some others come to."""
    max_videos: int | None = at_least(1, default=None)
    """Only the first so many videos, as ``predict.py max_videos``; null: all."""


@dataclass
class CompareConfig(WorkersConfig):
    """``scripts/compare.py``."""

    runs: list[str] = field(default_factory=list)
    """Folders of predictions that are scored, to hold the others against the first."""
    num_sentences: int = at_least(0, default=8)
    """Of those that changed most between the first and the last of ``runs``."""
    predictions: dict[str, str] | None = None
    """Label of a model -> folder of its predictions, to hold each against answers that ignore the sentence; the summary
    is about the first."""
    output: str | None = None
    """Of ``predictions``: summary JSON in percent; the scores of every expression go beside it, as ``.csv``."""
    max_videos: int | None = at_least(1, default=None)
    """Of ``predictions``: only the first so many videos, as ``predict.py max_videos``; null: all."""

    def __post_init__(self) -> None:
        is_one = bool(self.runs) != bool(self.predictions)
        require(is_one, "runs", "folders, or else predictions={label: folder}", self.runs)
        require(not self.predictions or bool(self.output), "output", "a JSON file for the summary", self.output)


@dataclass
class ReportConfig(SplitConfig):
    """``scripts/report.py``."""

    runs: list[str] = checked(lambda runs: len(runs) > 0, "at least one folder", default=MISSING)
    """Folders of predictions of the split, each scored; the first is what the others are held against."""
    output: str = MISSING
    """The page, an HTML file."""
    num_sentences: int = at_least(1, default=3)
    """Shown of each sort: best, worst, most changed."""


@dataclass
class CheckConfig(WorkersConfig):
    """``tools/check_data.py``."""

    against: list[str] = field(default_factory=list)
    """Files of ``configs/dataset`` whose splits must not share a video with this one: those that a model is trained on
    for a test split, and the other way round."""
    alignment: bool = False
    """Also test whether masks lie on the objects of their own frames, or fit other frames better (ReVOS)."""
    output: str = MISSING
    """JSON file for everything that was found."""


@dataclass
class SubmitConfig(WorkersConfig):
    """``scripts/submit.py``."""

    predictions: str = MISSING
    """Folder of ``<video>/<exp_id>/<frame>.png`` or of ``<video>.jsonl``."""
    output: str = MISSING
    """The zip file, or with ``lmms_eval`` a JSON file."""
    lmms_eval: str | None = None
    """Submission that lmms-eval's ``rvos_*`` tasks wrote for any model (``<task>_submission.json``): written anew with
    points in our masks instead; null: the zip of the benchmark's own server."""


@dataclass
class PretrainConfig:
    """``tools/pretrain_towers.py``: tokenizer, CLIP, SAM2 and LLM of a small model, from generated scenes; or the whole
    MLLM of another family."""

    model: ModelConfig = field(default_factory=ModelConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    output: str = MISSING
    """Gets ``tokenizer/``, ``clip/`` and ``llm/`` (or ``mllm/``), and ``sam2.pt``."""
    parts: list[str] | None = None
    """What to make: tokenizer, clip, llm, sam2; of another family than LLaVA tokenizer, mllm, sam2. Null: all. The LLM
    needs tokenizer and CLIP, SAM2 needs nothing, so two processes can share the work."""
    num_scenes: int = 2100
    """Generated videos to learn from."""
    num_frames: int = 16
    """Their length."""
    seed: int = 0
    """Decides scenes and initial weights."""
    learning_rate: float = 1e-3
    """Peak, of each part."""
    clip_steps: int = 3000
    """Optimizer steps of CLIP."""
    clip_batch_size: int = 32
    """Frames per step."""
    sam2_steps: int = 5500
    """Optimizer steps of SAM2."""
    sam2_batch_size: int = 6
    """Clips per step."""
    sam2_clip_frames: int = 10
    """Frames per clip in the second part of SAM2's pre-training, at most."""
    llm_steps: int = 2400
    """Optimizer steps of the LLM."""
    llm_batch_size: int = 12
    """Videos per step in the first part of the LLM's pre-training."""
    is_exchanged: bool = False
    """Whether the LLM, the only part that reads sentences, learns from exchanged ones (``glus.shapes.scene.exchange``),
    for a control."""


class StartFrame(Enum):
    """The frame from which each sentence is followed."""

    first = "first"
    chosen = "chosen"
    """Its key frame, which the model chooses."""
    middle = "middle"
    """Of the video, for all sentences: what a choice has to be better than."""
    random = "random"
    """One frame for each sentence, drawn at random."""


@dataclass
class AblationRow:
    """One line of the table."""

    train: list[str] = field(default_factory=list)
    """Overrides of ``scripts/train.py``."""
    pretrain: list[str] = field(default_factory=list)
    """Overrides of ``tools/pretrain_towers.py``; if any, the row has an LLM tower and a start of its own."""
    of: str | None = None
    """The row whose trained models it predicts with, instead of training some of its own."""
    predict: list[str] = field(default_factory=list)
    """Overrides of ``scripts/predict.py``."""
    start: StartFrame = StartFrame.first
    """Frame that sentences are followed from: ``first``, ``chosen`` by the model, ``middle`` or ``random``."""
    against: str | None = None
    """The row from which its differences are counted; null: none are."""


@dataclass
class AblationClaim:
    """What an ablation is to show, written down before it is run: one row is better than another on one kind."""

    worse: str = MISSING
    better: str = MISSING
    kind: str = MISSING
    """The kind of sentence that decides it; ``mean``: the mean over all kinds."""
    is_expected: bool = True
    """Whether the 95 % interval is to lie above 0; else the difference is reported, whatever it is."""


@dataclass
class AblationConfig:
    """``configs/ablation/*.yaml``."""

    start: list[str] = field(default_factory=list)
    """Overrides of ``scripts/train.py`` that train the model which rows start from, where none is given."""
    train: list[str] = field(default_factory=list)
    """Overrides of all trainings, the start's included."""
    rows: dict[str, AblationRow] = field(default_factory=dict)
    """By name, in the order of the table: at least one. A row that others are ``of`` or ``against`` stands before
    them."""
    claims: list[AblationClaim] = field(default_factory=list)
    """What the table is to show."""

    def __post_init__(self) -> None:
        known = list[str]()
        for name, row in self.rows.items():
            where, changes = f"ablation.rows.{name}", [*row.pretrain, *row.train]
            unknown = [other for other in (row.of, row.against) if other not in (None, *known)]
            if unknown:
                raise ValueError(f"{where}: no row {unknown[0]!r} before it, only {', '.join(known) or '-'}")
            trained = self.rows[row.of].of if row.of is not None else None
            if trained is not None:
                raise ValueError(f"{where}: {row.of} has none of its own but the models of {trained}: of={trained}")
            if row.of is not None and changes:
                raise ValueError(f"{where}: has models of {row.of}, so {', '.join(changes)} changes nothing")
            known.append(name)
        for claim in self.claims:
            for other in (claim.worse, claim.better):
                if other not in known:
                    raise ValueError(f"ablation.claims: no row {other!r}, only {', '.join(known)}")


@dataclass
class AblateConfig:
    """``scripts/ablate.py``."""

    ablation: AblationConfig = field(default_factory=AblationConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    output: str = MISSING
    """Folder of all runs, predictions and tables; the same command goes on with what is there."""
    start: str | None = None
    """Model folder that rows without an own one start from; null: trained from the towers below ``paths.weights``."""
    seeds: list[int] = checked(lambda seeds: len(seeds) > 0, "at least one seed", default=lambda: [0, 1, 2])
    """Of training; each row is trained once for each. The start has only one."""
    start_steps: int = at_least(1, default=600)
    """Training steps of the start."""
    steps: int = at_least(1, default=250)
    """Training steps of each row."""
    max_videos: int | None = at_least(1, default=None)
    """Only the first so many held-out videos; null: all."""
    processes: int = at_least(1, default=2)
    """Programs that run at a time. Any number of commands with the same ``output`` share the work besides."""
    gpus: int = at_least(0, default=0)
    """GPUs that they take in turn; 0: what each finds."""
    num_sentences: int = at_least(1, default=2)
    """Shown of each sort on the page: best, worst, most changed."""

    def __post_init__(self) -> None:
        require(len(self.ablation.rows) > 0, "ablation.rows", "at least one row", self.ablation.rows)
