"""Shapes, the generated benchmark: which objects a short video has, how they move, and what is said about them.

Drawing is ``render.py``; the MeViS and Ref-YouTube-VOS layouts on disk are ``write.py``.

Every scene holds two look-alikes of one shape and one or two distractors of other shapes. How the look-alikes move
is the scene's *structure*, and gives the two sentences that only motion can tell apart:

======== ======= ====================================================================================
opposite motion  the look-alikes move in different directions
leave    global  one leaves the frame early, the other late or never; alike until the first departs
turn     global  side by side in the same direction, until one turns around half-way
cross    local   equal in shape, colour, texture and size, they pass each other half-way
======== ======= ====================================================================================

Lengths are shares of the frame's side until ``generate_scene`` scales them to pixels; y points down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np

from glus.distributed import generator
from glus.shapes.render import COLOURS, EXTENT, SHAPES, TEXTURES, SceneObject, draw_background, render

KINDS = ("appearance", "motion", "global", "local", "multi", "absent")
STRUCTURES = {"motion": ("opposite",), "global": ("leave", "turn"), "local": ("cross",)}
"""Kind -> its structures. A scene draws the kind, then the structure, each uniformly."""
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
SHARED_LOOKS = {
    ("shape",): ("the {shape}s", "all {shape}s", "the two {shape}s"),
    ("colour",): ("the {colour} objects", "all {colour} objects"),
}
"""What a sentence says of a group of objects -> its templates."""
MOTION = ("the {name} moving {way}", "the {name} going {way}", "the {name} that moves {way}")
LEAVES = ("the {name} that leaves first", "the {name} leaving first")
STAYS = ("the {name} that stays longer", "the {name} staying longer")
TURNS = ("the {name} that turns around later", "the {name} turning around later")
KEEPS_GOING = ("the {name} that keeps going", "the {name} that never turns around")
STARTS = ("the {name} that starts {place}", "the {name} starting {place}")

MIN_FRAMES, MIN_SIZE = 6, 48
_TRIES = 60
_CLEARANCE = 1.15
"""Wanted distance of two centres, as a multiple of the sum of their radii."""

Pair = list[SceneObject]
"""The look-alikes."""
Motion = TypeVar("Motion")


@dataclass(frozen=True)
class Sentence:
    """One sentence about a scene and the objects it names; ``absent`` sentences name none."""

    text: str
    kind: str
    object_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Scene:
    """One video with everything that is said about it."""

    structure: str
    """How the look-alikes move; a value of ``STRUCTURES``."""
    objects: tuple[SceneObject, ...]
    """In drawing order; ``objects[i].object_id == i``."""
    sentences: tuple[Sentence, ...]
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
    return generate_scene(generator(seed, SPLITS[split], index), num_frames, size)


def draw_scenes(seed: int, count: int, num_frames: int, size: int) -> list[Scene]:
    """Scenes to pre-train towers on, which no split of the benchmark has."""
    return [generate_scene(generator(seed, TOWER_SPLIT, index), num_frames, size) for index in range(count)]


def generate_scene(rng: np.random.Generator, num_frames: int = 16, size: int = 128) -> Scene:
    """Draw a scene, a pure function of the state of ``rng`` and the arguments.

    Args:
        rng: source of all randomness.
        num_frames: T, at least 6.
        size: side of the square frames in pixels, at least 48.

    Raises:
        ValueError: if a number is too small for the motions to be seen.
    """
    if num_frames < MIN_FRAMES or size < MIN_SIZE:
        raise ValueError(
            f"num_frames={num_frames}, size={size}: a Shapes video needs at least {MIN_FRAMES} frames "
            f"of at least {MIN_SIZE} pixels"
        )
    kind = str(rng.choice(list(STRUCTURES)))
    structure = str(rng.choice(STRUCTURES[kind]))
    pair, texts = _MOVES[structure](rng, _draw_look_alikes(rng, structure), num_frames)
    objects = [*pair, *_draw_distractors(rng, pair, num_frames)]
    order = rng.permutation(len(objects))
    ids = np.argsort(order)
    objects = [replace(objects[old], object_id=new) for new, old in enumerate(order)]
    by_motion = [Sentence(text, kind, (int(ids[number]),)) for number, text in enumerate(texts)]
    sentences = _draw_sentences(rng, objects, by_motion)
    scaled = tuple(replace(item, radius=item.radius * size, path_T2=item.path_T2 * size) for item in objects)
    frames, masks = render(scaled, draw_background(rng, size))
    return Scene(structure, scaled, sentences, frames, masks)


# ---------------------------------------------------------------------------------------------------- objects


def _draw_object(rng: np.random.Generator, shape: str, colour: str) -> SceneObject:
    """An object of the given shape and colour that does not move yet."""
    red, green, blue = np.clip(np.asarray(COLOURS[colour]) + rng.integers(-10, 11, 3), 0, 255).tolist()
    return SceneObject(
        object_id=-1,
        shape=shape,
        colour=colour,
        rgb=(red, green, blue),
        texture=str(rng.choice(TEXTURES)),
        texture_angle=float(rng.uniform(0, np.pi)),
        rotation=float(rng.uniform(-0.2, 0.2)),
        radius=float(rng.uniform(0.11, 0.16) / max(1.0, EXTENT[shape] - 0.15)),
        path_T2=np.zeros((0, 2)),
    )


def _draw_look_alikes(rng: np.random.Generator, structure: str) -> Pair:
    """Two objects of one shape; of one colour in half of the scenes; equal in all but path where they cross."""
    shape = str(rng.choice(SHAPES))
    first, other = (str(colour) for colour in rng.choice(list(COLOURS), 2, replace=False))
    one = _draw_object(rng, shape, first)
    if structure == "cross":
        return [one, one]
    return [one, _draw_object(rng, shape, first if rng.random() < 0.5 else other)]


def _draw_distractors(rng: np.random.Generator, pair: Pair, num_frames: int) -> list[SceneObject]:
    """One or two objects, each of a shape of its own, still or in moderate motion, apart from the others."""
    shapes = rng.permutation([shape for shape in SHAPES if shape != pair[0].shape])[: rng.integers(1, 3)]
    placed = list(pair)
    for shape in shapes:
        colour = rng.choice([item.colour for item in placed]) if rng.random() < 0.25 else rng.choice(list(COLOURS))
        item = _draw_object(rng, str(shape), str(colour))
        placed.append(_place(item, partial(_wander, rng, item, num_frames), placed))
    return placed[2:]


def _place(item: SceneObject, draw_path: Callable[[], np.ndarray], others: Sequence[SceneObject]) -> SceneObject:
    """``item`` on the first drawn path that keeps clear of ``others``, or on the clearest of ``_TRIES`` paths."""
    best, best_clearance = item, -1.0
    for _ in range(_TRIES):
        path_T2 = draw_path()
        gaps = [np.linalg.norm(path_T2 - o.path_T2, axis=1).min() / (item.radius + o.radius) for o in others]
        clearance = min(gaps, default=np.inf)
        if clearance > best_clearance:
            best, best_clearance = replace(item, path_T2=path_T2), clearance
        if clearance >= _CLEARANCE:
            break
    return best


def _place_pair(pair: Pair, draw_path: Callable[[SceneObject, Motion], np.ndarray], motions: Sequence[Motion]) -> Pair:
    """The look-alikes, each on a path of its own motion, clear of each other."""
    placed: Pair = []
    for item, motion in zip(pair, motions, strict=True):
        placed.append(_place(item, partial(draw_path, item, motion), placed))
    return placed


# --------------------------------------------------------------------------------------------- paths: (T, 2)


def _wander(rng: np.random.Generator, item: SceneObject, num_frames: int) -> np.ndarray:
    """A straight line anywhere in the frame; in a quarter of the cases it has no length."""
    middle = rng.uniform(0.9 * item.radius, 1 - 0.9 * item.radius, 2)
    angle, length = rng.uniform(0, 2 * np.pi), max(0.0, rng.uniform(-0.1, 0.28))
    step = length * np.array([np.cos(angle), np.sin(angle)])
    start, end = middle - step / 2, middle + step / 2
    path_T2 = start + (end - start) * np.linspace(0, 1, num_frames)[:, None]
    return np.clip(path_T2, 0.8 * item.radius, 1 - 0.8 * item.radius)


def _along(way: str, forward_T: np.ndarray, sideways: float) -> np.ndarray:
    """Points ``forward_T`` past the middle in direction ``way`` and ``sideways`` to its right, or below it."""
    direction = np.asarray(DIRECTIONS[way])
    return 0.5 + np.multiply.outer(forward_T, direction) + sideways * np.abs(direction[::-1])


def _cross_middle(rng: np.random.Generator, num_frames: int, item: SceneObject, way: str) -> np.ndarray:
    """A straight line of 0.4 to 0.55 of the side in direction ``way``, through a region around the middle."""
    reach = rng.uniform(0.4, 0.55) / 2
    forward_T = rng.uniform(-0.12, 0.12) + np.linspace(-reach, reach, num_frames)
    return _along(way, forward_T, rng.uniform(-0.33, 0.33))


def _leave(rng: np.random.Generator, num_frames: int, item: SceneObject, gone: int | None) -> np.ndarray:
    """A slow walk around the middle, then straight out of the nearest side, fully outside from frame ``gone`` on."""
    start = rng.uniform(0.25, 0.75, 2)
    angle = rng.uniform(0, 2 * np.pi)
    walk = np.linspace(0, 1, num_frames)[:, None] * rng.uniform(0.25, 0.4) * np.array([np.cos(angle), np.sin(angle)])
    path_T2 = np.clip(start + walk, 0.2, 0.8)
    if gone is None:
        return path_T2
    last_inside = gone - max(2, round(0.25 * num_frames))
    point = path_T2[last_inside]
    direction = max(map(np.asarray, DIRECTIONS.values()), key=lambda way: float(np.dot(point - 0.5, way)))
    to_edge = 0.5 - float(np.dot(point - 0.5, direction))
    steps = np.arange(num_frames - last_inside)[:, None] / (gone - last_inside)
    path_T2[last_inside:] = point + steps * direction * (to_edge + EXTENT[item.shape] * item.radius + 0.02)
    return path_T2


# ------------------------------------------------------- structures: (rng, pair, T) -> pair with paths, two texts


def _move_opposite(rng: np.random.Generator, pair: Pair, num_frames: int) -> tuple[Pair, list[str]]:
    """In two different directions."""
    ways = [str(way) for way in rng.choice(list(DIRECTIONS), 2, replace=False)]
    placed = _place_pair(pair, partial(_cross_middle, rng, num_frames), ways)
    name = _name(rng, pair)
    return placed, [_word(rng, MOTION, name=name, way=way) for way in ways]


def _move_leave(rng: np.random.Generator, pair: Pair, num_frames: int) -> tuple[Pair, list[str]]:
    """One is gone by 45 to 70 % of the video; the other in its last 15 %, or (half of the scenes) never."""
    first = int(rng.integers(np.ceil(0.45 * num_frames), np.floor(0.7 * num_frames) + 1))
    late = int(np.ceil(0.85 * num_frames))
    second = int(rng.integers(late, num_frames)) if late < num_frames and rng.random() < 0.5 else None
    placed = _place_pair(pair, partial(_leave, rng, num_frames), (first, second))
    name = _name(rng, pair)
    return placed, [_word(rng, templates, name=name) for templates in (LEAVES, STAYS)]


def _move_turn(rng: np.random.Generator, pair: Pair, num_frames: int) -> tuple[Pair, list[str]]:
    """Parallel lanes at one speed; at 45 to 55 % of the video the first turns around and goes back."""
    way = str(rng.choice(list(DIRECTIONS)))
    turn = rng.uniform(0.45, 0.55)
    time = np.linspace(0, 1, num_frames)
    gap = (_CLEARANCE * (pair[0].radius + pair[1].radius)) / 2
    middle, side = rng.uniform(-0.15, 0.15), rng.choice([-1.0, 1.0])
    length, start = rng.uniform(0.6, 0.7), rng.uniform(-0.36, -0.3)
    steps = (np.minimum(time, 2 * turn - time), time)
    placed = [
        replace(item, path_T2=_along(way, start + rng.uniform(-0.03, 0.03) + length * step, middle + sign * side * gap))
        for item, step, sign in zip(pair, steps, (-1, 1), strict=True)
    ]
    name = _name(rng, pair)
    return placed, [_word(rng, templates, name=name) for templates in (TURNS, KEEPS_GOING)]


def _move_cross(rng: np.random.Generator, pair: Pair, num_frames: int) -> tuple[Pair, list[str]]:
    """Against each other on lanes 0.6 to 0.9 radii apart: both stay partly visible where they pass."""
    places = {"right": "on the left", "left": "on the right", "down": "at the top", "up": "at the bottom"}
    ways = ["right", "left"] if rng.random() < 0.5 else ["down", "up"]
    if rng.random() < 0.5:
        ways.reverse()
    middle, side = rng.uniform(-0.2, 0.2), rng.choice([-1.0, 1.0])
    gap = pair[0].radius * rng.uniform(0.6, 0.9) / 2
    placed = []
    for item, way, sign in zip(pair, ways, (-1, 1), strict=True):
        reach = rng.uniform(0.27, 0.35)
        forward_T = np.linspace(-reach, reach, num_frames) + rng.uniform(-0.04, 0.04)
        placed.append(replace(item, path_T2=_along(way, forward_T, middle + sign * side * gap)))
    name = f"{pair[0].colour} {pair[0].shape}"
    return placed, [_word(rng, STARTS, name=name, place=places[way]) for way in ways]


_MOVES = {"opposite": _move_opposite, "leave": _move_leave, "turn": _move_turn, "cross": _move_cross}


# -------------------------------------------------------------------------------------------------- sentences


def _word(rng: np.random.Generator, templates: Sequence[str], **words: str) -> str:
    return str(rng.choice(templates)).format(**words)


def _name(rng: np.random.Generator, pair: Pair) -> str:
    """What both look-alikes may be called: the shape, sometimes with the colour where it is the same."""
    has_colour = pair[0].colour == pair[1].colour and rng.random() < 0.5
    return f"{pair[0].colour} {pair[0].shape}" if has_colour else pair[0].shape


def _alike(item: SceneObject, objects: Sequence[SceneObject], looks: Sequence[str]) -> list[SceneObject]:
    """All objects, the item among them, that have its colour, shape or both."""
    return [other for other in objects if all(getattr(other, look) == getattr(item, look) for look in looks)]


def appearance_sentences(objects: Sequence[SceneObject]) -> list[Sentence]:
    """Every sentence that names one object by its looks alone, and no other object fits."""
    found = []
    for item in objects:
        for looks, templates in LOOKS.items():
            if len(_alike(item, objects, looks)) == 1:
                texts = [template.format(colour=item.colour, shape=item.shape) for template in templates]
                found += [Sentence(text, "appearance", (item.object_id,)) for text in texts]
    return found


def multi_sentences(rng: np.random.Generator, objects: Sequence[SceneObject]) -> list[Sentence]:
    """One sentence for every group of two or more objects, but not all of them, that has a name."""
    found = []
    for looks, templates in SHARED_LOOKS.items():
        for item in objects:
            group = _alike(item, objects, looks)
            if group[0] is item and 1 < len(group) < len(objects):
                text = _word(rng, templates, colour=item.colour, shape=item.shape)
                found.append(Sentence(text, "multi", tuple(member.object_id for member in group)))
    single = [item for item in objects if len(_alike(item, objects, ("shape",))) == 1]
    if len(single) == 2:
        one, other = rng.permutation(2)
        text = f"the {single[one].shape} and the {single[other].shape}"
        found.append(Sentence(text, "multi", tuple(item.object_id for item in single)))
    return found


def absent_sentence(rng: np.random.Generator, objects: Sequence[SceneObject]) -> Sentence:
    """Names a colour and shape that no object has together, though the scene has one of them, and often both."""
    present = {(item.colour, item.shape) for item in objects}
    colours, shapes = {item.colour for item in objects}, {item.shape for item in objects}
    missing = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present and (c in colours or s in shapes)]
    hardest = [(c, s) for c, s in missing if c in colours and s in shapes]
    choices = hardest if hardest and rng.random() < 0.6 else missing
    colour, shape = choices[rng.integers(len(choices))]
    return Sentence(_word(rng, LOOKS["colour", "shape"], colour=colour, shape=shape), "absent", ())


def _draw_sentences(
    rng: np.random.Generator, objects: Sequence[SceneObject], by_motion: Sequence[Sentence]
) -> tuple[Sentence, ...]:
    """6 to 8 sentences in random order: ``by_motion``, one absent, one or two multi, the rest appearance.

    Every object is named by a sentence that names it alone: look-alikes by their motion, the others by their looks.
    """
    multi = multi_sentences(rng, objects)
    rng.shuffle(multi)  # type: ignore[arg-type]
    sentences = [*by_motion, absent_sentence(rng, objects), *multi[: rng.integers(1, 3)]]
    looks = appearance_sentences(objects)
    rng.shuffle(looks)  # type: ignore[arg-type]
    named = {sentence.object_ids for sentence in by_motion}
    for number in range(len(objects)):
        if (number,) not in named:
            mine = next(sentence for sentence in looks if sentence.object_ids == (number,))
            looks.remove(mine)
            sentences.append(mine)
    sentences += looks[: max(int(rng.integers(6, 9)) - len(sentences), 0)]
    return tuple(sentences[number] for number in rng.permutation(len(sentences)))
