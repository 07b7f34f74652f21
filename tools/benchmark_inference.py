"""What prediction costs: this project's predictor against the plain procedure, in one run.

    python tools/benchmark_inference.py --json benchmark.json            # the shipped model, 16 sentences x 60 frames
    python tools/benchmark_inference.py --size glus_7b --frames 75 --height 720 --width 1280    # random weights, GPU

The plain procedure is that of the released evaluation: one sentence and one frame at a time, all frames of the prompt
decoded and seen by CLIP again, the whole prompt read again with logits everywhere, one SAM2 encoding per sentence and
frame. Its cost is the same for every sentence, so it is timed on ``--plain-expressions`` of them and scaled up (of a
long video on ``--plain-frames`` alone); its masks are compared with ours. Procedures take turns for ``--rounds``
rounds, since a machine is not equally fast all the time; a ratio is the median over the rounds. Encodes, tokens, calls
and bytes are counted at the modules themselves.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from glus import distributed
from glus.config import FramesConfig, InferenceConfig, ModelConfig, Window, load_config
from glus.data.chat.llava import LlavaChat
from glus.data.chat.tree import separate_rows
from glus.data.frames import VideoSource
from glus.data.sampling import context_indices_eval
from glus.evaluation.packed import boundary_accuracy, region_similarity
from glus.files import write_text
from glus.inference.asking import Pass
from glus.inference.predictor import VideoPredictor, load_predictor
from glus.models.build import build_random
from glus.models.glus import Glus, segment_step
from glus.models.segmenter import upsample_masks
from glus.shapes.scene import generate_scene
from glus.train.measure import count_operations, forget_peak, matmul_tflops, peak_memory
from glus.types import FrameResult

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "assets" / "glus_shapes"
NEAR_THRESHOLD = 1e-4
"""Mask logits closer to 0 than this may fall on either side when sums are taken in another order."""
EARLY_FRAME = 200
"""The frame whose peak memory the peak at the last frame is compared with."""


class BenchmarkVideo:
    """Frames that cost nothing to read: those of a generated scene, enlarged, again and again."""

    reads_in_parallel = True

    def __init__(self, num_frames: int, height: int, width: int, seed: int = 0):
        self.scene = generate_scene(np.random.default_rng(seed), num_frames=16, size=128)
        self.names = [f"{index:05d}" for index in range(num_frames)]
        self._rows = np.arange(height) * 128 // height
        self._columns = np.arange(width) * 128 // width

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return np.ascontiguousarray(self.scene.frames_THW3[index % 16][self._rows][:, self._columns])

    def texts(self, count: int) -> list[str]:
        """Sentences of the scene, repeated if need be."""
        texts = [sentence.text for sentence in self.scene.sentences]
        return [texts[number % len(texts)] for number in range(count)]


class StandInVocabulary:
    """As many tokens as LLaMA's vocabulary gives English text, about one for four letters, for random weights."""

    bos_id, eos_id, pad_id = 1, 2, 0
    image_start_id, image_end_id, seg_id, size = 32001, 32002, 32003, 32004

    def encode(self, text: str) -> list[int]:
        """Ids that depend on the letters alone; a trailing space is a token of its own, as in LLaMA's."""
        pieces = [text.rstrip()[start : start + 4] for start in range(0, len(text.rstrip()), 4)]
        pieces += [" "] * text.endswith(" ")
        return [3 + sum(ord(letter) * 31**place for place, letter in enumerate(piece)) % 31000 for piece in pieces]


def model_config(size: str) -> ModelConfig:
    """``configs/model/<size>.yaml``, its files looked for in the current folder."""
    entry = OmegaConf.create({"paths": {"weights": "."}, "model": OmegaConf.load(ROOT / f"configs/model/{size}.yaml")})
    OmegaConf.resolve(entry)
    return load_config(ModelConfig, entry.model)


def stand_in_tokenizer(glus: Glus) -> LlavaChat:
    """One that gives a model prompts as long as LLaMA's."""
    vocabulary: Any = StandInVocabulary()
    return LlavaChat(vocabulary, glus.mllm.tokens_per_frame)


def random_predictor(size: str, device: torch.device) -> VideoPredictor:
    """A model of ``configs/model/<size>.yaml`` with random weights, which uses every state as if it were [SEG]'s."""
    torch.manual_seed(0)
    glus = build_random(model_config(size), device).eval()
    return VideoPredictor(glus, stand_in_tokenizer(glus), FramesConfig(), InferenceConfig(force_seg=True))


@torch.inference_mode()
def segment_plainly(
    predictor: VideoPredictor, video: VideoSource, text: str, start: int = 0, direction: int = 1
) -> Iterator[tuple[torch.Tensor, bool]]:
    """The plain procedure for one sentence, from ``start`` to an end of the video.

    Yields:
        Mask logits (H, W) at the frame's size, and whether [SEG] was the most likely token (else it is not segmented).
    """
    glus, settings, device = predictor.glus.eval(), predictor.inference, predictor.device
    num_context, vocabulary = predictor.frames.num_context, predictor.chat.vocabulary
    bank = glus.memory_bank(settings.memory_stride)
    one = Pass({0: start}, len(video), direction)
    for step, frame in enumerate(one.order):
        window = one.window(0, step, predictor.frames, settings.window)
        pixels = [video.read(index) for index in (*context_indices_eval(len(video), num_context), *window)]
        shown = torch.from_numpy(np.stack([glus.mllm.prepare(one) for one in pixels])).to(device)
        tokens_MD = glus.mllm.see(shown.permute(0, 3, 1, 2)).flatten(0, 1)
        prompt = predictor.chat.window(text, num_context, len(window), settings.trailing_space)
        rows = separate_rows([prompt], vocabulary.pad_id)
        everywhere = replace(rows, reads_R=torch.arange(rows.input_ids_BL.numel())).to(device)
        states_LD, _ = glus.mllm.states(everywhere, tokens_MD)
        has_seg = int(glus.mllm.logits(states_LD)[-1].argmax()) == vocabulary.seg_id
        image = glus.segmenter.prepare_frames(torch.from_numpy(video.read(frame)).to(device)[None])
        features = glus.segmenter.encode_frames(image)
        size = pixels[-1].shape[:2]
        if has_seg or settings.force_seg:
            prompt_1C, fallback = glus.seg_head(states_LD[-1:]), glus.segmenter.multimask_fallback
            logits_1mm = segment_step(glus.segmenter, bank, {0: step}, features, prompt_1C, fallback=fallback)
            yield upsample_masks(logits_1mm, size)[0], has_seg
        else:
            yield torch.full(size, -torch.inf, device=device), has_seg


@contextmanager
def counted(glus: Glus) -> Iterator[Counter[str]]:
    """Count what the modules of a model are asked to do while the context lasts."""
    counts: Counter[str] = Counter()

    def on(module: torch.nn.Module, *names: str) -> Any:
        def count(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            tensor = arguments[0]
            amounts = {"calls": 1, "images": len(tensor), "tokens": tensor.shape[:-1].numel()}
            counts.update({name: amounts[name.rpartition(" ")[2]] for name in names})
            if names[0] == "CLIP images":
                counts["CLIP input bytes"] += tensor.nbytes

        return module.register_forward_pre_hook(count)

    llama, sam = glus.mllm.llama, glus.segmenter.sam
    hooks = [
        on(glus.mllm.clip, "CLIP images"),
        on(sam.image_encoder, "SAM2 images"),
        on(llama.model.layers[0].mlp.gate_proj, "LLM tokens", "LLM calls"),
        on(llama.lm_head, "LLM head tokens"),
        on(sam.memory_attention.norm, "memory attention calls"),
        on(sam.memory_encoder, "memory encoder calls"),
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


class Timed(NamedTuple):
    """What a procedure gave and took."""

    results: list[Any]
    seconds: list[float]
    """Of every round."""
    counts: Counter[str]
    peak_bytes: int
    """Of the process or GPU until then."""

    @property
    def median(self) -> float:
        """Seconds of the median round."""
        return statistics.median(self.seconds)


def timed(predictor: VideoPredictor, work: Iterator[Any]) -> Timed:
    """The results of ``work``, its seconds, and what it asked of the model."""
    with counted(predictor.glus) as counts:
        started = time.perf_counter()
        results = list(work)
        if predictor.device.type == "cuda":
            torch.cuda.synchronize()
        return Timed(results, [time.perf_counter() - started], counts, peak_memory(predictor.device))


def in_turns(procedures: Sequence[Callable[[], Timed]], rounds: int) -> list[Timed]:
    """Every procedure once per round: what it gave in the first one, and the seconds of all."""
    first = [procedure() for procedure in procedures]
    for _ in range(rounds - 1):
        for one, procedure in zip(first, procedures, strict=True):
            one.seconds.extend(procedure().seconds)
    return first


def median_ratio(of: Timed, to: Timed) -> float:
    """How many times as long as ``to`` a procedure took, in the median of the rounds."""
    return statistics.median(ours / theirs for ours, theirs in zip(of.seconds, to.seconds, strict=True))


def token_bound(predictor: VideoPredictor, texts: Sequence[str], num_frames: int) -> int:
    """LLM tokens if only the context prefix were shared: prefix + sum of (window - prefix)."""
    tokenizer, frames, inference = predictor.chat, predictor.frames, predictor.inference
    prefix = len(tokenizer.opening(frames.num_context))
    one = Pass({0: 0}, num_frames, 1)
    sizes = [len(one.window(0, step, frames, inference.window)) for step in range(num_frames)]
    total = prefix
    for text in texts:
        lengths = {
            size: len(tokenizer.window(text, frames.num_context, size, inference.trailing_space).input_ids)
            for size in set(sizes)
        }
        total += sum(lengths[size] - prefix for size in sizes)
    return total


def count_differences(ours_THW: np.ndarray, logits_THW: torch.Tensor) -> tuple[int, int]:
    """Pixels where our mask differs from the plain one, and those of them that are not near the threshold."""
    differs = torch.from_numpy(ours_THW) != (logits_THW > 0).cpu()
    far = differs & (logits_THW.abs() >= NEAR_THRESHOLD).cpu()
    return int(differs.sum()), int(far.sum())


def with_window(predictor: VideoPredictor, window: Window) -> VideoPredictor:
    """The same predictor with other windows."""
    inference = replace(predictor.inference, window=window)
    return VideoPredictor(predictor.glus, predictor.chat, predictor.frames, inference)


def score_scenes(predictor: VideoPredictor, num_videos: int) -> float:
    """J&F in percent over all sentences of newly generated scenes of 16 frames."""
    scores = []
    for seed in range(num_videos):
        video = BenchmarkVideo(16, 128, 128, seed=1000 + seed)
        texts = [sentence.text for sentence in video.scene.sentences]
        masks_ETHW = np.stack([result.masks_RHW for result in predictor.segment(video, texts)], axis=1)
        for sentence, masks_THW in zip(video.scene.sentences, masks_ETHW, strict=True):
            target = np.any(video.scene.masks_OTHW[list(sentence.object_ids)], axis=0)
            scores.append(
                (region_similarity(masks_THW, target).mean() + boundary_accuracy(masks_THW, target).mean()) / 2
            )
    return 100 * float(np.mean(scores))


def peaks(size: str, num_frames: int, height: int, width: int) -> tuple[int, int]:
    """Peak memory in bytes after ``EARLY_FRAME`` frames and at the end, in a process that does nothing else."""
    predictor = build(size)
    video = BenchmarkVideo(num_frames, height, width)
    forget_peak(predictor.device)
    early = 0
    for result in predictor.segment(video, video.texts(2)):
        if result.frame == EARLY_FRAME:
            early = peak_memory(predictor.device)
    return early, peak_memory(predictor.device)


def build(size: str) -> VideoPredictor:
    """The predictor of a size; ``tiny`` is the shipped model."""
    device = distributed.device()
    return load_predictor(SHIPPED)[0] if size == "tiny" else random_predictor(size, device)


def compare(
    predictor: VideoPredictor,
    video: BenchmarkVideo,
    num_expressions: int,
    plain_expressions: int,
    plain_frames: int | None = None,
    rounds: int = 1,
) -> dict[str, Any]:
    """Segment a video by each procedure.

    Args:
        predictor: ours.
        video: all of it is segmented.
        num_expressions: sentences.
        plain_expressions: of these, how many the plain procedure is timed on.
        plain_frames: the first frames, on which it is timed; None: all.
        rounds: each procedure is timed so often.

    Returns:
        What was measured, by name, without what depends on the device's peak.
    """
    texts, plain_frames = video.texts(num_expressions), plain_frames or len(video)
    few = texts[:plain_expressions]
    first = BenchmarkVideo(3, *video.read(0).shape[:2])
    list(predictor.segment(first, texts[:1]))  # warm up, both procedures
    next(segment_plainly(predictor, first, texts[0]))
    predictor.seconds.clear()
    forget_peak(predictor.device)
    ours, ours_in_clips, plain = run_procedures(predictor, video, texts, few, plain_frames, rounds)
    stages = {name: seconds / rounds for name, seconds in predictor.seconds.items()}
    with count_operations() as flops:
        list(predictor.segment(video, texts))
    scale = len(video) * len(texts) / (plain_frames * len(few))
    differences = compare_masks(ours.results[:plain_frames], plain.results)
    return {
        "num_frames": len(video),
        "num_expressions": len(texts),
        "frames_per_second": len(video) * len(texts) / ours.median,
        "plain_frames_per_second": plain_frames * len(few) / plain.median,
        "frames_per_second_ratio": scale * median_ratio(plain, ours),
        "clips_ratio": median_ratio(ours, ours_in_clips),
        "clip_encodes": ours.counts["CLIP images"],
        "sam2_encodes": ours.counts["SAM2 images"],
        "llm_tokens": ours.counts["LLM tokens"],
        "llm_tokens_bound": token_bound(predictor, texts, len(video)),
        "pixels_that_differ": sum(differs for differs, _ in differences),
        "pixels_that_differ_far_from_threshold": sum(far for _, far in differences),
        "counts": dict(ours.counts),
        "clips_counts": dict(ours_in_clips.counts),
        "plain_counts": {name: round(count * scale) for name, count in plain.counts.items()},
        "seconds": {"all": ours.median, **stages},
        "peak_memory_mb": ours.peak_bytes / 2**20,
        "flops": flops.get_total_flops(),
    }


def run_procedures(
    predictor: VideoPredictor,
    video: VideoSource,
    texts: Sequence[str],
    few: Sequence[str],
    plain_frames: int,
    rounds: int,
) -> list[Timed]:
    """Ours, ours with windows of clips, and the plain procedure on ``few`` of the texts, in turns."""
    clips = with_window(predictor, Window.clips)

    def plainly() -> Iterator[list[tuple[torch.Tensor, bool]]]:
        return (list(islice(segment_plainly(predictor, video, text), plain_frames)) for text in few)

    return in_turns(
        [
            lambda: timed(predictor, predictor.segment(video, texts)),
            lambda: timed(clips, clips.segment(video, texts)),
            lambda: timed(predictor, plainly()),
        ],
        rounds,
    )


def compare_masks(
    ours: Sequence[FrameResult], plain: Sequence[Sequence[tuple[torch.Tensor, bool]]]
) -> list[tuple[int, int]]:
    """``count_differences`` of each sentence that the plain procedure answered; ``ours`` are its frames alone."""
    ours_ETHW = np.stack([result.masks_RHW for result in ours], axis=1)
    pairs = zip(ours_ETHW, plain, strict=False)
    return [count_differences(masks, torch.stack([logits for logits, _ in theirs])) for masks, theirs in pairs]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is reported, by name."""
    predictor = build(arguments.size)
    video = BenchmarkVideo(arguments.frames, arguments.height, arguments.width)
    measured = {"size": arguments.size, "device": str(predictor.device)} | compare(
        predictor,
        video,
        arguments.expressions,
        arguments.plain_expressions,
        arguments.plain_frames,
        arguments.rounds,
    )
    peak = arguments.peak_tflops or matmul_tflops(predictor.device, next(predictor.glus.parameters()).dtype)
    measured["mfu"] = measured["flops"] / measured["seconds"]["all"] / peak / 1e12
    if arguments.size == "tiny":
        measured |= {
            "jf_sliding": score_scenes(predictor, arguments.scenes),
            "jf_clips": score_scenes(with_window(predictor, Window.clips), arguments.scenes),
        }
    if arguments.memory_frames > EARLY_FRAME:
        place = (arguments.size, arguments.memory_frames, arguments.height, arguments.width)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # its own process, whose peak is of this alone
            early, late = pool.apply(peaks, place)
        measured |= {"memory_frames": arguments.memory_frames, "memory_growth": late / early}
    return measured


def print_tables(measured: dict[str, Any], console: Console) -> None:
    """Counts side by side, then ratios, stages and memory."""
    title = f"{measured['size']} on {measured['device']}: {measured['num_expressions']} sentences x "
    table = Table("", "ours", "clips", "plain", title=f"{title}{measured['num_frames']} frames", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in measured["plain_counts"]:
        ours, clips, plain = (measured[key].get(name, 0) for key in ("counts", "clips_counts", "plain_counts"))
        table.add_row(name, f"{ours:,}", f"{clips:,}", f"{plain:,}")
    table.add_row("frames/s", f"{measured['frames_per_second']:.1f}", "", f"{measured['plain_frames_per_second']:.2f}")
    console.print(table)
    seconds = dict(measured["seconds"])
    whole = seconds.pop("all")
    stages = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    console.print(f"ours is {measured['frames_per_second_ratio']:.1f} x the plain procedure; {whole:.2f} s: {stages}")
    console.print(f"clips is {measured['clips_ratio']:.2f} x sliding (other masks)", end="")
    if "jf_clips" in measured:
        console.print(
            f"; J&F on Shapes: sliding {measured['jf_sliding']:.1f}, clips {measured['jf_clips']:.1f}", end=""
        )
    console.print(
        f"\nLLM tokens {measured['llm_tokens']:,} of at most {measured['llm_tokens_bound']:,}; peak memory "
        f"{measured['peak_memory_mb']:.0f} MB; {measured['flops'] * 1e-12:.2f} x 10^12 operations, "
        f"{100 * measured['mfu']:.0f} % of what the device does in a large matrix product"
    )
    console.print(
        f"masks differ from the plain ones in {measured['pixels_that_differ']} pixels, of which "
        f"{measured['pixels_that_differ_far_from_threshold']} are not within {NEAR_THRESHOLD} of the threshold"
    )
    if "memory_growth" in measured:
        frames, growth = measured["memory_frames"], measured["memory_growth"]
        console.print(f"peak memory at frame {frames:,} is {growth:.4f} x that at frame {EARLY_FRAME}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "glus_7b"), default="tiny")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--expressions", type=int, default=16)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument(
        "--plain-expressions", type=int, default=2, help="sentences that the plain procedure is timed on"
    )
    parser.add_argument("--plain-frames", type=int, help="frames that it is timed on; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="each procedure is timed so often, in turns")
    parser.add_argument("--scenes", type=int, default=10, help="generated videos for J&F (size tiny)")
    parser.add_argument(
        "--memory-frames", type=int, default=2000, help=f"long video; up to {EARLY_FRAME}: not measured"
    )
    parser.add_argument("--peak-tflops", type=float, help="of the device; default: a large matrix product, measured")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    measured = measure(options)
    print_tables(measured, Console())
    if options.json:
        write_text(options.json, json.dumps(measured, indent=2) + "\n")
    if measured["pixels_that_differ_far_from_threshold"]:
        sys.exit("error: masks differ from the plain procedure's")


if __name__ == "__main__":
    main()
