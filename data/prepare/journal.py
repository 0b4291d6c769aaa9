"""How far preprocessing has come, so that a killed run goes on where it was."""

from pathlib import Path

import orjson
from pydantic import BaseModel, Field, ValidationError

from moetron.common.files import atomic_file, beside
from moetron.data.readers.chunks import Cursor, Reject


class Part(BaseModel):
    """What one shard holds so far."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


class Side(BaseModel):
    """What one output holds so far."""

    parts: list[Part] = Field(default_factory=lambda: [Part()])
    """Its shards; all but the last are full."""
    asked: int = 0
    """Documents that were looked up among those seen before, if duplicates are left out."""

    @property
    def documents(self) -> int:
        """Of all shards."""
        return sum(part.documents for part in self.parts)


class State(BaseModel):
    """All that a run knows and its temporary files do not hold."""

    key: str
    """Inputs, settings, tokenizer: work goes on only if they are the same."""
    fast: bool
    """Whether the tokenizer's fast engine has given the right ids so far."""
    cursor: Cursor = Field(default_factory=Cursor)
    """Where reading goes on."""
    read_bytes: int = 0
    rows: int = 0
    rejected: int = 0
    left_out: dict[str, int] = Field(default_factory=dict)
    """Documents that each filter left out."""
    reasons: list[Reject] = Field(default_factory=list)
    """The first rejects."""
    sides: list[Side]
    """Of each output prefix."""
    sizes: dict[str, int] = Field(default_factory=dict)
    """Bytes of each temporary file that belong to this state; what lies behind is newer."""


def journal_path(prefix: str | Path) -> Path:
    """``PREFIX.progress.json``."""
    return beside(prefix, ".progress.json")


def write_state(prefix: str | Path, state: State) -> None:
    """Write the journal atomically; the files it speaks of must be on the disk already."""
    with atomic_file(journal_path(prefix)) as file:
        file.write(orjson.dumps(state.model_dump()))


def read_state(prefix: str | Path, key: str) -> State | None:
    """The state that an earlier run of the same key left, if its files are all there."""
    try:
        found = State.model_validate(orjson.loads(journal_path(prefix).read_bytes()))
        kept = all(Path(name).stat().st_size >= size for name, size in found.sizes.items())
    except (FileNotFoundError, orjson.JSONDecodeError, ValidationError):
        return None
    return found if kept and found.key == key else None
