"""The special tokens of GLUS and the SentencePiece vocabulary they extend.

The ids of the added tokens are never assumed: they are read from ``added_tokens.json`` beside ``tokenizer.model``
(LISA on LLaMA-1 has [SEG] = 32003, on LLaMA-2 32000).
"""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece

IMAGE_ID = -200
"""Placeholder of one visual token in ``input_ids``; never an index into the embedding table."""

IMAGE_PATCH = "<im_patch>"
IMAGE_START = "<im_start>"
IMAGE_END = "<im_end>"
SEG = "[SEG]"
ADDED_TOKENS = (IMAGE_PATCH, IMAGE_START, IMAGE_END, SEG)


class Vocabulary:
    """A SentencePiece model plus the added tokens of GLUS.

    Args:
        folder: holds ``tokenizer.model`` (SentencePiece) and ``added_tokens.json`` (token -> id).

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: an added token is missing or its id is taken by another token, so that it would not be one id.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        for name in ("tokenizer.model", "added_tokens.json"):
            if not (self.folder / name).is_file():
                raise FileNotFoundError(
                    f"tokenizer folder {self.folder} has no {name}; "
                    "expected tokenizer.model (SentencePiece) and added_tokens.json side by side"
                )
        self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(self.folder / "tokenizer.model"))
        self._added: dict[str, int] = json.loads((self.folder / "added_tokens.json").read_text())
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


def write_added_tokens(folder: str | Path) -> None:
    """Write ``added_tokens.json`` for the SentencePiece model in ``folder``: the added tokens follow its ids."""
    folder = Path(folder)
    first = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    added = {token: first + offset for offset, token in enumerate(ADDED_TOKENS)}
    (folder / "added_tokens.json").write_text(json.dumps(added, indent=2) + "\n")
