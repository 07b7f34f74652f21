"""The special tokens of GLUS and the SentencePiece vocabulary they extend.

The ids of the added tokens are never assumed: they are read from ``added_tokens.json`` beside ``tokenizer.model``
(LISA on LLaMA-1 has [SEG] = 32003, on LLaMA-2 32000).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import sentencepiece

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


def placeholders(input_ids: np.ndarray) -> np.ndarray:
    """Where visual tokens go in token ids of any shape, counted through all of them, row by row: (M,) int64."""
    return np.flatnonzero(input_ids == IMAGE_ID)


class Vocabulary:
    """A SentencePiece model plus the added tokens of GLUS.

    Args:
        folder: holds ``tokenizer.model`` (SentencePiece) and ``added_tokens.json`` (token -> id).

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: an added token is missing, is given twice, has the id of another token, or is a piece of the
            SentencePiece model too, so that it would not be exactly one id.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        for name, hint in _ABSENT.items():
            if not (self.folder / name).is_file():
                raise FileNotFoundError(
                    f"tokenizer folder {self.folder} has no {name}; expected tokenizer.model (SentencePiece) and "
                    f"added_tokens.json side by side{hint if (self.folder / 'tokenizer.json').is_file() else ''}"
                )
        self._pieces = _read_pieces(self.folder / "tokenizer.model")
        self._added = _read_added_tokens(self.folder / "added_tokens.json")
        self._check()
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.pad_id: int = max(self._pieces.pad_id(), 0)
        self.image_start_id = self._added[IMAGE_START]
        self.image_end_id = self._added[IMAGE_END]
        self.seg_id = self._added[SEG]

    def _check(self) -> None:
        missing = [token for token in (IMAGE_START, IMAGE_END, SEG) if token not in self._added]
        if missing:
            raise ValueError(f"{self.folder}/added_tokens.json lacks {missing}; it holds {sorted(self._added)}")
        ids = list(self._added.values())
        if len(set(ids)) != len(ids) or min(ids) < self._pieces.get_piece_size():
            raise ValueError(
                f"{self.folder}/added_tokens.json must give each token one id of its own, at or above the "
                f"{self._pieces.get_piece_size()} SentencePiece ids; it holds {self._added}"
            )
        known = [token for token in self._added if self._pieces.encode(token, out_type=str)[-1].endswith(token)]
        if known:
            raise ValueError(
                f"{self.folder}/tokenizer.model already holds {known}, which added_tokens.json adds: each would have "
                "two ids; take the tokenizer.model that belongs to the checkpoint"
            )

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """Token -> id of the tokens that SentencePiece does not know."""
        return MappingProxyType(self._added)

    @property
    def size(self) -> int:
        """Number of rows an embedding table needs."""
        return max(self._added.values()) + 1

    def encode(self, text: str) -> list[int]:
        """SentencePiece ids of ``text``; special tokens inside it are *not* recognised."""
        return self._pieces.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of SentencePiece ids, for messages and inspection; added tokens keep their names."""
        names = {i: token for token, i in self._added.items()} | {IMAGE_ID: "<image>"}
        return " ".join(names.get(i) or self._pieces.id_to_piece(i) for i in ids)


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
