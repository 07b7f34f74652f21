"""The special tokens of GLUS and the vocabularies they extend: SentencePiece's (LLaVA) and ``tokenizer.json`` (Qwen).

The ids of the added tokens are never assumed: they are read from ``added_tokens.json`` beside ``tokenizer.model``
(LISA on LLaMA-1 has [SEG] = 32003, on LLaMA-2 32000), or follow those of ``tokenizer.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer

from glus.files import read_object, stand_in

IMAGE_ID = -200
"""Placeholder of one visual token in ``input_ids``; never an index into the embedding table."""

IMAGE_PATCH = "<im_patch>"
IMAGE_START = "<im_start>"
IMAGE_END = "<im_end>"
SEG = "[SEG]"
ADDED_TOKENS = (IMAGE_PATCH, IMAGE_START, IMAGE_END, SEG)

_ABSENT = {
    "tokenizer.model": "; tokenizer.json, which transformers 5 saves instead, is not read: take tokenizer.model from "
    "the model that this one was made of (hf download xinlai/LISA-7B-v1 tokenizer.model)",
    "added_tokens.json": '; it is made of tokenizer.json, in that folder: python -c "import json; print(json.dumps('
    "{t['content']: t['id'] for t in json.load(open('tokenizer.json'))['added_tokens'] if t['id'] > 2}))\" "
    "> added_tokens.json",
}
"""Files of a tokenizer -> where to get one that is not there, for folders that newer versions of transformers wrote."""


@dataclass(frozen=True)
class ChatStyle:
    """How a family of MLLMs writes conversations; the words in them are those of ``data/sampling.py``."""

    grammar: str
    """``llava`` or ``chatml``: a file in ``data/chat/``."""
    image_start: str = IMAGE_START
    image_end: str = IMAGE_END
    """Special tokens around the visual tokens of a frame."""
    after_image: str = ""
    """Text that follows each frame."""
    has_axes: bool = False
    """A token has three positions (time, row, column), and a frame advances them by its longer side; else one."""


class Vocabulary:
    """A SentencePiece model plus the added tokens of GLUS.

    Args:
        folder: holds ``tokenizer.model`` (SentencePiece) and ``added_tokens.json`` (token -> id).

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: an added token is missing, is given twice, has the id of another token, or is a piece of the
            SentencePiece model too, so that it would not be exactly one id.
    """

    files = ("tokenizer.model", "added_tokens.json")
    """What a model folder has of it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        for name, hint in _ABSENT.items():
            if not (self.folder / name).is_file():
                raise FileNotFoundError(
                    f"tokenizer folder {self.folder} has no {name}; expected tokenizer.model (SentencePiece) and "
                    f"added_tokens.json side by side{hint if (self.folder / 'tokenizer.json').is_file() else ''}"
                )
        self._pieces = _read_pieces(self.folder / "tokenizer.model")
        self.encode: Callable[[str], list[int]] = self._pieces.encode
        """Text -> ids; special tokens inside it are *not* recognised."""
        self.added_tokens: Mapping[str, int] = _read_added_tokens(self.folder / "added_tokens.json")
        """Token -> id of the tokens that SentencePiece does not know."""
        self._check()
        self.size = max(self.added_tokens.values()) + 1
        """Number of rows an embedding table needs."""
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.pad_id: int = max(self._pieces.pad_id(), 0)
        self.image_start_id = self.added_tokens[IMAGE_START]
        self.image_end_id = self.added_tokens[IMAGE_END]
        self.seg_id = self.added_tokens[SEG]

    def _check(self) -> None:
        missing = [token for token in (IMAGE_START, IMAGE_END, SEG) if token not in self.added_tokens]
        if missing:
            raise ValueError(f"{self.folder}/added_tokens.json lacks {missing}; it holds {sorted(self.added_tokens)}")
        ids = list(self.added_tokens.values())
        if len(set(ids)) != len(ids) or min(ids) < self._pieces.get_piece_size():
            raise ValueError(
                f"{self.folder}/added_tokens.json must give each token one id of its own, at or above the "
                f"{self._pieces.get_piece_size()} SentencePiece ids; it holds {self.added_tokens}"
            )
        known = [token for token in self.added_tokens if self._pieces.encode(token, out_type=str)[-1].endswith(token)]
        if known:
            raise ValueError(
                f"{self.folder}/tokenizer.model already holds {known}, which added_tokens.json adds: each would have "
                "two ids; take the tokenizer.model that belongs to the checkpoint"
            )


class JsonVocabulary:
    """A ``tokenizer.json`` of the tokenizers library (Qwen's byte-pair encoding and its added tokens), plus [SEG].

    [SEG] has the id that the file gives it, or else the first one behind all others: a row that published tables keep
    spare, or a new one.

    Args:
        folder: holds ``tokenizer.json``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        file = self.folder / "tokenizer.json"
        try:
            added = {row["content"]: row for row in read_object(file)["added_tokens"]}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is no tokenizer of the tokenizers library: {error!r}") from error
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.encode_special_tokens = True  # as text, where a sentence spells one
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        self.seg_id: int = known.get(SEG, max(known.values()) + 1)
        self.added_tokens: Mapping[str, int] = {SEG: self.seg_id}
        """Token -> id of the tokens that are GLUS's own."""
        self.pad_id: int = known.get("<|endoftext|>", 0)
        self.size = max(*known.values(), self.seg_id) + 1
        self.strips_before_seg = bool(added.get(SEG, {}).get("lstrip"))
        """Whether the family's own tokenizer would drop white space before [SEG]."""

    @property
    def files(self) -> tuple[str, ...]:
        """What a model folder has of it: also what transformers reads beside it, so that it knows the folder."""
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
        return tuple(name for name in names if (self.folder / name).is_file())

    def id_of(self, token: str) -> int:
        """Id of a special token.

        Raises:
            ValueError: there is no such token.
        """
        found: int | None = self._tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(
                f"{self.folder}/tokenizer.json has no token {token!r}, which the family's conversations need"
            )
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; special tokens inside it are *not* recognised."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids


AnyVocabulary = Vocabulary | JsonVocabulary


def open_vocabulary(folder: str | Path) -> AnyVocabulary:
    """The vocabulary in a folder: SentencePiece's where there is one, or where there is none at all.

    Raises:
        FileNotFoundError, ValueError: see the two.
    """
    has_json = (Path(folder) / "tokenizer.json").is_file() and not (Path(folder) / "tokenizer.model").is_file()
    return JsonVocabulary(folder) if has_json else Vocabulary(folder)


def _read_pieces(file: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{file} is no SentencePiece model (cut short?): {error}{stand_in(file)}") from error


def _read_added_tokens(file: Path) -> dict[str, int]:
    added = read_object(file)
    if not all(type(number) is int for number in added.values()):
        raise ValueError(f"{file} holds {added}: expected {{token: id}}")
    return added


def write_added_tokens(folder: str | Path) -> None:
    """Write ``added_tokens.json`` for the SentencePiece model in ``folder``: the added tokens follow its ids."""
    folder = Path(folder)
    first = _read_pieces(folder / "tokenizer.model").get_piece_size()
    added = {token: first + offset for offset, token in enumerate(ADDED_TOKENS)}
    (folder / "added_tokens.json").write_text(json.dumps(added, indent=2) + "\n")
