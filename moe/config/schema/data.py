"""Data settings: sources, stages, objectives, the tokenizer, fine-tuning on chats."""

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
from moetron.moe.config.schema.roles import Role, Run

Word = Annotated[str, Field(coerce_numbers_to_str=True)]
"""Text; numbers in a recipe are converted."""
DataPath = Annotated[list[LocalPath], AfterValidator(bare_prefixes)]
"""Shard prefixes, or pairs of weight and prefix."""
ObjectiveName = Literal["causal", "prefix_lm", "ul2", "fim", "span_corruption"]


class StageLearningRate(Group):
    """Learning rate of one stage, from its first token to its last."""

    lr: PositiveFloat
    """Learning rate at the start of the stage."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the stage."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the decay; constant: lr throughout."""


class StageSettings(Group):
    """Data stage: from the end of the previous stage (or the start) to a token count."""

    data_path: DataPath
    """Training shards, as in `data_path` of the data settings."""
    until_tokens: PositiveInt | None = None
    """Tokens of the run at which the next stage begins; omitted for the last stage."""
    objective: ObjectiveName = "causal"
    """Training objective."""
    seed: NonNegativeInt | None = None
    """Data-order seed; unset: the run's, so that sources continue from the previous stage."""
    learning_rate: StageLearningRate | None = None
    """Learning rate of the stage; unset: the run's schedule continues."""

    @model_validator(mode="before")
    @classmethod
    def _read_text(cls, value: Any) -> Any:
        """Parse a stage given as a flag: a YAML mapping in one word."""
        try:
            return yaml.safe_load(value) if isinstance(value, str) else value
        except yaml.YAMLError as error:
            raise ValueError("not a YAML mapping") from error


class DataSettings(Group):
    """Training and validation data."""

    default_role = Role.TRAINING

    data_path: DataPath | None = None
    """Training shards: PREFIX PREFIX ..., mixed in proportion to size, or WEIGHT PREFIX WEIGHT
    PREFIX ... A prefix is a path without .bin or .idx; either ending is dropped."""
    data_root: LocalPath | None = None
    """Base folder of relative prefixes; unset: the working directory."""
    objective: ObjectiveName = "causal"
    """Training objective: next-token prediction (causal), prediction of the second part of a text
    from the first (prefix_lm), OpenMoE's mixture of denoisers (ul2), fill-in-the-middle (fim), or
    T5's hidden spans (span_corruption). An encoder-decoder has span_corruption and prefix_lm."""
    encoder_seq_length: PositiveInt | None = None
    """Encoder-decoder: tokens of a sample that the encoder reads; the decoder reads the rest of
    --seq-length."""
    examples_per_sample: PositiveInt = 1
    """span_corruption: texts that share a sample, in equal parts, and do not see each other."""
    noise_density: float = Field(default=0.15, gt=0, lt=1)
    """span_corruption: fraction of tokens hidden (T5: 0.15)."""
    mean_noise_span_length: PositiveFloat = 3.0
    """span_corruption: mean length of a hidden span (T5: 3)."""
    bidirectional_prefix: bool = False
    """Use bidirectional attention in the prefix of prefix_lm and ul2 samples; otherwise attention
    is causal."""
    fim_rate: float = Field(default=0.5, ge=0, le=1)
    """fim: fraction of documents whose middle is moved to the end."""
    fim_spm_rate: float = Field(default=0.5, ge=0, le=1)
    """fim: fraction of these in the order suffix, prefix, middle, not prefix, suffix, middle."""
    fim_prefix_token: str = "<fim_prefix>"
    """fim: tokenizer token before the prefix."""
    fim_middle_token: str = "<fim_middle>"
    """fim: tokenizer token before the middle."""
    fim_suffix_token: str = "<fim_suffix>"
    """fim: tokenizer token before the suffix."""
    fim_sources: list[Word] | None = None
    """fim: apply only to sources of these names (prefixes without folders), in every fim stage; the
    others give causal samples. Validation shards NAME.valid, NAME_val and the like count as NAME.
    Unset: all."""
    repetition_max_count: int | None = Field(default=None, ge=5)
    """Mask the loss of a sample in which an n-gram repeats this many times in a row (OLMoE: 32)."""
    repetition_max_period: PositiveInt = 13
    """Longest repeated n-gram to detect, in tokens."""
    stages: list[StageSettings] | None = None
    """Data stages, in place of --data-path: mappings of data_path, until_tokens (all but the last),
    objective, seed and learning_rate (lr, min_lr, lr_decay_style)."""
    max_epochs: PositiveFloat | None = None
    """Maximum epochs over any source, all stages together; a longer run is refused."""
    source_max_epochs: list[Word] | None = None
    """Maximum epochs of single sources, in place of --max-epochs: NAME EPOCHS NAME EPOCHS ...; a
    name is a prefix without folders."""
    valid_data_path: DataPath | None = None
    """Validation shards, in the same form; weights have no effect, losses are means over tokens."""
    mock_data: bool = False
    """Use deterministic synthetic samples in place of shards; of stages, only learning rates
    apply."""
    tokenizer_model: Run[LocalPath | None] = None
    """SentencePiece .model file, HuggingFace tokenizer.json (or its folder), or 'bytes'."""
    num_workers: NonNegativeInt = 0
    """Data-loading processes per rank; 0: the rank loads its own samples."""
    eod_mask_loss: bool = False
    """Mask the loss where the input is an end-of-document token: the prediction of the next
    document's first token."""
    reset_attention_mask: bool = False
    """Restrict attention to the token's own document; a document ends with its end-of-document
    token."""
    reset_position_ids: bool = False
    """Restart positions in each document. With --reset-attention-mask, which it needs, this changes
    nothing beyond rounding: rotary positions only act as distances inside a document."""

    @field_validator("source_max_epochs")
    @classmethod
    def _names_and_numbers(cls, words: list[str] | None) -> list[str] | None:
        """Refuse anything but pairs of a name and a positive number."""
        if words is None:
            return None
        form = "give NAME EPOCHS NAME EPOCHS ..., such as code 4 web 1.5"
        if len(words) % 2:
            raise Rule(f"{words[-1]!r} has no pair; {form}")
        for name, word in zip(words[::2], words[1::2], strict=True):
            number = weight_or_none(word)
            if number is None or not number > 0:
                raise Rule(f"{word!r}, the epochs of {name!r}, is not a number above 0; {form}")
        if twice := [name for name in words[::2] if words[::2].count(name) > 1]:
            raise Rule(f"{twice[0]!r} is given twice; {form}")
        return words

    def epoch_caps(self) -> dict[str, float]:
        """Return ``source_max_epochs`` by name."""
        words = self.source_max_epochs or []
        return dict(zip(words[::2], map(float, words[1::2]), strict=True))

    def planned_stages(self) -> list[StageSettings]:
        """Return the stages: one for a run without ``stages``, none for a run without shards."""
        if self.stages is not None:
            return self.stages
        if self.data_path is None:
            return []
        return [StageSettings(data_path=self.data_path, objective=self.objective)]

    def rooted(self, data_path: Sequence[str]) -> list[str]:
        """Return a data path with its prefixes below ``data_root``."""
        root = self.data_root
        if root is None:
            return list(data_path)
        return [
            word if weight_or_none(word) is not None else str(Path(root) / word)
            for word in data_path
        ]


class AdaptationSettings(Group):
    """Fine-tuning on chats."""

    default_role = Role.TRAINING

    sft: bool = False
    """Fine-tune on chats: shards of tools/prepare_chats.py, with loss on answers alone. An
    encoder-decoder reads inputs and predicts targets (--kind text_to_text)."""
    sft_packing: bool = True
    """Put as many conversations into a sample as fit, without cutting any; they do not see each
    other. Otherwise a sample is one conversation and padding."""
    sft_loss_normalisation: Literal["token", "sample"] = "token"
    """Average the loss over the trained tokens of the global batch, or over its conversations, of
    which each has the mean of its tokens."""
    preference_loss: Literal["dpo", "dpo_norm", "kto"] | None = None
    """Optimise preferences instead (--sft): DPO on summed log-probabilities (dpo, OLMoE) or on
    their means over an answer's tokens (dpo_norm, OLMoE-0125), with shards of --kind pairs; or KTO
    on single answers (kto), with shards of --kind labelled. The reference is the model that the run
    starts from."""
    preference_reference_load: LocalPath | None = None
    """Preferences: take the reference from this checkpoint (a run folder or a step_* folder), not
    from --load. Its log-probabilities are computed before training, then --load is read."""
    preference_beta: PositiveFloat = 0.1
    """Preferences: factor of log-probability ratios (OLMoE: 0.1 with dpo and kto, its successor: 5
    with dpo_norm)."""
    preference_label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """DPO: assumed fraction of pairs with the wrong order."""
    preference_desirable_weight: PositiveFloat = 1.0
    """KTO: weight of the losses of wanted answers. Times their number, it should be 1 to 4/3 of the
    same product of unwanted answers."""
    preference_undesirable_weight: PositiveFloat = 1.0
    """KTO: weight of the losses of unwanted answers."""
