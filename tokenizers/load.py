"""Load the tokenizer of ``--tokenizer-model``."""

import os
from collections.abc import Collection
from pathlib import Path

from moetron.common.errors import UserError
from moetron.tokenizers.byte_json import holds_bytes
from moetron.tokenizers.byte_level import ByteTokenizer
from moetron.tokenizers.huggingface import HuggingFaceTokenizer
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.umt5 import SentencePieceTokenizer

FOLDER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")
FORMS = "a SentencePiece .model file, a HuggingFace tokenizer.json (or its folder), or 'bytes'"


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a ``.model`` file, a ``tokenizer.json``, a folder with one, or ``bytes``.

    Raises:
        UserError: the file does not exist or is not of its suffix's format.
    """
    if str(source) == "bytes":
        return ByteTokenizer()
    path = tokenizer_file(source)
    if path.suffix == ".json":
        return ByteTokenizer() if holds_bytes(path) else HuggingFaceTokenizer(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    raise UserError(f"tokenizer {source}: its name ends with {path.suffix!r}; give {FORMS}")


def load_known_tokenizer(source: str | None, fingerprints: Collection[str]) -> Tokenizer:
    """Load the tokenizer that a model was trained with.

    Args:
        source: As for `load_tokenizer`; None: not given.
        fingerprints: Fingerprints of the training data's tokenizer; empty: unknown.

    Raises:
        UserError: the tokenizer does not exist, or is another one.
    """
    if source is None:
        raise UserError("the run has no tokenizer (mock data?); give --tokenizer-model")
    try:
        tokenizer = load_tokenizer(source)
    except UserError as error:
        raise UserError(f"{error}; if it moved, give --tokenizer-model") from error
    if fingerprints and tokenizer.fingerprint not in fingerprints:
        raise UserError(
            f"--tokenizer-model {source}: not the tokenizer that the run was trained with"
        )
    return tokenizer


def tokenizer_file(source: str | Path) -> Path:
    """Return the file of ``source``, a file or a folder.

    Raises:
        UserError: there is no such file.
    """
    path = Path(os.path.expanduser(source))  # noqa: PTH111 - Path's raises for ~nobody
    if path.is_dir():
        path = _file_of(path)
    if not path.is_file():
        raise UserError(f"tokenizer {source}: no such file or folder; give {FORMS}")
    return path


def _file_of(folder: Path) -> Path:
    """Return the tokenizer file of a folder."""
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return models[0]
    found = f"{len(models)} .model files" if models else "no tokenizer"
    raise UserError(f"tokenizer folder {folder}: {found} in it; name the file: {FORMS}")
