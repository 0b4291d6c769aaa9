"""What the run does: batches, optimizer, learning rate, checkpoints, evaluation, logs."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from moetron.moe.config.schema.field import Group
from moetron.moe.config.schema.paths import LocalPath
from moetron.moe.config.schema.roles import Function, Role, Unexported


class TrainingSettings(Group):
    """Length of the run and size of its batches."""

    default_role = Role.TRAINING

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

    default_role = Role.TRAINING

    optimizer: Function[Unexported[Literal["adam", "sgd", "adafactor", "muon"]]] = "adam"
    """Kind of optimizer; adam is AdamW (decoupled weight decay); adafactor has factored moments,
    no momentum, and steps relative to a parameter's size (T5, ST-MoE, OpenMoE); muon moves hidden
    matrices by orthogonal updates, vocabulary matrices and vectors by AdamW (Moonlight)."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """muon: momentum (Nesterov's)."""
    muon_num_ns_steps: PositiveInt = 5
    """muon: Newton-Schulz iterations that orthogonalise an update."""
    muon_extra_scale_factor: PositiveFloat = 0.2
    """muon: multiplies updates, beside the root of the longer side (0.2: as large as AdamW's)."""
    adafactor_decay_rate: PositiveFloat = 0.8
    """adafactor: the second moment's decay at step t is 1 - t^-rate."""
    adafactor_clip_threshold: PositiveFloat = 1.0
    """adafactor: largest root mean square of an update before the learning rate (ST-MoE's trial of
    tighter clipping: 0.1)."""
    adafactor_min_dim_size_to_factor: PositiveInt = 128
    """adafactor: rows and columns from which a matrix's second moment is factored."""
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
    router_lr_mult: NonNegativeFloat = 1.0
    """Multiplies the learning rate of routers; 0 freezes them."""
    router_wd_mult: NonNegativeFloat = 1.0
    """Multiplies the weight decay of routers."""
    expert_lr_mult: NonNegativeFloat = 1.0
    """Multiplies the learning rate of routed experts; 0 freezes them."""
    expert_wd_mult: NonNegativeFloat = 1.0
    """Multiplies the weight decay of routed experts."""
    clip_grad: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0: never."""


class LearningRateSettings(Group):
    """The learning rate as a pure function of the step or of the tokens seen."""

    default_role = Role.TRAINING

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


class CheckpointSettings(Group):
    """Saving and loading."""

    default_role = Role.RUN

    save: LocalPath | None = None
    """The run's folder: checkpoints, metrics.jsonl, TensorBoard."""
    load: LocalPath | None = None
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

    default_role = Role.RUN

    eval_interval: PositiveInt | None = None
    """Evaluate every so many steps; unset: only at the end."""
    eval_iters: NonNegativeInt = 10
    """Global batches of one evaluation; 0: none."""


class LoggingSettings(Group):
    """What is written down, and how often."""

    default_role = Role.RUN

    log_interval: PositiveInt = 1
    """Steps between progress lines (metrics.jsonl always has every step)."""
    tensorboard: bool = True
    """Write TensorBoard events below --save."""
    tensorboard_dir: LocalPath | None = None
    """Where; unset: SAVE/tensorboard."""
    expert_load_interval: PositiveInt = 100
    """Steps between histograms and heat maps of every expert's load in TensorBoard and W&B."""
    wandb_project: str | None = None
    """Weights & Biases project; unset: off."""
    wandb_entity: str | None = None
    """Weights & Biases user or team; unset: your default one."""
    wandb_exp_name: str | None = None
    """Name of the run on Weights & Biases; unset: the name of the --save folder."""
    peak_tflops_per_s: PositiveFloat | None = None
    """Peak of one rank, for MFU; unset: measured by a short GEMM on a CPU, a table on a GPU."""
