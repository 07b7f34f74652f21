"""Compare an MLLM of any size, weights random, with transformers' own classes on whole, separate conversations.

    python tools/check_backbone.py model=glus_qwen3_vl_tiny
    python tools/check_backbone.py model=glus_internvl3_tiny model.llm.architecture.num_hidden_layers=7 --json out.json
    python tools/check_backbone.py model=glus_tiny --frames 90x160 150x100

Token ids are compared with the family's chat template, visual tokens with its image processor and tower, states with
its forward pass (eager attention, one conversation at a time, nothing shared), gradients with those of that pass. Files
that a model names are not read: the vocabulary is a small one that is made for the check; adapters are left out.
Exits with 1 if anything falls short.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from torch import nn

if not __package__:  # run by its path: Python looks beside this file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glus import distributed
from glus.batch import Conversation
from glus.config import FramesConfig, InferenceConfig, ModelConfig, TrainConfig, load_config
from glus.config.jobs import user_errors
from glus.console import tables
from glus.data.chat import Chat
from glus.data.dataset import collate, make_sample
from glus.data.sampling import Turn, draw_turns, inference_turn
from glus.files import PROJECT
from glus.inference.asking import Prompt, Prompter
from glus.inference.predictor import chat_of
from glus.models.build import FAMILIES
from glus.models.glus import Glus
from glus.tokens import open_vocabulary
from glus.types import Role
from tools.benchmarks.measuring import command_line, read_size
from tools.parity.comparison import Case, Gate, Row, is_met, print_table, write_rows
from tools.parity.references import SENTENCES, Reference, Shown, make_vocabulary_folder, open_reference

STATES_GATE, GRADIENTS_GATE, VISUAL_GATE = Gate(5e-6), Gate(1e-5), Gate(1e-6)
"""In float32."""
NEGLIGIBLE_GRADIENT = 1e-3
"""Share of the largest gradient below which a parameter's are float noise."""
WEIGHT_NOISE = 0.03
"""Added to every weight, so that those that begin at 0 or 1 matter."""


@dataclass(frozen=True)
class MadeVideo:
    """Frames of a made-up video, and its conversations in training."""

    chat: Chat
    """For frames of its size."""
    context: list[np.ndarray]
    query: list[np.ndarray]
    turns: list[list[Turn]]
    conversations: list[Conversation]

    @property
    def shown(self) -> Shown:
        """Frames in the order that a conversation shows them."""
        return [*((frame, Role.context) for frame in self.context), *((frame, Role.query) for frame in self.query)]


def compare_backbone(
    config: ModelConfig, frames: FramesConfig, sizes: Sequence[tuple[int, int]], folder: Path, seed: int
) -> list[Row]:
    """All comparisons of a model with random weights.

    Args:
        config: of the model, whose adapters and files are left out.
        frames: how many context and query frames a conversation shows.
        sizes: height and width of each video's frames.
        folder: for the vocabulary.
        seed: of weights, frames and words.
    """
    torch.manual_seed(seed)
    model = replace(config, llm=replace(config.llm, lora_rank=0, weights=None, tokenizer=str(folder)))
    make_vocabulary_folder(model, folder)
    glus = _build(model)
    chat = chat_of(glus, open_vocabulary(folder))
    reference = open_reference(model, glus.mllm, chat)
    rng = distributed.generator(seed)
    videos = [_video(frames, chat.sized(size), size, rng) for size in sizes]
    case = Case([], config.family)
    _compare_ids(case, videos, reference)
    _compare_frames(case, videos, glus, reference)
    _compare_training(case, videos, glus, chat, reference)
    _compare_inference(case, videos, glus, reference)
    return case.rows


def _build(config: ModelConfig) -> Glus:
    draw_connector, build = FAMILIES[config.family]
    mllm: Any = build(config, draw_connector(config), False, False)
    with torch.no_grad():
        for parameter in mllm.parameters():
            parameter.add_(WEIGHT_NOISE * torch.randn_like(parameter))
    segmenter: Any = None
    head: Any = nn.Identity()  # so that an answer's embedding is its state
    return Glus(mllm, head, segmenter, seg_state=config.seg_state).eval()


def _video(want: FramesConfig, chat: Chat, size: tuple[int, int], rng: np.random.Generator) -> MadeVideo:
    num_context, num_query = want.num_context, want.num_query
    frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(num_context + num_query)]
    turns = [draw_turns(text, num_query, rng) for text in SENTENCES[:3]]
    conversations = [chat.train(own, num_context, "check") for own in turns]
    return MadeVideo(chat, frames[:num_context], frames[num_context:], turns, conversations)


def _compare_ids(case: Case, videos: Sequence[MadeVideo], reference: Reference) -> None:
    pairs = [(v, turns, ours) for v in videos for turns, ours in zip(v.turns, v.conversations, strict=True)]
    with torch.inference_mode():
        wrong = sum(ours.input_ids.tolist() != reference.input_ids(turns, v.shown) for v, turns, ours in pairs)
    case.count("conversations whose token ids differ", wrong, len(pairs))


def _compare_frames(case: Case, videos: Sequence[MadeVideo], glus: Glus, reference: Reference) -> None:
    shown = [one for video in videos for one in video.shown]
    with torch.inference_mode(), case.row("visual tokens of processed frames") as row:
        pairs = ((_seen(glus, *one).numpy(), reference.visual(*one).numpy()) for one in shown)
        row.compare_each(pairs, VISUAL_GATE, f"{len(shown)} frames")


def _compare_training(case: Case, videos: Sequence[MadeVideo], glus: Glus, chat: Chat, reference: Reference) -> None:
    samples = []
    for video in videos:
        masks = [np.zeros((len(video.query), 1, 1), np.uint8)] * len(video.conversations)
        samples.append(make_sample(glus.mllm.prepare, video.context, video.query, video.conversations, masks))
    batch = collate(samples, chat.vocabulary.pad_id)  # conversations of a video in one row, what they share once
    ours, _ = glus.mllm.states(batch.rows, glus.see(batch))
    theirs = torch.cat([
        reference.states(conversation.input_ids, video.shown)[conversation.reads]
        for video in videos for conversation in video.conversations
    ])  # fmt: skip
    tokens = sum(len(c.input_ids) for v in videos for c in v.conversations)
    assert batch.rows.paths_NC is not None
    packed = len(batch.rows.paths_NC.unique())
    compared = ours.detach().numpy(), theirs.detach().numpy()
    case.compare("states, training path", *compared, STATES_GATE, note=f"{packed} for {tokens} tokens")
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(0))
    logits = [glus.mllm.decoder.logits(ours), theirs @ _head(reference).T]
    for states, answers in ((ours, logits[0]), (theirs, logits[1])):
        ((states * weights).sum() + answers.logsumexp(-1).sum()).backward()
    mllm: Any = glus.mllm
    mine = {name: p.grad.numpy() for name, p in mllm.named_parameters() if p.grad is not None}
    own = {name: p.grad.numpy() for name, p in reference.parameters().items() if p.grad is not None}
    case.count("parameters that get no gradient", len(own.keys() - mine.keys()), len(own))
    shared = mine.keys() & own.keys()
    floor = NEGLIGIBLE_GRADIENT * max(np.abs(own[name]).max() for name in shared)
    with case.row("gradients") as row:
        pairs = ((mine[name], own[name]) for name in shared)
        row.compare_each(pairs, GRADIENTS_GATE, f"{len(shared)} parameters", floor)


def _head(reference: Reference) -> torch.Tensor:
    weights, ends = reference.parameters(), ("lm_head.weight", "embed_tokens.weight")  # the second where it is tied
    return next(weights[name] for end in ends for name in weights if name.endswith(end))


def _compare_inference(case: Case, videos: Sequence[MadeVideo], glus: Glus, reference: Reference) -> None:
    pairs, read = [], 0
    with torch.inference_mode():
        for video in videos:
            tokens = {role: [_seen(glus, frame, role) for frame, own in video.shown if own is role] for role in Role}
            args = (tokens[Role.context], InferenceConfig(trailing_space=False), torch.device("cpu"))
            prompter = Prompter(glus, video.chat, SENTENCES[:3], *args)
            frames = tuple(range(len(video.query)))
            asked = tuple(frame for frame in frames if frame % 2 == 0 or frame == frames[-1])
            prompts = [Prompt(row, frames, asked) for row in range(3)]
            answers = prompter.ask(prompts, dict(enumerate(tokens[Role.query])))
            for row, turn in product(range(3), asked):
                window = video.chat.window(SENTENCES[row], len(video.context), turn + 1, trailing_space=False)
                shown = video.shown[: len(video.context) + turn + 1]
                theirs = reference.states(window.input_ids, shown)[-1]
                pairs.append((answers.embeds_RC[answers.places[row, turn]].numpy(), theirs.numpy()))
                read += len(window.input_ids)
    with case.row("states, inference path") as compared:
        compared.compare_each(pairs, STATES_GATE, f"{len(pairs)} prompts, {read} tokens")
    wrong = sum(_begins_otherwise(*one, reference) for one in product(videos, SENTENCES))
    case.count("prompts that the family begins otherwise", wrong, len(videos) * len(SENTENCES))


def _begins_otherwise(video: MadeVideo, text: str, reference: Reference) -> bool:
    """Whether the longest prompt of a sentence is not how the family writes the conversation up to the answer."""
    ours = video.chat.window(text, len(video.context), len(video.query), trailing_space=False).input_ids.tolist()
    with torch.inference_mode():
        whole = reference.input_ids([inference_turn(text)] * len(video.query), video.shown)
    return whole[: len(ours)] != ours


def _seen(glus: Glus, frame: np.ndarray, role: Role) -> torch.Tensor:
    return glus.mllm.see(torch.from_numpy(glus.mllm.prepare(frame, role)).permute(2, 0, 1)[None])[0]


def compose_config(overrides: list[str]) -> TrainConfig:
    """The settings of a training run with these overrides.

    Raises:
        ValueError: there are no such settings.
    """
    ConfigStore.instance().store("schema", TrainConfig)
    try:
        with initialize_config_dir(str(PROJECT / "configs"), version_base="1.3"):
            return load_config(TrainConfig, compose("train", overrides))
    except HydraException as error:
        raise ValueError(str(error)) from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = command_line(__doc__)
    parser.add_argument("overrides", nargs="+", help="model=..., model.llm.architecture.num_hidden_layers=3, ...")
    sizes = [(96, 160), (150, 90)]
    parser.add_argument("--frames", nargs="+", type=read_size, default=sizes, metavar="HxW", help="of the videos")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_intermixed_args(arguments)
    with user_errors(), TemporaryDirectory() as folder:
        config = compose_config(options.overrides)
        rows = compare_backbone(config.model, config.frames, options.frames, Path(folder), options.seed)
    print_table(rows, config.model.family, tables())
    if options.json:
        write_rows(rows, {"overrides": " ".join(options.overrides)}, options.json)
    sys.exit(0 if is_met(rows) else 1)


if __name__ == "__main__":
    main()
