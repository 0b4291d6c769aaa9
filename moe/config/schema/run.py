"""Run settings: batches, optimizer, learning rate, checkpoints, evaluation, logging, profiling."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from moetron.moe.config.schema.field import Group
from moetron.moe.config.schema.paths import LocalPath
from moetron.moe.config.schema.roles import Function, Role, Unexported


class TrainingSettings(Group):
    """Length of the run and batch sizes."""

    default_role = Role.TRAINING

    train_iters: PositiveInt
    """Optimizer steps of the run."""
    micro_batch_size: PositiveInt
    """Samples per data-parallel rank and forward pass."""
    global_batch_size: PositiveInt
    """Samples per optimizer step, over all ranks."""
    rampup_batch_size: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Batch-size ramp: start, increment, and samples until the global batch size is reached."""
    seed: NonNegativeInt = 1234
    """Seed of initialisation, dropout and data order."""
    deterministic_mode: bool = False
    """Use only deterministic algorithms: a run repeats bit for bit on a GPU too, but is slower."""
    calculate_per_token_loss: bool = True
    """Average the loss over the real tokens of the global batch; otherwise average micro-batch
    means."""
    exit_interval: PositiveInt | None = None
    """Save and exit with code 0 after a step divisible by this."""
    check_for_nan_in_loss_and_grad: bool = True
    """Look for losses and gradient norms that are not finite: --spike-policy says what follows."""


class OptimizerSettings(Group):
    """Optimizer and its hyperparameters."""

    default_role = Role.TRAINING

    optimizer: Function[Unexported[Literal["adam", "sgd", "adafactor", "muon"]]] = "adam"
    """Optimizer: adam is AdamW (decoupled weight decay); adafactor has factored moments, no
    momentum, and steps relative to a parameter's size (T5, ST-MoE, OpenMoE); muon updates hidden
    matrices orthogonally, vocabulary matrices and vectors by AdamW (Moonlight)."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """muon: Nesterov momentum."""
    muon_num_ns_steps: PositiveInt = 5
    """muon: Newton-Schulz iterations that orthogonalise an update."""
    muon_extra_scale_factor: PositiveFloat = 0.2
    """muon: factor of updates, in addition to sqrt(longer side) (0.2: the size of AdamW's)."""
    adafactor_decay_rate: PositiveFloat = 0.8
    """adafactor: decay of the second moment at step t is 1 - t^-rate."""
    adafactor_clip_threshold: PositiveFloat = 1.0
    """adafactor: largest root mean square of an update before the learning rate (ST-MoE's tighter
    clipping: 0.1)."""
    adafactor_min_dim_size_to_factor: PositiveInt = 128
    """adafactor: minimum rows and columns of a matrix with a factored second moment."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW: decay of the first moment."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW: decay of the second moment."""
    adam_eps: PositiveFloat = 1e-8
    """AdamW: epsilon added to the root of the second moment."""
    sgd_momentum: float = Field(default=0.9, ge=0, lt=1)
    """sgd: momentum."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay."""
    decay_norms_and_biases: bool = False
    """Apply weight decay to one-dimensional parameters too (OLMoE does; Megatron does not)."""
    router_lr_mult: NonNegativeFloat = 1.0
    """Learning-rate factor of routers; 0 freezes them."""
    router_wd_mult: NonNegativeFloat = 1.0
    """Weight-decay factor of routers."""
    expert_lr_mult: NonNegativeFloat = 1.0
    """Learning-rate factor of routed experts; 0 freezes them."""
    expert_wd_mult: NonNegativeFloat = 1.0
    """Weight-decay factor of routed experts."""
    clip_grad: NonNegativeFloat = 1.0
    """Maximum global gradient norm; 0: no clipping."""
    use_precision_aware_optimizer: bool = False
    """Let Transformer Engine's AdamW hold main parameters and moments, in the formats below and
    main parameters as bfloat16 weights and 16 further bits."""
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision-aware optimizer: format of gradients."""
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    """Precision-aware optimizer: format of main parameters."""
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """Precision-aware optimizer: format of first moments (computation remains fp32)."""
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """Precision-aware optimizer: format of second moments (computation remains fp32)."""


class LearningRateSettings(Group):
    """Learning-rate schedule, by steps or by tokens."""

    default_role = Role.TRAINING

    lr: PositiveFloat
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD", "inverse-square-root"] = "cosine"
    """Shape of the decay after the warm-up."""
    lr_warmup_iters: NonNegativeInt | None = None
    """Steps of linear warm-up."""
    lr_warmup_tokens: NonNegativeInt | None = None
    """Tokens of linear warm-up (in place of steps)."""
    lr_warmup_init: NonNegativeFloat = 0.0
    """Learning rate at the start of the warm-up (OLMoE: a tenth of the peak)."""
    lr_decay_iters: PositiveInt | None = None
    """Step at which the decay ends; unset: the last step."""
    lr_decay_tokens: PositiveInt | None = None
    """Tokens at which the decay ends (in place of steps)."""
    lr_wsd_decay_iters: PositiveInt | None = None
    """WSD: steps of the final decay."""
    lr_wsd_decay_tokens: PositiveInt | None = None
    """WSD: tokens of the final decay (in place of steps)."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """WSD: shape of the final decay."""


class CheckpointSettings(Group):
    """Checkpoint saving and loading."""

    default_role = Role.RUN

    save: LocalPath | None = None
    """Run folder: checkpoints, metrics.jsonl, TensorBoard."""
    load: LocalPath | None = None
    """Checkpoint to load: a run folder (its latest checkpoint) or one step_* folder."""
    load_fallback: bool = False
    """If checkpoints of --load are damaged, take the newest sound one and say what is wrong with
    the others."""
    save_interval: PositiveInt | None = None
    """Steps between saves; with --save, the last step is always saved."""
    keep_last: PositiveInt | None = None
    """Number of checkpoints to keep; unset: all."""
    save_retain_interval: PositiveInt | None = None
    """Also keep checkpoints of steps divisible by this; without --keep-last, only the last one is
    kept besides them."""
    max_failed_saves: PositiveInt = 3
    """Failed saves in a row (disk full, storage down) after which the run ends; before, it
    continues and tries again at the next save."""
    async_save: bool = False
    """Continue training while checkpoints are written from a copy in host memory (this rank's
    shard)."""
    finetune: bool = False
    """Load only the weights: step 0, new optimizer state, new data order."""
    reset_progress: bool = False
    """Load weights and optimizer, but start at step 0 with a new data order (OLMoE's anneal)."""
    no_load_optim: bool = False
    """Do not load optimizer state."""
    no_load_rng: bool = False
    """Do not load random-number generator states."""


class HealthSettings(Group):
    """Checks of losses, gradients, replicas and experts; events go to SAVE/events.jsonl."""

    default_role = Role.TRAINING

    spike_policy: Literal["warn", "skip", "stop", "rollback"] = "warn"
    """At a spike of loss or gradient norm: warn, skip the update, stop, or roll back to a
    checkpoint and leave out the samples since. Values that are not finite stop a run under warn."""
    spike_window: int = Field(default=128, ge=4)
    """Steps whose mean and deviation a loss or gradient norm is compared with (from half of them
    on)."""
    spike_threshold: PositiveFloat = 6.0
    """Standard deviations above the mean that make a spike."""
    spike_grad_norm_ratio: PositiveFloat = 5.0
    """A gradient norm is a spike only above this multiple of the mean: norms have heavy tails."""
    spike_max_skips: PositiveInt = 10
    """skip: updates skipped in a row before the run stops."""
    spike_max_rollbacks: PositiveInt = 3
    """rollback: rollbacks of a run before it stops."""
    spike_rollback_checkpoints: PositiveInt = 1
    """rollback: checkpoints to go back; 1 is the latest. Later ones are deleted."""
    rerun_mode: Literal["disabled", "validate_results", "report_determinism_stats"] = "disabled"
    """Run the passes of a step with bad values again, on the same data, to tell a faulty device
    from bad data (validate_results; exit codes 16 and 17 as Megatron), or those of every step, to
    measure how far two runs differ (report_determinism_stats)."""
    rerun_tolerance: NonNegativeFloat = 0.01
    """Relative difference of losses and gradient norms up to which two runs of a step count as the
    same; with --deterministic-mode 0 is right."""
    error_injection_rate: NonNegativeInt = 0
    """Drill of --rerun-mode validate_results: inject an error once in this many steps and ranks, at
    random; 0: none."""
    error_injection_type: Literal["correct_result", "transient_error", "persistent_error"] = (
        "transient_error"
    )
    """Drill: what the reruns are made to find."""
    check_weight_hash_across_dp_replicas_interval: PositiveInt | None = None
    """Steps between comparisons of parameter hashes over data-parallel replicas; a difference names
    the ranks and stops the run."""
    expert_alarm_steps: PositiveInt | None = 200
    """Consecutive steps after which an expert without tokens, or a bound below that is exceeded,
    raises an alarm; null: no alarms."""
    expert_alarm_load: PositiveFloat = 4.0
    """Alarm: load of a layer's fullest expert over the mean load above this."""
    expert_alarm_max_violation: PositiveFloat = 3.0
    """Alarm: MaxVio, the mean over layers of (fullest expert over mean load) - 1, above this."""
    expert_alarm_entropy: float = Field(default=0.5, ge=0, lt=1)
    """Alarm: entropy of a layer's choices below this, 0: the same top-k experts for every token, 1:
    uniform load."""
    expert_alarm_bias_range: PositiveFloat = 1.0
    """Alarm: range of a layer's expert biases above this; scores have a range of 1."""


class ValidationSettings(Group):
    """Evaluation during training."""

    default_role = Role.RUN

    eval_interval: PositiveInt | None = None
    """Steps between evaluations; unset: only at the end."""
    eval_iters: NonNegativeInt = 10
    """Global batches per evaluation, of windows spread evenly over all validation shards; more than
    there are: each window once; 0: no evaluation."""
    skip_train: bool = False
    """Evaluate the checkpoint of --load and stop: no step is trained, no checkpoint is saved. With
    --finetune the line of validation.jsonl in --save is that of step 0, before a run that starts
    there."""


class LoggingSettings(Group):
    """Logging, TensorBoard and Weights & Biases."""

    default_role = Role.RUN

    log_interval: PositiveInt = 1
    """Steps between progress lines (metrics.jsonl always has every step)."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    tensorboard_dir: LocalPath | None = None
    """Folder of TensorBoard events; unset: SAVE/tensorboard."""
    expert_load_interval: PositiveInt = 100
    """Steps between histograms and heat maps of expert load in TensorBoard and W&B."""
    wandb_project: str | None = None
    """Weights & Biases project; unset: off."""
    wandb_entity: str | None = None
    """Weights & Biases user or team; unset: your default."""
    wandb_exp_name: str | None = None
    """Weights & Biases run name; unset: the name of the --save folder."""
    peak_tflops_per_s: PositiveFloat | None = None
    """Peak TFLOP/s of one rank, for MFU; unset: from a short GEMM on a CPU, a table on a GPU."""


class ProfilingSettings(Group):
    """Profiles of single steps, and the collection of Python's garbage."""

    default_role = Role.RUN

    profile: bool = False
    """Profile some steps on some ranks: for Nsight Systems (nsys profile --capture-range
    cudaProfilerApi), or with --use-pytorch-profiler."""
    profile_step_start: NonNegativeInt = 10
    """Steps before the first profiled one."""
    profile_step_end: PositiveInt = 12
    """Last profiled step."""
    profile_ranks: list[NonNegativeInt] = [0]
    """Ranks that profile, or record memory."""
    use_pytorch_profiler: bool = False
    """Write a Chrome trace to SAVE/profile, for TensorBoard or Perfetto; also on a CPU."""
    nvtx_ranges: bool = False
    """Name the parts of a step in profiles: passes, update, attention, router, exchange of tokens,
    experts."""
    record_memory_history: bool = False
    """Record every allocation on a GPU, up to the last profiled step or an error."""
    memory_snapshot_path: LocalPath = "snapshot.pickle"
    """File of the record of memory, below SAVE/profile; the rank's number is added."""
    manual_gc: bool = False
    """Collect Python's garbage only at given steps, at the same time on all ranks, instead of
    whenever many objects were made."""
    manual_gc_interval: NonNegativeInt = 0
    """Steps between collections with --manual-gc; 0: none."""


class WatchSettings(Group):
    """Hanging and slow ranks."""

    default_role = Role.RUN

    watchdog_seconds: NonNegativeFloat = 60.0
    """Seconds that a step may last beyond the longest recent one; then the ranks that hold up the
    job are named. 0: no watchdog."""
    watchdog_startup_seconds: PositiveFloat = 1800.0
    """Seconds that the watchdog allows for building, loading and the first step."""
    watchdog_save_seconds: PositiveFloat = 1800.0
    """Seconds that the watchdog allows for a save, a load or an evaluation."""
    watchdog_action: Literal["stop", "warn"] = "stop"
    """End the job when something hangs (exit code 76), or warn and wait on."""
    log_straggler: bool = False
    """Measure how long each rank computes, without its waits for others, and name a slow one."""
    log_straggler_interval: PositiveInt = 100
    """Steps between reports of --log-straggler."""
    log_straggler_ratio: float = Field(default=1.3, gt=1)
    """Ratio to the median rank's time above which --log-straggler names a rank."""
