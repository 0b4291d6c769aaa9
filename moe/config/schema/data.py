"""Where samples come from, and what they ask of the model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from moetron.common.data_path import bare_prefixes, weight_or_none
from moetron.moe.config.schema.field import Group, Rule
from moetron.moe.config.schema.paths import LocalPath

Word = Annotated[str, Field(coerce_numbers_to_str=True)]
"""A name or a number; a recipe may write numbers as such."""
DataPath = Annotated[list[LocalPath], AfterValidator(bare_prefixes)]
"""Prefixes of shards, or pairs of a weight and a prefix."""
ObjectiveName = Literal["causal", "prefix_lm", "ul2", "fim"]


class StageLearningRate(Group):
    """The learning rate of one stage, from its first token to its last."""

    lr: PositiveFloat
    """Learning rate at the start of the stage."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at its end."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the way between them; constant: lr throughout."""


class StageSettings(Group):
    """A stage of the data: from the one before it (or the start) until a number of tokens."""

    data_path: DataPath
    """As `data_path` of the data settings."""
    until_tokens: PositiveInt | None = None
    """Tokens of the run at which the next stage begins; left out for the last."""
    objective: ObjectiveName = "causal"
    """What samples ask of the model."""
    seed: NonNegativeInt | None = None
    """Seed of the order; unset: the run's, so that sources go on where the stage before stopped."""
    learning_rate: StageLearningRate | None = None
    """Its learning rate; unset: the run's schedule goes on."""

    @model_validator(mode="before")
    @classmethod
    def _read_text(cls, value: Any) -> Any:
        """A stage as a flag gives it: a YAML mapping in one word."""
        try:
            return yaml.safe_load(value) if isinstance(value, str) else value
        except yaml.YAMLError as error:
            raise ValueError("not a YAML mapping") from error


class DataSettings(Group):
    """Where samples come from."""

    data_path: DataPath | None = None
    """Training shards: PREFIX PREFIX ..., mixed in proportion to their size, or WEIGHT PREFIX
    WEIGHT PREFIX ... A prefix is the path without .bin or .idx, which are dropped from its end."""
    data_root: LocalPath | None = None
    """Folder that relative prefixes start from; unset: the working directory."""
    objective: ObjectiveName = "causal"
    """What samples ask of the model: every next token (causal), the second part of a text after the
    first (prefix_lm), OpenMoE's mixture of denoisers (ul2), or documents of which some have their
    middle moved to the end (fim)."""
    bidirectional_prefix: bool = False
    """The given part of a prefix_lm or ul2 sample sees all of itself; otherwise only what came
    before."""
    fim_rate: float = Field(default=0.5, ge=0, le=1)
    """fim: share of documents whose middle moves to the end."""
    fim_spm_rate: float = Field(default=0.5, ge=0, le=1)
    """fim: share of those in the order suffix, prefix, middle instead of prefix, suffix, middle."""
    fim_prefix_token: str = "<fim_prefix>"
    """fim: token of the tokenizer before the prefix."""
    fim_middle_token: str = "<fim_middle>"
    """fim: token before the middle."""
    fim_suffix_token: str = "<fim_suffix>"
    """fim: token before the suffix."""
    fim_sources: list[Word] | None = None
    """fim: only the sources of these names (prefixes without their folders), in every fim stage;
    the others give causal samples. Validation shards NAME.valid, NAME_val and the like count as
    NAME. Unset: all."""
    repetition_max_count: int | None = Field(default=None, ge=5)
    """Mask the loss of a sample in which an n-gram stands this many times in a row (OLMoE: 32)."""
    repetition_max_period: PositiveInt = 13
    """Longest such n-gram, in tokens."""
    stages: list[StageSettings] | None = None
    """Instead of --data-path, mappings of data_path, until_tokens (all but the last), objective,
    seed and learning_rate (lr, min_lr, lr_decay_style): other sources, weights, objective or
    learning rate from a number of tokens on."""
    max_epochs: PositiveFloat | None = None
    """Refuse a run that would go through a source more often than this, over all stages."""
    source_max_epochs: list[Word] | None = None
    """The same of single sources, in place of --max-epochs: NAME EPOCHS NAME EPOCHS ...; a name is
    a prefix without its folders."""
    valid_data_path: DataPath | None = None
    """Validation shards, written the same way."""
    mock_data: bool = False
    """Deterministic synthetic samples instead of all shards; of stages, only their learning rates
    count."""
    tokenizer_model: LocalPath | None = None
    """A SentencePiece .model file, a HuggingFace tokenizer.json (or its folder), or 'bytes'."""
    num_workers: NonNegativeInt = 0
    """Processes that load samples beside each rank; 0: the rank itself."""
    eod_mask_loss: bool = False
    """No loss on end-of-document tokens."""

    @field_validator("source_max_epochs")
    @classmethod
    def _names_and_numbers(cls, words: list[str] | None) -> list[str] | None:
        """Refuse another form."""
        if words is None:
            return None
        form = "give NAME EPOCHS NAME EPOCHS ..., such as code 4 web 1.5"
        if len(words) % 2:
            raise Rule(f"{words[-1]!r} stands alone; {form}")
        for name, word in zip(words[::2], words[1::2], strict=True):
            number = weight_or_none(word)
            if number is None or not number > 0:
                raise Rule(f"{word!r}, the epochs of {name!r}, is no number above 0; {form}")
        if twice := [name for name in words[::2] if words[::2].count(name) > 1]:
            raise Rule(f"{twice[0]!r} stands there twice; {form}")
        return words

    def epoch_caps(self) -> dict[str, float]:
        """``source_max_epochs`` by name."""
        words = self.source_max_epochs or []
        return dict(zip(words[::2], map(float, words[1::2]), strict=True))

    def planned_stages(self) -> list[StageSettings]:
        """The stages; a run without them is one stage, or none where it has no shards."""
        if self.stages is not None:
            return self.stages
        if self.data_path is None:
            return []
        return [StageSettings(data_path=self.data_path, objective=self.objective)]

    def rooted(self, data_path: Sequence[str]) -> list[str]:
        """A data path with its prefixes below ``data_root``."""
        root = self.data_root
        if root is None:
            return list(data_path)
        return [
            word if weight_or_none(word) is not None else str(Path(root) / word)
            for word in data_path
        ]
