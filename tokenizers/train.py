"""Train an umT5-style tokenizer: a lossless SentencePiece unigram model.

Byte fallback, no normalisation, no dummy prefix and no folding of spaces, so that any text decodes
exactly. Ids: pad 0, eos 1, ``<s>`` 2, unk 3, then white space and bytes, then the learned
pieces, then the sentinels of which ``<extra_id_0>`` is the highest, then unused rows up to a
multiple of 128 (umT5: 256,000 pieces + 300 sentinels = 256,300, padded to 256,384).
"""

import importlib
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from moetron.common.errors import UserError
from moetron.common.files import sha256_of
from moetron.common.json_files import read_object
from moetron.tokenizers.umt5 import SPACE_MARKER

model_pb2: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # untyped

SPACE_RUNS = (*range(2, 17), 20, 24, 28, 32)
LINE_ENDS_AND_TABS = ("\n", "\n\n", "\n\n\n", "\t", "\t\t", "\t\t\t", "\t\t\t\t")
WHITE_SPACE = (*LINE_ENDS_AND_TABS, *(SPACE_MARKER * length for length in SPACE_RUNS))
"""White-space pieces, defined here because SentencePiece trains on lines and cannot learn them."""

SENTENCE_CHARACTERS = 1024
THREADS = 4
"""Fixed for all machines: the order of SentencePiece's sums depends on the number of threads."""


@dataclass(frozen=True)
class TrainingOptions:
    """Options of tokenizer training."""

    vocab_size: int
    """Pieces and sentinels together, before padding."""
    sentinels: int = 100
    """Number of ``<extra_id_i>``."""
    padding_multiple: int = 128
    """The file is padded with unused pieces to a multiple of this."""
    character_coverage: float = 0.9995
    """Fraction of the text's characters with a piece; the others fall back to bytes."""
    split_digits: bool = False
    """Make every digit a piece of its own."""
    pieces_span_words: bool = False
    """Allow pieces across spaces, like umT5's (slower to train)."""

    def problems(self) -> list[str]:
        """Return all problems of the options, one line each."""
        least = 4 + 256 + len(WHITE_SPACE) + self.sentinels + 100
        found = []
        if self.sentinels < 0:
            found.append(f"--sentinels {self.sentinels}: give 0 or more")
        if self.vocab_size < least:
            found.append(
                f"--vocab-size {self.vocab_size}: bytes, white space and "
                f"{self.sentinels} sentinels leave too few pieces to learn; give at least {least}"
            )
        if not 0.9 <= self.character_coverage <= 1:
            found.append(f"--character-coverage {self.character_coverage}: give 0.9 to 1")
        return found


def train(texts: Iterable[str], options: TrainingOptions) -> bytes:
    """Train on all texts, held in memory by SentencePiece; return the bytes of a ``.model`` file.

    The same texts in the same order, options and library version give the same bytes.

    Raises:
        UserError: the options are wrong, or the text cannot fill the vocabulary.
    """
    if problems := options.problems():
        raise UserError("; ".join(problems))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=options.vocab_size - options.sentinels,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=options.split_digits,
            split_by_whitespace=not options.pieces_span_words,
            character_coverage=options.character_coverage,
            user_defined_symbols=list(WHITE_SPACE),
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            max_sentence_length=4 * SENTENCE_CHARACTERS,
            num_threads=THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"SentencePiece cannot train --vocab-size {options.vocab_size} on this text; give more "
            f"text or a smaller vocabulary ({str(error).strip()})"
        ) from None
    return append_pieces(model.getvalue(), options.sentinels, options.padding_multiple)


def append_pieces(model: bytes, sentinels: int, multiple: int) -> bytes:
    """Add ``<extra_id_i>`` (the first highest), then unused pieces up to a multiple, at the top."""
    proto = model_pb2.ModelProto.FromString(model)
    kinds = model_pb2.ModelProto.SentencePiece
    for number in reversed(range(sentinels)):
        proto.pieces.add(piece=f"<extra_id_{number}>", score=0.0, type=kinds.USER_DEFINED)
    for number in range(-len(proto.pieces) % multiple):
        proto.pieces.add(piece=f"<unused_{number}>", score=0.0, type=kinds.CONTROL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString(deterministic=True)


def is_current(model: Path, sidecar: Path, made_from: Mapping[str, Any]) -> bool:
    """Return whether ``model`` was made by this recipe, recorded in ``sidecar``, and is intact."""
    if not (model.is_file() and sidecar.is_file()):
        return False
    try:
        recorded = read_object(sidecar)
    except UserError:
        return False
    intact = recorded.get("sha256") == sha256_of(model)
    return intact and recorded.get("made_from") == made_from


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yield lines, split at SentencePiece's maximum length."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), SENTENCE_CHARACTERS):
                yield line[start : start + SENTENCE_CHARACTERS]
