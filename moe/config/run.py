"""What the run does: batches, optimizer, learning rate, data, checkpoints, evaluation, logs."""

from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from moetron.moe.config.field import Group


class TrainingSettings(Group):
    """Length of the run and size of its batches."""

    train_iters: PositiveInt
    """Optimizer steps of the whole run."""
    micro_batch_size: PositiveInt
    """Samples a data-parallel rank takes through the model at once."""
    global_batch_size: PositiveInt
    """Samples of one optimizer step, over all ranks."""
    rampup_batch_size: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Batch-size ramp: start, increment, samples over which it grows to the global batch size."""
    seed: NonNegativeInt = 1234
    """Seed of initialisation, dropout and data order."""
    calculate_per_token_loss: bool = True
    """Mean over the real tokens of the global batch; otherwise the mean of micro-batch means."""
    exit_interval: PositiveInt | None = None
    """Stop, with a save and exit code 0, after a step divisible by this."""
    check_for_nan_in_loss_and_grad: bool = True
    """Stop with the step and rank named when a loss or gradient norm is not finite."""


class OptimizerSettings(Group):
    """The optimizer."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Kind of optimizer; adam is AdamW (decoupled weight decay)."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    sgd_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of sgd."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay."""
    decay_norms_and_biases: bool = False
    """Decay one-dimensional parameters too (OLMoE does; Megatron does not)."""
    clip_grad: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0: never."""


class LearningRateSettings(Group):
    """The learning rate as a pure function of the step or of the tokens seen."""

    lr: PositiveFloat
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD", "inverse-square-root"] = "cosine"
    """Shape after the warm-up."""
    lr_warmup_iters: NonNegativeInt | None = None
    """Steps of linear warm-up."""
    lr_warmup_tokens: NonNegativeInt | None = None
    """Tokens of linear warm-up (instead of steps)."""
    lr_warmup_init: NonNegativeFloat = 0.0
    """Learning rate at the start of the warm-up (OLMoE: a tenth of the peak)."""
    lr_decay_iters: PositiveInt | None = None
    """Step at which the decay has ended; unset: the last step."""
    lr_decay_tokens: PositiveInt | None = None
    """Tokens at which the decay has ended (instead of steps)."""
    lr_wsd_decay_iters: PositiveInt | None = None
    """WSD: steps of the final decay."""
    lr_wsd_decay_tokens: PositiveInt | None = None
    """WSD: tokens of the final decay (instead of steps)."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """WSD: shape of the final decay."""


Word = Annotated[str, Field(coerce_numbers_to_str=True)]
"""Part of a data path; a recipe may write weights as numbers."""


class StageSettings(Group):
    """A stage of the data: from the one before it (or the start) until a number of tokens."""

    data_path: list[Word]
    """As `data_path` of the data settings."""
    until_tokens: PositiveInt | None = None
    """Tokens of the run at which the next stage begins; left out for the last."""
    objective: Literal["causal", "ul2"] = "causal"
    """What samples ask of the model."""
    seed: NonNegativeInt | None = None
    """Seed of the order; unset: the run's, so that sources go on where the stage before stopped."""

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

    data_path: list[Word] | None = None
    """Training shards: PREFIX PREFIX ..., mixed in proportion to their size, or WEIGHT PREFIX
    WEIGHT PREFIX ... (a prefix is the path without .bin/.idx)."""
    objective: Literal["causal", "ul2"] = "causal"
    """What samples ask of the model: every next token, or OpenMoE's mixture of denoisers."""
    stages: list[StageSettings] | None = None
    """Instead of --data-path, mappings of data_path, until_tokens (all but the last), objective and
    seed: other sources, weights or objective from a number of tokens on."""
    max_epochs: PositiveFloat | None = None
    """Refuse a run that would go through a source more often than this, over all stages."""
    valid_data_path: list[Word] | None = None
    """Validation shards, written the same way."""
    mock_data: bool = False
    """Deterministic synthetic samples instead of shards."""
    tokenizer_model: str | None = None
    """A SentencePiece .model file, a HuggingFace tokenizer.json (or its folder), or 'bytes'."""
    num_workers: NonNegativeInt = 0
    """Processes that load samples beside each rank; 0: the rank itself."""
    eod_mask_loss: bool = False
    """No loss on end-of-document tokens."""


class CheckpointSettings(Group):
    """Saving and loading."""

    save: str | None = None
    """The run's folder: checkpoints, metrics.jsonl, TensorBoard."""
    load: str | None = None
    """A run's folder (its latest checkpoint) or one step_* folder to go on from."""
    save_interval: PositiveInt | None = None
    """Save every so many steps; the last step is always saved when --save is given."""
    keep_last: PositiveInt | None = None
    """Checkpoints to keep; unset: all."""
    async_save: bool = False
    """Train on while a copy in host memory (this rank's share) is being written."""
    finetune: bool = False
    """Load the weights alone: step 0, fresh optimizer, fresh data order."""
    reset_progress: bool = False
    """Load weights and optimizer, but begin at step 0 with a fresh data order (OLMoE's anneal)."""
    no_load_optim: bool = False
    """Do not load the optimizer's state."""
    no_load_rng: bool = False
    """Do not load random-number states."""


class ValidationSettings(Group):
    """Evaluation inside the run."""

    eval_interval: PositiveInt | None = None
    """Evaluate every so many steps; unset: only at the end."""
    eval_iters: NonNegativeInt = 10
    """Global batches of one evaluation; 0: none."""


class LoggingSettings(Group):
    """What is written down, and how often."""

    log_interval: PositiveInt = 1
    """Steps between progress lines (metrics.jsonl always has every step)."""
    tensorboard: bool = True
    """Write TensorBoard events below --save."""
    tensorboard_dir: str | None = None
    """Where; unset: SAVE/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project; unset: off."""
    peak_tflops_per_s: PositiveFloat | None = None
    """Peak of one rank, for MFU; unset: measured by a short GEMM on a CPU, a table on a GPU."""
