"""Parallel settings: partitioning of model and batch over ranks."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from moetron.moe.config.schema.field import Group
from moetron.moe.config.schema.roles import Role


class ParallelSettings(Group):
    """Partitioning of the model and the batch over ranks."""

    default_role = Role.TRAINING

    tensor_model_parallel_size: PositiveInt = 1
    """Tensor-parallel ranks (TP)."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Pipeline stages (PP)."""
    num_layers_per_virtual_pipeline_stage: PositiveInt | None = None
    """Layers per virtual stage; fewer than per stage: interleaved pipeline."""
    pipeline_model_parallel_layout: str | None = None
    """Contents of each stage in Megatron's notation: Et*3|(tt|)*6tL (E: embedding, t: a layer,
    m: --mtp-num-layers, L: output layer and loss, |: next stage). More stages than pipeline ranks
    interleave."""
    decoder_first_pipeline_num_layers: PositiveInt | None = None
    """Layers of the first stage; unset: as in other stages."""
    decoder_last_pipeline_num_layers: PositiveInt | None = None
    """Layers of the last stage; unset: as in other stages."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer of the first stage, which then has one layer less."""
    account_for_loss_in_pipeline_split: bool = False
    """Count output layer and loss as a layer of the last stage, which then has one layer less."""
    expert_model_parallel_size: PositiveInt = 1
    """Expert-parallel ranks (EP)."""
    expert_tensor_parallel_size: PositiveInt | None = None
    """Tensor-parallel ranks of each expert (ETP); unset: the tensor-parallel size."""
    context_parallel_size: PositiveInt = 1
    """Context-parallel ranks, each with a part of every sequence (CP)."""
    sequence_parallel: bool | None = None
    """Shard norms and dropout along the sequence; unset: on if TP > 1. No effect at TP 1."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap gradient reduction with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the parameter all-gather with the forward pass (distributed optimizer)."""
    ddp_bucket_size: PositiveInt | None = None
    """Parameters per bucket of overlapped reduction and gathering; unset: 40 million, or 1 million
    x data-parallel ranks if larger."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Recompute activations in the backward pass: of selected modules, or of full layers."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Layers of full recomputation: equal units, or the first layers of each stage."""
    recompute_num_layers: PositiveInt | None = None
    """Layers per recomputed unit (uniform) or per stage (block; the modules of --mtp-num-layers
    are not recomputed)."""
    recompute_modules: list[str] | None = None
    """Modules of selective recomputation; unset: core_attn."""
    distributed_timeout_minutes: PositiveFloat = 10.0
    """Timeout of collectives."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: CUDA if there is a GPU (a driver with which CUDA fails to start is refused),
    else the CPU."""
    cpu_threads: NonNegativeInt = 0
    """CPU threads per rank; 0: OMP_NUM_THREADS, else usable cores / local ranks."""
