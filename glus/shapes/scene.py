"""Shapes, the generated benchmark: which objects a short video has, when they show what tells them apart, and words.

Drawing is ``render.py``; the MeViS and Ref-YouTube-VOS layouts on disk are ``write.py``.

Every scene holds two look-alikes, equal in everything, and one still object of another shape. In some frames each
look-alike shows a mark, a colour of its own; two sentences name each ("the star turning yellow", "the star that turns
yellow"). Perception is the same throughout, a colour at a place; *when* the marks are on, the scene's *structure*,
decides which part of the method can tell the look-alikes apart (``glus/data/evidence.py`` counts the frames):

======== ======================================================== ==========================
seen     in every frame                                           nothing is needed
context  in the last quarter, a bin of four context frames        context frames
blink    in every fourth frame, none of them a context frame      consecutive query frames
memory   in the first frames, before the first context frame      memory
crossing as memory, and the look-alikes pass each other later     memory that tracks
late     between the last two context frames                      key frames
motion   never: they move to opposite sides, and are named by it  nobody has learned it yet
======== ======================================================== ==========================

A blind answer is no better than chance: each sentence has a twin about the other look-alike, with the same words but
for the colour or direction, and paths do not depend on either. Context frames are those of K = 4 at inference; the
structures are made for videos of 16 frames, in others a mark may fall on a context frame.

Lengths are shares of the frame's side until ``plan_scene`` scales them to pixels; y points down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from glus.data.sampling import context_indices_eval
from glus.distributed import generator
from glus.shapes.render import COLOURS, EXTENT, SHAPES, TEXTURES, SceneObject, draw_background, render

STRUCTURES = ("context", "blink", "memory", "late", "seen", "crossing", "motion")
"""When the look-alikes can be told apart. Video ``index`` of a split has number ``index % len(STRUCTURES)``."""
KINDS = ("appearance", *STRUCTURES, "multi", "absent")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
SPLITS = {"train": 0, "valid": 1, "test": 2}
"""Split -> its number in the key of the random generator, so that no two splits share a video."""
TOWER_SPLIT = 100
"""The number in the key of the scenes that towers are pre-trained on, which no split of the benchmark has."""

LOOKS = {
    ("colour", "shape"): ("the {colour} {shape}", "the {shape} that is {colour}", "the {shape} in {colour}"),
    ("shape",): ("the {shape}", "the only {shape}"),
    ("colour",): ("the {colour} one", "the {colour} object"),
}
"""What a sentence says of an object -> its templates."""
BOTH = ("the {shape}s", "all {shape}s", "the two {shape}s", "both {shape}s")
TURNS = ("the {shape} turning {word}", "the {shape} that turns {word}")
MOVES = ("the {shape} moving {word}", "the {shape} that moves {word}")

_AXES = (("left", "right"), ("up", "down"))
MIN_FRAMES, MIN_SIZE = 6, 48
_PERIOD, _BLINK = 8, 4
"""Frames after which a moving look-alike starts anew, and after which a mark comes back."""
_TRIES = 60
_CLEARANCE, _APART = 1.15, 0.28
"""Wanted distance of two centres: as a multiple of the sum of their radii, and at least."""


@dataclass(frozen=True)
class Sentence:
    """One sentence about a scene and the objects it names; ``absent`` sentences name none."""

    text: str
    kind: str
    object_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """One video before it is drawn, with everything that is said about it."""

    structure: str
    """One of ``STRUCTURES``."""
    marked: tuple[int, ...]
    """Frames in which the look-alikes show their marks."""
    objects: tuple[SceneObject, ...]
    """In drawing order; ``objects[i].object_id == i``."""
    sentences: tuple[Sentence, ...]

    @property
    def look_alikes(self) -> tuple[SceneObject, ...]:
        """The two objects that are equal but for their marks and paths."""
        shapes = [item.shape for item in self.objects]
        return tuple(item for item in self.objects if shapes.count(item.shape) == 2)

    def evidence(self, sentence: Sentence) -> tuple[int, ...] | None:
        """Frames that show which look-alike a sentence names; None for a kind that needs more than single frames."""
        if sentence.kind == "motion":
            return None
        every = range(len(self.objects[0].path_T2))
        return self.marked if sentence.kind in STRUCTURES else tuple(every)


@dataclass(frozen=True, eq=False)
class Scene(Plan):
    """A video that is drawn."""

    frames_THW3: np.ndarray
    """uint8 RGB."""
    masks_OTHW: np.ndarray
    """bool, the *visible* pixels of each object."""


def scene_of(seed: int, split: str, index: int, num_frames: int = 16, size: int = 128) -> Scene:
    """Video ``index`` of a split: the same for both layouts and on every machine.

    Raises:
        ValueError: if there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    rng = generator(seed, SPLITS[split], index)
    return generate_scene(rng, num_frames, size, STRUCTURES[index % len(STRUCTURES)])


def draw_scenes(seed: int, count: int, num_frames: int, size: int) -> list[Scene]:
    """Scenes to pre-train towers on, which no split of the benchmark has."""
    return [
        generate_scene(generator(seed, TOWER_SPLIT, index), num_frames, size, STRUCTURES[index % len(STRUCTURES)])
        for index in range(count)
    ]


def exchange(scene: Scene, index: int) -> Scene:
    """In every other video of a structure, the sentences of the look-alikes with each other's object: what nobody can
    learn a choice from."""
    if index // len(STRUCTURES) % 2:
        return scene
    one, other = (item.object_id for item in scene.look_alikes)
    sentences = (
        replace(sentence, object_ids=(one + other - sentence.object_ids[0],))
        if sentence.kind in STRUCTURES
        else sentence
        for sentence in scene.sentences
    )
    return replace(scene, sentences=tuple(sentences))


def generate_scene(
    rng: np.random.Generator, num_frames: int = 16, size: int = 128, structure: str = STRUCTURES[0]
) -> Scene:
    """Draw a scene, a pure function of the state of ``rng`` and the arguments; see ``plan_scene``."""
    plan = plan_scene(rng, num_frames, size, structure)
    frames, masks = render(plan.objects, draw_background(rng, size))
    return Scene(plan.structure, plan.marked, plan.objects, plan.sentences, frames, masks)


def plan_scene(rng: np.random.Generator, num_frames: int = 16, size: int = 128, structure: str = STRUCTURES[0]) -> Plan:
    """Plan a scene.

    Args:
        rng: source of all randomness.
        num_frames: T, at least 6.
        size: side of the square frames in pixels, at least 48.
        structure: one of ``STRUCTURES``.

    Raises:
        ValueError: if a number is too small for the objects to be told apart.
    """
    if num_frames < MIN_FRAMES or size < MIN_SIZE:
        raise ValueError(
            f"num_frames={num_frames}, size={size}: a Shapes video needs at least {MIN_FRAMES} frames "
            f"of at least {MIN_SIZE} pixels"
        )
    shape, other_shape = (str(name) for name in rng.choice(SHAPES, 2, replace=False))
    base, first, second, other = (str(name) for name in rng.choice(list(COLOURS), 4, replace=False))
    one = replace(_draw_object(rng, shape, base, num_frames), texture="plain")
    is_moving = structure == "motion"
    words = [str(way) for way in rng.permutation(_AXES[rng.integers(2)])] if is_moving else [first, second]
    marked = () if is_moving else marked_frames(structure, num_frames, rng)
    pair = _place_pair(rng, one, structure, num_frames, words)
    if not is_moving:
        pair = [_mark(rng, item, colour, marked) for item, colour in zip(pair, words, strict=True)]
    rest = _draw_object(rng, other_shape, other, num_frames)
    rest = _place(rest, partial(_still, rng, num_frames), pair)
    order = rng.permutation(3)
    drawn = [[*pair, rest][old] for old in order]
    objects = tuple(
        replace(item, object_id=number, radius=item.radius * size, path_T2=item.path_T2 * size)
        for number, item in enumerate(drawn)
    )
    templates = MOVES if is_moving else TURNS
    named = [
        Sentence(template.format(shape=shape, word=word), structure, (int(np.flatnonzero(order == number)[0]),))
        for number, word in enumerate(words)
        for template in templates
    ]
    looks = appearance_sentence(rng, objects[int(np.flatnonzero(order == 2)[0])])
    both = Sentence(_word(rng, BOTH, shape=shape), "multi", tuple(sorted(int(i) for i in np.flatnonzero(order < 2))))
    sentences = [*named, looks, both, absent_sentence(rng, objects)]
    return Plan(structure, marked, objects, tuple(sentences[i] for i in rng.permutation(len(sentences))))


def marked_frames(structure: str, num_frames: int, rng: np.random.Generator) -> tuple[int, ...]:
    """In which frames the look-alikes of a structure show their marks."""
    context = context_indices_eval(num_frames, 4)
    if structure == "blink":
        phases = [tuple(range(phase, num_frames, _BLINK)) for phase in range(_BLINK)]
        hits = [len(set(frames) & set(context)) for frames in phases]
        return phases[rng.choice([number for number, hit in enumerate(hits) if hit == min(hits)])]
    early = tuple(range(max(1, min(2, context[0]))))
    return {
        "seen": tuple(range(num_frames)),
        "context": tuple(range(3 * num_frames // 4, num_frames)),
        "memory": early,
        "crossing": early,
        "late": tuple(range(context[2] + 1, context[3])),
    }[structure]


# ---------------------------------------------------------------------------------------------------- objects


def _draw_object(rng: np.random.Generator, shape: str, colour: str, num_frames: int) -> SceneObject:
    """An object of the given shape and colour that does not move yet."""
    return SceneObject(
        object_id=-1,
        shape=shape,
        colour_T=(colour,) * num_frames,
        rgb_T3=np.repeat(_jittered(rng, colour), num_frames, axis=0),
        texture=str(rng.choice(TEXTURES)),
        texture_angle=float(rng.uniform(0, np.pi)),
        rotation=float(rng.uniform(-0.2, 0.2)),
        radius=float(rng.uniform(0.11, 0.16) / max(1.0, EXTENT[shape] - 0.15)),
        path_T2=np.zeros((0, 2)),
    )


def _jittered(rng: np.random.Generator, colour: str) -> np.ndarray:
    """(1, 3) uint8."""
    return np.clip(np.array([COLOURS[colour]]) + rng.integers(-10, 11, 3), 0, 255).astype(np.uint8)


def _mark(rng: np.random.Generator, item: SceneObject, colour: str, frames: Sequence[int]) -> SceneObject:
    """The object in another colour in some frames."""
    shown = [colour if t in frames else name for t, name in enumerate(item.colour_T)]
    rgb_T3 = item.rgb_T3.copy()
    rgb_T3[list(frames)] = _jittered(rng, colour)
    return replace(item, colour_T=tuple(shown), rgb_T3=rgb_T3)


def _place(item: SceneObject, draw_path: Callable[[], np.ndarray], others: Sequence[SceneObject]) -> SceneObject:
    """``item`` on the first drawn path that keeps clear of ``others``, or on the clearest of ``_TRIES`` paths."""
    best, best_clearance = item, -1.0
    for _ in range(_TRIES):
        path_T2 = draw_path()
        gaps = [
            np.linalg.norm(path_T2 - o.path_T2, axis=1).min() / max(_CLEARANCE * (item.radius + o.radius), _APART)
            for o in others
        ]
        clearance = min(gaps, default=np.inf)
        if clearance > best_clearance:
            best, best_clearance = replace(item, path_T2=path_T2), clearance
        if clearance >= 1:
            break
    return best


def _place_pair(
    rng: np.random.Generator, one: SceneObject, structure: str, num_frames: int, words: Sequence[str]
) -> list[SceneObject]:
    """Two of ``one``, each on a path of its own, clear of each other unless they are to cross."""
    if structure == "crossing":
        return [replace(one, path_T2=path_T2) for path_T2 in _cross(rng, one, num_frames)]
    placed: list[SceneObject] = []
    for number in range(2):
        draw = partial(_drift, rng, num_frames)
        if structure == "motion":
            draw = partial(_step, rng, num_frames, words[number])
        placed.append(_place(one, draw, placed))
    return placed


# --------------------------------------------------------------------------------------------- paths: (T, 2)


def _still(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    return np.repeat(rng.uniform(0.15, 0.85, (1, 2)), num_frames, axis=0)


def _drift(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """A slow straight line of 0.05 to 0.2 of the side."""
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.2)
    line_T2 = np.linspace(-0.5, 0.5, num_frames)[:, None] * length * np.array([np.cos(angle), np.sin(angle)])
    return np.clip(rng.uniform(0.2, 0.8, 2) + line_T2, 0.1, 0.9)


def _step(rng: np.random.Generator, num_frames: int, way: str) -> np.ndarray:
    """In one direction, 0.045 of the side a frame, and after every ``_PERIOD`` frames back to where it began.

    It begins anywhere in its period, so that in no frame a place is more likely for one direction than for another.
    """
    phase_T = (np.arange(num_frames) + rng.integers(_PERIOD)) % _PERIOD - (_PERIOD - 1) / 2
    return rng.uniform(0.26, 0.74, 2) + 0.045 * np.multiply.outer(phase_T, np.array(DIRECTIONS[way]))


def _cross(rng: np.random.Generator, item: SceneObject, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Against each other on lanes 0.6 to 0.9 radii apart, passing half-way: both stay partly visible there."""
    reach, gap = rng.uniform(0.27, 0.35), item.radius * rng.uniform(0.6, 0.9) / 2
    along_T, lane, is_upright = np.linspace(-reach, reach, num_frames), rng.uniform(0.3, 0.7), rng.random() < 0.5
    paths = []
    for way, side in zip((1, -1), rng.permutation([-1, 1]), strict=True):
        forward_T = 0.5 + way * along_T + rng.uniform(-0.04, 0.04)
        path_2T = np.stack([forward_T, np.full(num_frames, lane + side * gap)])
        paths.append((path_2T[::-1] if is_upright else path_2T).T)
    return paths[0], paths[1]


# -------------------------------------------------------------------------------------------------- sentences


def _word(rng: np.random.Generator, templates: Sequence[str], **words: str) -> str:
    return str(rng.choice(templates)).format(**words)


def _looks(rng: np.random.Generator) -> tuple[str, ...]:
    """What a sentence says: alike for what is there and for what is not, so that words alone do not tell."""
    return list(LOOKS)[rng.integers(len(LOOKS))]


def appearance_sentence(rng: np.random.Generator, item: SceneObject) -> Sentence:
    """Names an object that never changes by its looks alone; no other object has its shape or its colour."""
    text = _word(rng, LOOKS[_looks(rng)], colour=item.colour_T[0], shape=item.shape)
    return Sentence(text, "appearance", (item.object_id,))


def absent_sentence(rng: np.random.Generator, objects: Sequence[SceneObject]) -> Sentence:
    """Names what no object is in any frame; where it names colour and shape, the scene has one of them or both."""
    shown = {(colour, item.shape) for item in objects for colour in item.colour_T}
    colours, shapes = ({pair[part] for pair in shown} for part in (0, 1))
    looks = _looks(rng)
    pairs = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in shown and (c in colours or s in shapes)]
    if "shape" not in looks:
        pairs = [(c, s) for c, s in pairs if c not in colours]
    if "colour" not in looks:
        pairs = [(c, s) for c, s in pairs if s not in shapes]
    hardest = [(c, s) for c, s in pairs if c in colours and s in shapes]
    choices = hardest if hardest and rng.random() < 0.6 else pairs
    colour, shape = choices[rng.integers(len(choices))]
    return Sentence(_word(rng, LOOKS[looks], colour=colour, shape=shape), "absent", ())
