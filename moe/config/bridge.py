"""Conversion of Settings to megatron-core's configurations. The only module here with torch."""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from moetron.moe.config.schema import derived, pipeline_split
from moetron.moe.config.schema.experts import EVEN_WEIGHTS
from moetron.moe.config.schema.field import Group
from moetron.moe.config.schema.model import ModelSettings
from moetron.moe.config.schema.precision import PrecisionSettings
from moetron.moe.config.schema.settings import Settings
from moetron.moe.megatron.version_differences import captured_modules

_FORMATS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.uint8,  # Transformer Engine's name for it
}
"""Formats of optimizer state."""

padded_vocab_size = derived.padded_vocab_size


@dataclass
class ModelConfig(TransformerConfig):
    """megatron-core's model configuration with the fields of our own modules."""

    moe_eval_capacity_factor: float | None = None
    moe_minimum_capacity: int = 0
    moe_capacity_includes_topk: bool = True
    norm_affine: bool = True
    double_gated: bool = False
    moe_expert_multiplicative_bias: bool = False
    moe_expert_dropout: float = 0.0
    router_init_method: Callable[[torch.Tensor], torch.Tensor] | None = None
    """None: ``init_method``."""
    moe_capacity_scope: Literal["rank", "micro_batch", "sequence"] = "micro_batch"
    moe_global_aux_loss_counts: Literal["running", "previous_step"] = "running"
    moe_aux_loss_first_choice_only: bool = False
    moe_noisy_load_loss: bool = False
    moe_router_type: str = "topk"
    moe_expert_choice_eval: Literal["expert_choice", "topk"] = "expert_choice"
    moe_second_expert_threshold: float = 0.2
    moe_router_temperature: float = 1.0
    moe_router_final_temperature: float = 0.1
    moe_router_anneal_samples: int | None = None
    routing_seed: int = 0
    output_z_loss_coeff: float | None = None
    label_smoothing: float = 0.0
    moe_encoder_capacity_factor: float | None = None
    moe_encoder_eval_capacity_factor: float | None = None


@dataclass
class LatentModelConfig(ModelConfig, MLATransformerConfig):
    """ModelConfig with latent attention."""


def params_dtype(settings: Settings) -> torch.dtype:
    """Return the dtype of parameters, activations and pipeline communication."""
    return torch.bfloat16 if settings.precision.bf16 else torch.float32


def draw_weight_(weight: torch.Tensor, std: float, cutoff: float | None) -> torch.Tensor:
    """Fill ``weight`` in place from N(0, std^2), truncated at +-``cutoff`` x std if given.

    Samples in fp32 and casts: torch's truncated normal is coarse in bf16, and a bf16 run starts
    from the rounded weights of an fp32 run of the same seed.
    """
    drawn = torch.empty_like(weight, dtype=torch.float32)
    if cutoff is None:
        torch.nn.init.normal_(drawn, 0.0, std)
    else:
        torch.nn.init.trunc_normal_(drawn, 0.0, std, -cutoff * std, cutoff * std)
    with torch.no_grad():
        return weight.copy_(drawn)


def draw_scaled_(weight: torch.Tensor, scale: float, ranks: int) -> torch.Tensor:
    """Fill ``weight`` from N(0, scale / inputs); ``ranks`` shard its inputs, the last axis."""
    return draw_weight_(weight, math.sqrt(scale / (weight.shape[-1] * ranks)), None)


def init_method(
    model: ModelSettings, shrink: float = 1.0, ranks: int = 1
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the in-place initialiser of a matrix.

    Args:
        model: settings with the distribution.
        shrink: divisor of the standard deviation.
        ranks: number of tensor-parallel ranks that shard the matrix's inputs.
    """
    if model.init_method == "variance_scaling":
        scale = model.init_method_scale / shrink**2
        return functools.partial(draw_scaled_, scale=scale, ranks=ranks)
    cutoff = model.init_method_cutoff if model.init_method == "truncated_normal" else None
    return functools.partial(draw_weight_, std=model.init_method_std / shrink, cutoff=cutoff)


def _initialisation(settings: Settings) -> dict[str, Any]:
    model, router_std = settings.model, settings.moe.moe_router_init_method_std
    ranks = settings.parallel.tensor_model_parallel_size
    shrink = math.sqrt(2 * model.num_layers) if model.scaled_output_init else 1.0
    embedding: Callable[[torch.Tensor], torch.Tensor]
    if model.embedding_init_method_std is not None or model.init_method == "variance_scaling":
        std = model.embedding_init_method_std or model.init_method_std
        embedding = functools.partial(draw_weight_, std=std, cutoff=None)
    else:
        embedding = init_method(model)
    router = functools.partial(draw_weight_, std=router_std, cutoff=None) if router_std else None
    return {
        "init_method": init_method(model),
        "init_method_std": model.init_method_std,
        "embedding_init_method": embedding,
        "embedding_init_method_std": None,  # part of embedding_init_method
        "output_layer_init_method": init_method(model, shrink, ranks),
        "router_init_method": router,
        "use_cpu_initialization": False,
    }


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """Return GELU's tanh approximation: T5 1.1's, also in Mesh TensorFlow and flaxformer."""
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS = {
    "swiglu": F.silu,
    "double_gated": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
}


def same_names(group: Group, config: type[ModelConfig]) -> dict[str, Any]:
    """Return the settings of a group that ``config`` has fields of the same name for."""
    known = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in group if name in known}


def _blocks(model: ModelSettings) -> dict[str, Any]:
    return {
        "num_query_groups": derived.query_groups(model),
        "kv_channels": derived.head_dim(model),
        "ffn_hidden_size": derived.dense_ffn_size(model),
        "layernorm_epsilon": model.norm_epsilon,
        # megatron-core sums the gradients of what it calls qk_layernorm over tensor ranks: right
        # for a norm per head, wrong for a full-width norm, of which each rank holds a part.
        "qk_layernorm": model.qk_layernorm and model.qk_layernorm_scope == "head",
        "gated_linear_unit": derived.ffn_inner_matrices(model) > 1,
        "double_gated": derived.ffn_type(model) == "double_gated",
        "activation_func": _ACTIVATIONS[derived.ffn_type(model)],
        "attention_backend": (
            AttnBackend.unfused if model.attention_backend == "unfused" else AttnBackend.auto
        ),
        "transformer_impl": ModelConfig.transformer_impl,  # ours has other values
    }


def _fusions(settings: Settings, transformer_engine: bool) -> dict[str, Any]:
    """Return the fusions in effect: those that are on by default need layers with such kernels."""
    model, chosen = settings.model, settings.performance
    plain_rope = not settings.attention.multi_latent_attention and (
        settings.attention.rope_type != "yarn"  # its scale of channels is not fused
    )
    return {
        # For other activations megatron-core has no fusion with the token's probability.
        "bias_activation_fusion": (
            transformer_engine and chosen.bias_swiglu_fusion and derived.ffn_type(model) == "swiglu"
        ),
        "bias_dropout_fusion": transformer_engine and chosen.bias_dropout_fusion,
        "apply_rope_fusion": transformer_engine and chosen.rope_fusion and plain_rope,
        "masked_softmax_fusion": chosen.masked_softmax_fusion and _has_fused_softmax(),
        "gradient_accumulation_fusion": transformer_engine and chosen.gradient_accumulation_fusion,
    }


def _graphs(settings: Settings) -> dict[str, Any]:
    """Return what is captured; an empty scope would be all of a layer."""
    chosen = settings.performance
    captures = chosen.cuda_graph_impl != "none"
    return captured_modules((chosen.cuda_graph_scope or ["attn"]) if captures else [])


def _has_fused_softmax() -> bool:
    """Return whether apex's kernels, which megatron-core imports at first use, are present."""
    names = ("scaled_upper_triang_masked_softmax_cuda", "scaled_masked_softmax_cuda")
    found = all(importlib.util.find_spec(name) is not None for name in names)
    return found and torch.cuda.is_available()


def _experts(settings: Settings) -> dict[str, Any]:
    moe = settings.moe
    balance = moe.moe_router_load_balancing_type
    noisy_load = balance == "noisy_load"
    return {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(has_experts) for has_experts in derived.moe_layers(settings)],
        "moe_ffn_hidden_size": derived.expert_ffn_size(settings),
        # megatron-core refuses a softmax over one expert; these routers have none.
        "moe_router_pre_softmax": moe.moe_router_pre_softmax or moe.moe_router_type in EVEN_WEIGHTS,
        # megatron-core does not know noisy top-k's own losses.
        "moe_router_load_balancing_type": "none" if noisy_load else balance,
        "moe_noisy_load_loss": noisy_load,
        "routing_seed": settings.training.seed,
        "moe_router_dtype": None if moe.moe_router_dtype == "params" else moe.moe_router_dtype,
    }


def _layout(settings: Settings) -> dict[str, Any]:
    parallel = settings.parallel
    rounds = pipeline_split.virtual_pipeline_size(settings)
    interleaved = rounds is not None
    return {
        "sequence_parallel": derived.sequence_parallel(parallel),
        "virtual_pipeline_model_parallel_size": rounds,
        "pipeline_model_parallel_layout": pipeline_split.megatron_layout(settings),
        "account_for_embedding_in_pipeline_split": False,  # part of the layout
        "account_for_loss_in_pipeline_split": False,
        "expert_tensor_parallel_size": derived.expert_tensor_parallel_size(parallel),
        # With megatron-core's defaults an interleaved pipeline of two stages batches two sends
        # between one pair of ranks, which change places: gradients would be silently wrong.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "deallocate_pipeline_outputs": parallel.pipeline_model_parallel_size > 1,
    }


def _fp8(precision: PrecisionSettings) -> dict[str, Any]:
    return {"fp8": precision.fp8_format, "fp8_param": precision.fp8_param_gather}


def transformer_config(settings: Settings, transformer_engine: bool = False) -> ModelConfig:
    """Return megatron-core's model configuration of settings that passed ``checks.problems``.

    ``transformer_engine``: whether its layers run, with its FP8. The local implementation emulates
    FP8 without megatron-core.
    """
    dtype = params_dtype(settings)
    fp8 = transformer_engine and settings.precision.fp8_format is not None
    kind = LatentModelConfig if settings.attention.multi_latent_attention else ModelConfig
    groups: list[Group] = [
        settings.model,
        settings.attention,
        settings.parallel,
        settings.performance,
    ]
    values = {
        **_blocks(settings.model),
        **_fusions(settings, transformer_engine),
        **_graphs(settings),
        **_initialisation(settings),
        **_layout(settings),
    }
    if settings.moe.num_experts is not None:  # without experts megatron-core refuses their width
        groups.append(settings.moe)
        values |= _experts(settings)
    if fp8:
        groups.append(settings.precision)
        values |= _fp8(settings.precision)
    carried = {name: value for group in groups for name, value in same_names(group, kind).items()}
    values |= {
        "bf16": settings.precision.bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "calculate_per_token_loss": settings.training.calculate_per_token_loss,
        # A CPU repeats every bit anyway, and the embedding's other form would change some.
        "deterministic_mode": settings.training.deterministic_mode and torch.cuda.is_available(),
    }
    return kind(**carried | values)


def optimizer_config(settings: Settings) -> OptimizerConfig:
    """Return megatron-core's optimizer configuration, without per-parameter overrides.

    It lacks Adafactor, and its Muon needs a package that PyPI does not have: stateless SGD is their
    placeholder.
    """
    optimizer = settings.optimizer
    is_ours = optimizer.optimizer in ("adafactor", "muon")
    return OptimizerConfig(
        optimizer="sgd" if is_ours else optimizer.optimizer,
        lr=settings.learning_rate.lr,
        min_lr=settings.learning_rate.min_lr,
        weight_decay=optimizer.weight_decay,
        apply_wd_to_qk_layernorm=optimizer.decay_norms_and_biases,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        sgd_momentum=0.0 if is_ours else optimizer.sgd_momentum,
        clip_grad=optimizer.clip_grad,
        bf16=settings.precision.bf16,
        params_dtype=params_dtype(settings),
        use_distributed_optimizer=settings.parallel.use_distributed_optimizer,
        overlap_param_gather=settings.parallel.overlap_param_gather,
        fp8_recipe=settings.precision.fp8_recipe if settings.precision.fp8_param_gather else None,
        use_precision_aware_optimizer=optimizer.use_precision_aware_optimizer,
        main_grads_dtype=_FORMATS[optimizer.main_grads_dtype],
        main_params_dtype=_FORMATS[optimizer.main_params_dtype],
        exp_avg_dtype=_FORMATS[optimizer.exp_avg_dtype],
        exp_avg_sq_dtype=_FORMATS[optimizer.exp_avg_sq_dtype],
        optimizer_cpu_offload=settings.performance.optimizer_cpu_offload,
        optimizer_offload_fraction=settings.performance.optimizer_offload_fraction,
        pin_cpu_grads=torch.cuda.is_available(),  # elsewhere torch has no such memory
    )


def ddp_config(settings: Settings) -> DistributedDataParallelConfig:
    """Return the gradient reduction's configuration; the training loop does finite checks."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=settings.precision.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=settings.parallel.overlap_grad_reduce,
        overlap_param_gather=settings.parallel.overlap_param_gather,
        bucket_size=settings.parallel.ddp_bucket_size,
        use_distributed_optimizer=settings.parallel.use_distributed_optimizer,
        fp8_param_gather=settings.precision.fp8_param_gather,
        check_for_nan_in_grad=False,
        delay_wgrad_compute=settings.performance.delay_wgrad_compute,
    )
