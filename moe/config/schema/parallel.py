"""How the model and the batch are cut over ranks."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from moetron.moe.config.schema.field import Group
from moetron.moe.config.schema.roles import Role


class ParallelSettings(Group):
    """Layout: how the model and the batch are cut over ranks."""

    default_role = Role.TRAINING

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each matrix (TP)."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Pipeline stages (PP)."""
    num_layers_per_virtual_pipeline_stage: PositiveInt | None = None
    """Layers a virtual stage holds; fewer than a stage: interleaved pipeline."""
    pipeline_model_parallel_layout: str | None = None
    """What each stage holds, as Megatron writes it: Et*3|(tt|)*6tL (E: embedding, t: a layer,
    m: --mtp-num-layers, L: output layer and loss, |: next stage). More stages than ranks of the
    pipeline interleave."""
    decoder_first_pipeline_num_layers: PositiveInt | None = None
    """Layers of the first stage; unset: as many as the others."""
    decoder_last_pipeline_num_layers: PositiveInt | None = None
    """Layers of the last stage; unset: as many as the others."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer of the first stage, which then holds one less."""
    account_for_loss_in_pipeline_split: bool = False
    """Count output layer and loss as a layer of the last stage, which then holds one less."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share a layer's experts (EP)."""
    expert_tensor_parallel_size: PositiveInt | None = None
    """Ranks that share each expert's matrices (ETP); unset: the tensor-parallel size."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share a sequence (CP)."""
    sequence_parallel: bool | None = None
    """Shard norms and dropout along the sequence; unset: on when TP > 1. Without effect at TP 1."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer's state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather parameters while the forward pass runs (distributed optimizer)."""
    ddp_bucket_size: PositiveInt | None = None
    """Parameters whose gradients are reduced (or that are gathered) at once with an overlap; unset:
    40 million, or 1 million x data-parallel ranks if that is more."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Recompute activations in the backward pass: chosen modules, or whole layers."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Which layers full recomputation takes."""
    recompute_num_layers: PositiveInt | None = None
    """Layers in a recomputed unit (uniform) or of each stage (block; the modules of
    --mtp-num-layers stay out)."""
    recompute_modules: list[str] | None = None
    """What selective recomputation takes; unset: core_attn."""
    distributed_timeout_minutes: PositiveFloat = 10.0
    """How long a rank waits for the others."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: CUDA where there is a GPU (a driver with which CUDA does not start is
    refused), else the CPU."""
    cpu_threads: NonNegativeInt = 0
    """CPU threads of a rank; 0: OMP_NUM_THREADS, else usable cores / local ranks."""
