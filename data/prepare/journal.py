"""Journal of preprocessing, from which a killed run resumes."""

from pathlib import Path

import orjson
from pydantic import BaseModel, Field, ValidationError

from moetron.common.files import atomic_file, beside
from moetron.data.readers.chunks import Cursor, Reject


class Part(BaseModel):
    """Counts of one shard so far."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


class Side(BaseModel):
    """Counts of one output so far."""

    parts: list[Part] = Field(default_factory=lambda: [Part()])
    """Its shards; all but the last are full."""
    asked: int = 0
    """Documents checked for duplicates, if deduplication is on."""

    @property
    def documents(self) -> int:
        """Return the number of documents in all shards."""
        return sum(part.documents for part in self.parts)


class State(BaseModel):
    """State of a run that its temporary files do not hold."""

    key: str
    """Key of inputs, settings and tokenizer: a run resumes only if they are the same."""
    fast: bool
    """True if the tokenizer's fast engine has matched the reference so far."""
    cursor: Cursor = Field(default_factory=Cursor)
    """Position in the inputs from which reading continues."""
    read_bytes: int = 0
    rows: int = 0
    rejected: int = 0
    left_out: dict[str, int] = Field(default_factory=dict)
    """Documents dropped by each filter."""
    reasons: list[Reject] = Field(default_factory=list)
    """The first rejects."""
    sides: list[Side]
    """One per output prefix."""
    sizes: dict[str, int] = Field(default_factory=dict)
    """Bytes of each temporary file that belong to this state; later bytes are discarded."""


def journal_path(prefix: str | Path) -> Path:
    """Return ``PREFIX.progress.json``."""
    return beside(prefix, ".progress.json")


def write_state(prefix: str | Path, state: State) -> None:
    """Write the journal atomically; the files it describes must be synced before."""
    with atomic_file(journal_path(prefix)) as file:
        file.write(orjson.dumps(state.model_dump()))


def read_state(prefix: str | Path, key: str) -> State | None:
    """Read the state of an earlier run with the same key, if all its files are there."""
    try:
        found = State.model_validate(orjson.loads(journal_path(prefix).read_bytes()))
        kept = all(Path(name).stat().st_size >= size for name, size in found.sizes.items())
    except (FileNotFoundError, orjson.JSONDecodeError, ValidationError):
        return None
    return found if kept and found.key == key else None
