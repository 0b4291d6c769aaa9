"""Rules on fused and overlapped operations, the implementation of experts and determinism."""

import os
from collections.abc import Iterator

from moetron.moe.config.rules.case import Case
from moetron.moe.config.rules.ffn import unaligned_experts
from moetron.moe.config.schema.derived import (
    expert_tensor_parallel_size,
    ffn_type,
    moe_layers,
    sequence_parallel,
)
from moetron.moe.config.schema.experts import MoESettings
from moetron.moe.config.schema.pipeline_split import virtual_pipeline_size

_FP8_ALIGNMENT = 16  # of widths, in numbers
_NOT_CAPTURED: dict[tuple[str, str], object] = {
    ("model", "attention_dropout"): 0.0,
    ("model", "hidden_dropout"): 0.0,
    ("model", "mtp_num_layers"): None,
    ("attention", "multi_latent_attention"): False,
    ("parallel", "recompute_granularity"): None,
    ("parallel", "overlap_param_gather"): False,
    ("precision", "fp8_format"): None,
    ("data", "bidirectional_prefix"): False,
    ("performance", "overlap_moe_expert_parallel_comm"): False,
    ("performance", "tp_comm_overlap"): False,
}
"""Settings that nobody has captured yet, or that graphs exclude, with the values to have."""
_CAPTURED = ("attn", "mlp")
_OF_ROUTERS = (
    "a replay would weight balance losses by the captured micro-batch's tokens, and the capture's "
    "own passes would be counted"
)
_NOT_IN_GRAPHS = {
    "moe_router": _OF_ROUTERS,
    "moe_preprocess": f"it needs moe_router, and {_OF_ROUTERS}",
    "moe": f"it includes the router: {_OF_ROUTERS}",
    "full_iteration": "the host decides in every step whether it updates the weights",
    "mamba": "there are no Mamba layers",
}
"""Scopes of --cuda-graph-scope that are refused, with the reason."""
_OVERLAP = "--overlap-moe-expert-parallel-comm"
_TP_OVERLAP = "--tp-comm-overlap"
_TP_COMPANIONS = (
    "tp_comm_overlap_cfg",
    "tp_comm_overlap_ag",
    "tp_comm_overlap_rs",
    "tp_comm_overlap_rs_dgrad",
    "tp_comm_bulk_dgrad",
    "tp_comm_bulk_wgrad",
    "tp_comm_bootstrap_backend",
)
_NEED_TRANSFORMER_ENGINE = ("moe_permute_fusion", "moe_router_fusion")
DETERMINISTIC_ENVIRONMENT = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
}
"""Variables of --deterministic-mode: accepted values, of which a run sets the first if unset."""


def fusions(case: Case) -> Iterator[str]:
    """Check fusions that are off by default; others are used where layers have their kernels."""
    chosen, settings = case.settings.performance, case.settings
    for name in _NEED_TRANSFORMER_ENGINE:
        if not getattr(chosen, name):
            continue
        if settings.moe.num_experts is None:
            yield f"{case.given(name)} needs --num-experts: add it or leave this out"
        elif not case.te_on_gpu:
            yield f"{case.given(name)} needs Transformer Engine on a GPU: leave it out"
    if chosen.moe_router_fusion and settings.moe.num_experts is not None:
        yield from _router(case, settings.moe)
    if chosen.cross_entropy_loss_fusion:
        yield from _cross_entropy(case)
    elif chosen.cross_entropy_fusion_impl != "native":
        yield f"{case.given('cross_entropy_fusion_impl')} needs --cross-entropy-loss-fusion: add it"
    if chosen.moe_router_padding_for_quantization:
        yield from _padding(case)


def _router(case: Case, moe: MoESettings) -> Iterator[str]:
    """Check routing that the fused kernels compute."""
    flag = "--moe-router-fusion"
    if moe.moe_router_type != "topk" or moe.moe_router_load_balancing_type == "sinkhorn":
        name = (
            "moe_router_type" if moe.moe_router_type != "topk" else "moe_router_load_balancing_type"
        )
        yield f"{flag} fuses plain top-k, not {case.given(name)}: leave it out"
    if moe.moe_router_dtype == "fp64":
        yield f"{flag} has no {case.given('moe_router_dtype')}: use fp32 or leave it out"
    counted = 1 if moe.moe_aux_loss_first_choice_only else moe.moe_router_topk
    if moe.moe_router_score_function == "sigmoid" and counted == 1 and moe.moe_aux_loss_coeff:
        # Transformer Engine's fused_score_for_moe_aux_loss.cu: only for more than one expert.
        yield (
            f"{flag} with {case.given('moe_router_score_function')} does not normalise the scores "
            "of a balance loss that counts one expert: leave it out"
        )


def _cross_entropy(case: Case) -> Iterator[str]:
    flag = "--cross-entropy-loss-fusion"
    if case.device == "cpu":
        yield f"{flag} needs a CUDA device: leave it out"
    elif case.settings.performance.cross_entropy_fusion_impl == "te":
        if not case.te:
            yield f"{case.given('cross_entropy_fusion_impl')} needs Transformer Engine: use native"
    elif not case.settings.precision.bf16:
        yield f"{flag} with --cross-entropy-fusion-impl native rounds gradients to bf16: use --bf16"
    if case.settings.training.deterministic_mode:
        yield f"{flag} is incompatible with --deterministic-mode (Megatron): drop one"


def _padding(case: Case) -> Iterator[str]:
    """Check padding of experts' tokens."""
    name = "moe_router_padding_for_quantization"
    if case.settings.moe.num_experts is None:
        yield f"{case.given(name)} needs --num-experts: add it or leave this out"
        return
    if case.local or case.settings.precision.fp8_format is None:
        yield (
            f"{case.given(name)} needs --fp8-format with Transformer Engine's layers: leave it out"
        )
    if case.settings.moe.moe_token_dispatcher_type == "allgather":
        yield f"{case.given(name)} needs --moe-token-dispatcher-type alltoall"
    if case.settings.moe.moe_pad_expert_input_to_capacity:
        yield (
            f"{case.given(name)} and --moe-pad-expert-input-to-capacity both pad: drop one of them"
        )


def offload(case: Case) -> Iterator[str]:
    """Check optimizer state on the CPU (Megatron-LM's arguments.py, HybridDeviceOptimizer)."""
    chosen, optimizer = case.settings.performance, case.settings.optimizer
    flag, fraction = "--optimizer-cpu-offload", "optimizer_offload_fraction"
    if not chosen.optimizer_cpu_offload:
        if chosen.optimizer_offload_fraction != 1:
            yield f"{case.given(fraction)} needs {flag}: add it"
        return
    if not optimizer.use_precision_aware_optimizer:
        yield f"{flag} needs --use-precision-aware-optimizer, whose code it shares: add it"
    if chosen.optimizer_offload_fraction > 1:
        yield f"{case.given(fraction)}: above 1: use a number in (0, 1]"
    for name in ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        if getattr(optimizer, name) != "fp32":
            yield f"{case.given(name)}: {flag} keeps all state in fp32: leave it out"


def graphs(case: Case) -> Iterator[str]:
    """Check CUDA graphs: what megatron-core asserts, and what nobody has captured yet."""
    chosen, settings = case.settings.performance, case.settings
    impl, scope = chosen.cuda_graph_impl, chosen.cuda_graph_scope
    if impl == "none":
        for name in ("cuda_graph_scope", "cuda_graph_warmup_steps"):
            if getattr(chosen, name) != type(chosen).model_fields[name].default:
                yield f"{case.given(name)} needs --cuda-graph-impl transformer_engine: add it"
        return
    flag = case.given("cuda_graph_impl")
    if impl == "local":
        yield f"{flag} is not supported: use transformer_engine"
    elif case.local or not case.te_on_gpu:
        yield f"{flag} needs Transformer Engine's layers on a GPU: leave it out"
    yield from _scope(case, scope or [])
    if not settings.precision.bf16:
        yield f"{flag} needs --bf16: megatron-core captures bf16 inputs"
    if settings.parallel.pipeline_model_parallel_size > 1:
        yield f"{flag} is not supported with --pipeline-model-parallel-size above 1: drop one"
    for (group, name), value in _NOT_CAPTURED.items():
        if getattr(getattr(settings, group), name) != value:
            yield f"{flag} is not supported with {case.given(name)}: drop one"


def _scope(case: Case, scope: list[str]) -> Iterator[str]:
    """Check the parts of a layer that are captured."""
    for name in scope:
        if name not in _CAPTURED:
            reason = _NOT_IN_GRAPHS.get(name, "unknown")
            yield f"--cuda-graph-scope {name}: {reason}: use attn or mlp"
    if "mlp" in scope and all(moe_layers(case.settings)):
        yield "--cuda-graph-scope mlp captures dense layers, and there are none: use attn"


def expert_overlap(case: Case) -> Iterator[str]:
    """Check the combined 1F1B schedule: what megatron-core asserts, and what it leaves out."""
    settings, parallel = case.settings, case.settings.parallel
    if not settings.performance.overlap_moe_expert_parallel_comm:
        for name in ("delay_wgrad_compute", "ep_overlap_early_attn_memory_release"):
            if getattr(settings.performance, name):
                yield f"{case.given(name)} needs {_OVERLAP}: add it"
        return
    if settings.moe.num_experts is None or parallel.expert_model_parallel_size == 1:
        yield f"{_OVERLAP} needs --expert-model-parallel-size above 1: leave it out"
        return
    if parallel.pipeline_model_parallel_size > 1 and virtual_pipeline_size(settings) is None:
        yield (
            f"{_OVERLAP} with {case.given('pipeline_model_parallel_size')} needs virtual stages: "
            "add --num-layers-per-virtual-pipeline-stage"
        )
    if not settings.precision.bf16:
        yield f"{_OVERLAP} needs --bf16 (megatron-core): add it"
    yield from _taken_apart(case)
    if settings.performance.delay_wgrad_compute:
        yield from _delayed(case)


def _taken_apart(case: Case) -> Iterator[str]:
    """Check layers that the schedule runs as attention, dispatch, experts and combine."""
    settings, moe, parallel = case.settings, case.settings.moe, case.settings.parallel
    refused = {
        "moe_token_dispatcher_type": moe.moe_token_dispatcher_type == "allgather",
        "moe_shared_expert_overlap": moe.moe_shared_expert_overlap,
        "moe_sequential_ffn_hidden_size": moe.moe_sequential_ffn_hidden_size is not None,
        "mtp_num_layers": settings.model.mtp_num_layers is not None,
        "recompute_granularity": parallel.recompute_granularity == "full",
    }
    for name, used in refused.items():
        if used:
            yield f"{_OVERLAP} is not supported with {case.given(name)}: drop one"
    if "moe" in (parallel.recompute_modules or []):
        yield f"{_OVERLAP} recomputes no full MoE layer: drop moe from --recompute-modules"
    if moe.moe_router_type == "hash":
        yield f"{_OVERLAP} needs weights with gradients, not {case.given('moe_router_type')}"
    if settings.model.hidden_dropout and sequence_parallel(parallel):
        yield (
            f"{_OVERLAP} with {case.given('hidden_dropout')} would drop the same values on all "
            "tensor ranks: use --tensor-model-parallel-size 1, or drop one"
        )
    if not any(moe_layers(settings)[-1:]):
        yield (
            f"{_OVERLAP}: megatron-core's schedule leaves out the final norm after a dense layer: "
            "give the last layer experts"
        )
    alone = moe.num_experts == parallel.expert_model_parallel_size
    if alone and expert_tensor_parallel_size(parallel) == 1:
        yield (
            f"{_OVERLAP} frees the tokens of a rank with a single expert before their backward "
            "pass: use a smaller --expert-model-parallel-size"
        )


def _delayed(case: Case) -> Iterator[str]:
    """Check weight gradients that wait."""
    flag, settings = "--delay-wgrad-compute", case.settings
    if case.local and settings.precision.fp8_format is not None:
        yield f"{flag} with {case.given('fp8_format')} needs Transformer Engine's layers: drop it"
    for name, used in (
        ("ffn_type", ffn_type(settings.model) == "double_gated"),
        ("moe_expert_multiplicative_bias", settings.moe.moe_expert_multiplicative_bias),
        ("moe_expert_dropout", settings.moe.moe_expert_dropout > 0),
    ):
        if used and case.experts_impl == "grouped_mm":
            yield f"{flag} is not supported with {case.given(name)}: drop it"


def tensor_overlap(case: Case) -> Iterator[str]:
    """Check the communication buffers of Transformer Engine (--tp-comm-overlap)."""
    settings, chosen = case.settings, case.settings.performance
    if not chosen.tp_comm_overlap:
        for name in _TP_COMPANIONS:
            if getattr(chosen, name) != type(chosen).model_fields[name].default:
                yield f"{case.given(name)} needs {_TP_OVERLAP}: add it"
        return
    if case.local or not case.te_on_gpu:
        yield f"{_TP_OVERLAP} needs Transformer Engine's layers on a GPU: leave it out"
    if not sequence_parallel(settings.parallel):
        yield (
            f"{_TP_OVERLAP} needs --tensor-model-parallel-size above 1 and sequence parallelism: "
            "leave it out"
        )
    if not settings.precision.bf16:
        yield f"{_TP_OVERLAP} needs --bf16: the buffers hold it"
    # megatron-core knows the buffers qkv, proj, fc1 and fc2; at a layer with another one it drops
    # the overlap of all following layers, with a warning.
    for name, used in (
        ("multi_latent_attention", settings.attention.multi_latent_attention),
        ("mtp_num_layers", settings.model.mtp_num_layers is not None),
    ):
        if used:
            yield f"{_TP_OVERLAP} has no buffers for {case.given(name)}: drop one"


def experts(case: Case) -> Iterator[str]:
    """Check the implementation of experts."""
    moe, chosen = case.settings.moe, case.settings.moe.moe_experts_impl
    if chosen == "auto":
        return
    flag = case.given("moe_experts_impl")
    if moe.num_experts is None:
        yield f"{flag} needs --num-experts: add it or leave this out"
        return
    if not moe.moe_grouped_gemm:
        yield f"{flag} needs --moe-grouped-gemm: drop --no-moe-grouped-gemm"
    if chosen == "te" and case.local:
        yield f"{flag} needs Transformer Engine's layers on a GPU: use auto or grouped_mm"
    if chosen == "grouped_mm":
        if case.local or case.settings.precision.fp8_format is None:
            yield from unaligned_experts(case, "moe_experts_impl")
        else:
            yield from _scaled_experts(case)


def _scaled_experts(case: Case) -> Iterator[str]:
    """Check FP8 experts with one stacked weight, which have one current scale a row."""
    precision = case.settings.precision
    flags = case.given("moe_experts_impl", "fp8_format")
    if precision.fp8_recipe != "tensorwise":
        yield (
            f"{flags} needs --fp8-recipe tensorwise, not {precision.fp8_recipe}: use it, or "
            "--moe-experts-impl te"
        )
    if not precision.bf16:
        yield f"{flags} needs --bf16: add it"
    yield from unaligned_experts(case, "moe_experts_impl", _FP8_ALIGNMENT)


def determinism(case: Case) -> Iterator[str]:
    """Check the environment of --deterministic-mode (as Megatron-LM's arguments.py does)."""
    if not case.settings.training.deterministic_mode or case.device == "cpu":
        return
    for name, accepted in DETERMINISTIC_ENVIRONMENT.items():
        present = os.environ.get(name)
        if present not in (None, *accepted):
            yield (
                f"--deterministic-mode: {name}={present} in the environment must be "
                f"{' or '.join(accepted)}: unset it, and the run sets {accepted[0]}"
            )


RULES = (fusions, offload, graphs, expert_overlap, tensor_overlap, experts, determinism)
