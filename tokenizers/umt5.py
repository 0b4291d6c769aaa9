"""Tokenizer of SentencePiece models: umT5's kind and any other ``.model`` file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from moetron.common.errors import UserError
from moetron.tokenizers.interface import Tokenizer, fingerprint_of, require_encodable

SPACE_MARKER = "\u2581"
"""Character that stands for a space in a SentencePiece model, which thus cannot represent it."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file; lossless when trained by ``moetron.tokenizers.train``.

    U+2581 in a text, which SentencePiece would decode as a space, is encoded as its three bytes if
    the model has byte pieces.
    """

    kind = "sentencepiece"
    concurrent = True

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"tokenizer {path}: not a SentencePiece model ({error})") from None
        model = self._model
        if model.eos_id() < 0:
            raise UserError(
                f"tokenizer {path}: no end-of-sentence piece to end documents; "
                "train it with eos_id set"
            )
        self.name = path.name
        self.files = {path.name: path}
        self.vocab_size = model.get_piece_size()
        self.eod = model.eos_id()
        self.pad = model.pad_id() if model.pad_id() >= 0 else self.eod
        self.sentinels = tuple(_sentinels(model))
        self.end_text = self.piece(self.eod)
        self.fingerprint = fingerprint_of(self.kind, content)
        marker_ids = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARKER.encode()]
        self._marker_ids = marker_ids if all(map(model.is_byte, marker_ids)) else None

    @property
    def serialized(self) -> bytes:
        """Return the content of the ``.model`` file."""
        content: bytes = self._model.serialized_model_proto()
        return content

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on one thread."""
        require_encodable(texts)
        ids = self._model.encode(list(texts), num_threads=1)
        if self._marker_ids is not None:
            for number, text in enumerate(texts):
                if SPACE_MARKER in text:
                    ids[number] = self._encode_around_markers(text, self._marker_ids)
        return ids

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated ids of all texts, int32, and their lengths, on one thread."""
        require_encodable(texts)
        ids = self._model.encode(list(texts), out_type="numpy", num_threads=1)
        if self._marker_ids is not None:
            for number, text in enumerate(texts):
                if SPACE_MARKER in text:
                    marked = self._encode_around_markers(text, self._marker_ids)
                    ids[number] = np.array(marked, np.int32)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.concatenate([np.empty(0, np.int32), *ids]), lengths

    def _encode_around_markers(self, text: str, marker_ids: list[int]) -> list[int]:
        """Encode a text with U+2581: its parts, with the marker's bytes between them."""
        first, *others = self._model.encode(text.split(SPACE_MARKER), num_threads=1)
        return first + [i for part in others for i in (*marker_ids, *part)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Return ids, first characters and ends; U+2581 stays SentencePiece's."""
        require_encodable([text])
        content = np.frombuffer(text.encode(), np.uint8)
        char = np.cumsum(content & 0xC0 != 0x80) - 1  # of each byte; others continue a character
        pieces = self._model.encode(text, return_type="proto").pieces  # with places in bytes
        ids = [piece.id for piece in pieces]
        starts = [int(char[min(piece.begin, content.size - 1)]) for piece in pieces]
        # All bytes of a character but the last are pieces of no width.
        widths = [max(piece.end - piece.begin, 1) for piece in pieces]
        ends = [
            int(char[min(piece.begin + width, content.size) - 1]) + 1
            for piece, width in zip(pieces, widths, strict=True)
        ]
        return ids, starts, ends

    @property
    def unknown(self) -> int:
        """Return the id of unknown characters."""
        number: int = self._model.unk_id()
        return number

    def piece(self, number: int) -> str:
        """Return the spelling of a piece in the model."""
        text: str = self._model.id_to_piece(number)
        return text

    def id_of(self, token: str) -> int | None:
        """Return the id of a piece, including control pieces and sentinels."""
        number: int = self._model.piece_to_id(token)
        return None if number == self._model.unk_id() else number

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; control pieces are dropped, sentinels are spelled out."""
        return self._model.decode([int(i) for i in ids])


def _sentinels(model: sentencepiece.SentencePieceProcessor) -> list[int]:
    """Return the ids of ``<extra_id_0>``, ``<extra_id_1>``, ... in the model."""
    found: list[int] = []
    while (number := model.piece_to_id(f"<extra_id_{len(found)}>")) != model.unk_id():
        found.append(number)
    return found
