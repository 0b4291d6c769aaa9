"""``PREFIX.json``: content and origin of a token shard."""

from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moetron.common.errors import UserError
from moetron.common.files import atomic_file, beside


class TokenizerRecord(BaseModel):
    """Tokenizer that produced the ids."""

    model_config = ConfigDict(frozen=True)

    name: str
    fingerprint: str
    """64 hexadecimal digits; equal fingerprints give equal ids."""
    vocab_size: int
    eod: int
    """End-of-document id."""


class FileRecord(BaseModel):
    """One of the shard's two files."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """Manifest of a shard, written after the files that it describes."""

    model_config = ConfigDict(frozen=True)

    format: int = 1
    tokenizer: TokenizerRecord
    dtype: str
    """Dtype of the token ids: ``uint16`` or ``int32``."""
    documents: int
    tokens: int
    """End-of-document tokens included."""
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    max_id: int | None = None
    """Largest token id; None: a manifest of an older version, or no token."""
    appended_eod: bool
    bin: FileRecord
    idx: FileRecord
    shards: int = 1
    """Number of shards of the output; this is one of them."""
    sources: list[dict[str, Any]] = Field(default_factory=list)
    """Input files with their sizes in bytes and modification times."""
    filters: dict[str, int] = Field(default_factory=dict)
    """Rows dropped by each rule, over all shards of the output."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Preprocessing settings."""
    key: str = ""
    """SHA-256 of sources, settings and tokenizer; outputs with an equal key are current."""


def manifest_path(prefix: str | Path) -> Path:
    """Return ``PREFIX.json``."""
    return beside(prefix, ".json")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """Read the manifest of a shard; None if it has none (shards of other tools).

    Raises UserError if the file exists and is not a manifest.
    """
    path = manifest_path(prefix)
    try:
        return Manifest.model_validate(orjson.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (orjson.JSONDecodeError, ValidationError) as error:
        raise UserError(f"{path}: not a shard's manifest ({_first_line(error)})") from None


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Write ``PREFIX.json`` atomically."""
    with atomic_file(manifest_path(prefix)) as file:
        file.write(orjson.dumps(manifest.model_dump(), option=orjson.OPT_INDENT_2) + b"\n")


def _first_line(error: Exception) -> str:
    """Return the first line of an exception's message."""
    return str(error).splitlines()[0]
