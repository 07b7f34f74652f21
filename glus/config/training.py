"""Losses, the training loop, the machine it runs on, and the published results that they are to give."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from glus.config.data import DataConfig, DatasetConfig, FramesConfig, PathsConfig
from glus.config.inference import InferenceConfig
from glus.config.loading import at_least, checked, positive, require
from glus.config.model import ModelConfig, Precision, Quantization


@dataclass
class ContrastiveConfig:
    """Object contrastive loss."""

    queue_size: int = at_least(1, default=512)
    """Embeddings kept per rank, first in first out."""
    temperature: float = positive(default=0.07)
    """Divides the cosine similarities."""
    num_negatives: int = 128
    """Negatives drawn with replacement per anchor; an anchor with fewer candidates gives no term."""
    min_terms: int = 1
    """Fewer terms than this in the global batch count as none (release: 2)."""
    datasets: list[str] | None = None
    """Names of the datasets that feed the queue (release: MeViS alone); null: all."""
    exclude_same_objects: bool = False
    """Never take the same objects at other frames as negatives (release: False)."""


_RELEASED_WEIGHTS = dict(seg=1.0, bce=2.0, dice=0.5, contrastive=0.1, iou=0.0, mask_iou=0.0, object_score=0.0)


@dataclass
class LossConfig:
    """Weights of the terms of the objective; a weight of 0 switches a term off."""

    weights: dict[str, float] = checked(
        lambda weight: weight >= 0, "0 (off) or a positive weight", default=lambda: dict(_RELEASED_WEIGHTS)
    )
    """Names are those of ``losses.objective.TERMS`` and "contrastive" (released values; GLUS-A trains without it).
    ``iou`` above 0 (0.1, say) trains the head that ``model.iou_head`` adds; it leaves all other gradients alone, but
    the head's own count in the norm that ``trainer.max_grad_norm`` limits. ``mask_iou`` and ``object_score`` (0, as
    released) are SAM2's own losses for what its decoder says of its masks: with them its two heads learn."""
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)


@dataclass
class WandbConfig:
    """Weights & Biases, beside ``metrics.jsonl``, which is always written."""

    enabled: bool = False
    """Whether anything is sent or written for it."""
    project: str = "glus"
    """Where the run appears."""
    entity: str | None = None
    """The user or team it belongs to; null: W&B's own choice."""
    group: str | None = None
    """What it is grouped by; null: the experiment."""
    tags: list[str] = field(default_factory=list)
    """To find it by."""
    notes: str | None = None
    """A line about it; null: the row of the paper that it is meant to reproduce."""
    mode: str = checked({"online", "offline"}.__contains__, "online or offline", default="online")
    """``online`` or ``offline`` (then ``wandb sync`` later)."""


class Offload(Enum):
    """What a GPU leaves to the memory of its machine."""

    none = "none"
    optimizer = "optimizer"
    parameters = "parameters"


class OnNonfinite(Enum):
    """What a loss or gradient that is not finite does to a run."""

    stop = "stop"
    skip = "skip"


@dataclass
class TrainerConfig:
    """The loop and its optimizer."""

    steps: int = MISSING
    """Optimizer steps (GLUS-S 3000, GLUS-A 5000)."""
    global_batch_size: int = at_least(1, default=80)
    """Videos per optimizer step over all ranks and accumulation steps; accumulation is derived from it."""
    micro_batch_size: int = at_least(1, default=2)
    """Videos per forward pass and rank."""
    learning_rate: float = 3e-4
    """Peak, reached after the warm-up."""
    warmup_steps: int = 100
    """Linear from 0; then linear decay to 0 at the last step."""
    betas: list[float] = checked(lambda betas: len(betas) == 2, "two numbers", default=lambda: [0.9, 0.95])
    """AdamW's, of the two running means."""
    weight_decay: float = 0.0
    """AdamW's, of all that is declared trainable (release: 0), also where no gradient arrives: embeddings of tokens
    that never occur, and the mask decoder's ``Sam2Segmenter.NEVER_UPDATED``."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm."""
    zero_stage: int = checked({2, 3}.__contains__, "2 or 3", default=2)
    """DeepSpeed ZeRO stage: 2 or 3."""
    offload: Offload = Offload.none
    """``optimizer``: float32 weights and moments lie in the machine's memory, where the update is computed.
    ``parameters``: the weights too, fetched layer by layer (stage 3 only)."""
    gradient_checkpointing: bool = True
    """Recompute the LLM's layers in the backward pass instead of keeping their activations."""
    compile: bool | None = None
    """Run the LLM's layers as ``torch.compile`` makes them: the same losses and gradients but for rounding, other draws
    of dropout. Null: on a GPU, where a third of a step is element-wise work that it fuses (an estimate), if there is a
    compiler, ZeRO stage 3 and quantisation are off; not on a CPU, where the small model gave 0 to 10 % more samples a
    second on a core that others used too (tools/benchmark_training.py --compile), and code takes half a minute to two
    to make. ``true`` needs a C++ compiler."""
    seed: int = 0
    """Decides initial weights and every drawn sample."""
    log_every: int = at_least(1, default=10)
    """Optimizer steps between two lines of metrics.jsonl."""
    eval_every: int = 0
    """Optimizer steps between two evaluations on ``valid``; 0: only after the last step, if ``valid`` is set."""
    eval_max_videos: int = 8
    """Videos of ``valid`` (the first ones) that an evaluation during training segments."""
    save_every: int = at_least(1, default=500)
    """Optimizer steps between two checkpoints; the last step is always saved."""
    save_every_minutes: float = checked(lambda minutes: minutes >= 0, "0 (off) or more", default=0.0)
    """Save also when so much time has passed since the last checkpoint, by rank 0's clock; 0: not by time."""
    keep_last: int = at_least(1, default=3)
    """Newest checkpoints that are kept; older ones are removed after a new one is complete."""
    keep_best: str | None = checked({"J", "F", "J&F"}.__contains__, "J, F, J&F", default=None)
    """Score of ``valid`` (J, F or J&F) by which the best checkpoint is kept too; a new best is saved at once."""
    resume: str = "auto"
    """``auto``: go on from the newest complete checkpoint of ``output``, if there is one. ``never``: refuse to. A
    path: start from that checkpoint (or the newest of that run), unless ``output`` has its own already."""
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    """A loss or gradient that is not finite: ``stop`` the run, or ``skip`` the step, which is counted and logged."""
    max_skips_in_row: int = at_least(1, default=10)
    """More steps skipped one after the other stop the run."""
    spike_ratio: float = checked(lambda ratio: ratio > 1, "above 1", default=3.0)
    """A loss above so many times the median of the last 50 steps is reported with this step's samples."""
    hang_timeout_minutes: float = positive(default=30.0)
    """A rank that takes longer for a step, an evaluation or a checkpoint prints its stack and samples and ends."""
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        is_possible = self.zero_stage == 3 or self.offload is not Offload.parameters
        require(is_possible, "trainer.zero_stage", "3 where trainer.offload=parameters", self.zero_stage)


GIB = 2**30
BUCKET_NUMBERS = 15 * 10**7
"""Gradients are summed over ranks through a buffer of so many numbers: the whole embedding table of LLaMA (1.3e8) fits,
and all that is trained with it (2.9e8) does not, so that summing begins while the backward pass is still at work."""
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100": 989, "H100 NVL": 835, "H100 PCIe": 756, "H800": 989, "H20": 148,
    "A100": 312, "A800": 312, "A40": 150, "A10": 125, "A10G": 70, "L40S": 362, "L40": 181, "L4": 121,
    "RTX 6000 Ada": 364, "RTX A6000": 155, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
"""Card -> dense bfloat16 products with float32 sums in 1e12 floating-point operations per second, by its maker."""


def nominal_tflops(card: str) -> float | None:
    """``PEAK_TFLOPS`` of a card by its name as CUDA spells it; None: it is not listed, or a slice of one (MIG)."""
    words = set(card.replace("-", " ").split())
    known = [name for name in PEAK_TFLOPS if set(name.split()) <= words and "MIG" not in words]
    return float(PEAK_TFLOPS[max(known, key=len)]) if known else None


@dataclass
class HardwareConfig:
    """What ``tools/plan.py`` fits a run to. Training itself takes the processes it is started with, whatever their
    number here; the global batch is the same with any."""

    num_nodes: int = positive(default=1)
    """Machines."""
    num_gpus: int = positive(default=4)
    """On all nodes together: one process each."""
    gpu_memory_gb: float = positive(default=80.0)
    """Of one GPU, in GiB."""
    node_memory_gb: float = positive(default=256.0)
    """Of one node, in GiB: what offloading may fill."""
    peak_tflops: float = positive(default=312.0)
    """Of one GPU; see ``PEAK_TFLOPS``."""


@dataclass
class RecipeConfig:
    """One row of the paper's tables; nothing here changes what is trained."""

    row: str = MISSING
    """How the table calls it."""
    source: str = MISSING
    """Where the expected score stands."""
    expected: dict[str, float | None] = checked(lambda score: 0 < score < 100, "J&F in percent, or null", default=dict)
    """Split -> J&F in percent; null: not published."""
    batch_source: str = "micro-batch 2 and 10 accumulations in the released train_ds.py, 4 GPUs by a secondary source"
    """Where ``trainer.global_batch_size`` comes from."""
    gpu_hours: float = MISSING
    """On A100."""
    gpu_hours_source: str = MISSING
    """Where they come from."""
    key_frames: bool = False
    """The expected score was reached with the authors' key frames."""


@dataclass
class TrainConfig:
    """``scripts/train.py``."""

    model: ModelConfig = field(default_factory=ModelConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    valid: DatasetConfig | None = None
    """Split that is evaluated during training, as ``+dataset@valid=NAME`` sets it; null: none."""
    hardware: HardwareConfig | None = None
    """What the settings were chosen for (``hardware=...``); null: nothing in particular."""
    recipe: RecipeConfig | None = None
    """The published result that the settings are meant to give; null: none."""
    output: str = MISSING
    """Run folder: resolved config, run info, metrics.jsonl, checkpoints."""
    allow_cpu: bool = False
    """Train an LLM of a billion parameters or more where no GPU is usable, instead of refusing to."""

    def __post_init__(self) -> None:
        precision, stage = self.model.precision, self.trainer.zero_stage
        is_quantized = self.model.llm.quantization is not Quantization.none
        expected = "2 where model.llm.quantization is not none (stage 3 cannot cut quantised weights)"
        require(stage < 3 or not is_quantized, "trainer.zero_stage", expected, stage)
        require(precision is not Precision.fp16, "model.precision", "fp32 or bf16 in training", precision.value)
        # ZeRO-3 gathers parameters by collective calls, which ranks that segment different videos would not make alike.
        expected = "2 where valid is set (set valid=null, and evaluate checkpoints with scripts/predict.py)"
        require(stage < 3 or self.valid is None, "trainer.zero_stage", expected, stage)
        expected = "false or null where trainer.zero_stage is 3 or model.llm.quantization is not none"
        require(self._can_compile() or not self.trainer.compile, "trainer.compile", expected, self.trainer.compile)
        is_trained = self.loss.weights.get("iou", 0) > 0
        expected = f"{str(is_trained).lower()} where loss.weights.iou is {'above' if is_trained else 'not above'} 0"
        require(self.model.iou_head == is_trained, "model.iou_head", expected, self.model.iou_head)
        best = self.trainer.keep_best
        require(best is None or self.valid is not None, "trainer.keep_best", "null where valid is not set", best)

    def is_compiled(self, on_gpu: bool) -> bool:
        """Whether ``trainer.compile`` asks for it on such a device."""
        return on_gpu and self._can_compile() if self.trainer.compile is None else self.trainer.compile

    def _can_compile(self) -> bool:
        """Stage 3 gathers parameters in hooks, and quantised layers have kernels of their own: neither was tried."""
        return self.trainer.zero_stage < 3 and self.model.llm.quantization is Quantization.none
