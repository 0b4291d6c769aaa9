"""Rules on FP8."""

from collections.abc import Iterator

from moetron.moe.config.rules.case import Case
from moetron.moe.config.schema import derived

_DELAYED_ONLY = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
_PREFIXES = ("fp8_", "first_last_", "num_layers_at_")
_FP8_WIDTH = 16
_HOLD_LINEAR_LAYERS = {"mlp", "moe", "shared_experts"}


def fp8(case: Case) -> Iterator[str]:
    """Check FP8 flags, and layers that stay in bfloat16."""
    precision, parallel = case.settings.precision, case.settings.parallel
    changed = [
        name
        for name, field in type(precision).model_fields.items()
        if name.startswith(_PREFIXES) and getattr(precision, name) != field.default
    ]
    if precision.fp8_format is None:
        for name in changed:
            yield f"{case.given(name)} has no effect without --fp8-format: add it or leave it out"
        return
    if precision.fp8_recipe != "delayed":
        for name in changed:
            if name in _DELAYED_ONLY:
                yield f"{case.given(name)} is for --fp8-recipe delayed: leave it out"
    if not precision.first_last_layers_bf16:
        return
    if precision.fp8_recipe == "delayed":
        yield (
            "--first-last-layers-bf16 is incompatible with --fp8-recipe delayed (megatron-core): "
            "use --fp8-recipe tensorwise, blockwise or mxfp8"
        )
    layers = case.settings.model.num_layers // parallel.pipeline_model_parallel_size
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if getattr(precision, name) > layers:
            yield (
                f"{case.given(name)} exceeds the {layers} layers of a pipeline stage: "
                f"use at most {layers}"
            )


def parameters(case: Case) -> Iterator[str]:
    """Check parameters in FP8 (arguments.py of Megatron-LM)."""
    settings, flag = case.settings, "--fp8-param-gather"
    if not settings.precision.fp8_param_gather or settings.precision.fp8_format is None:
        return
    if case.local:
        yield (
            f"{flag} needs Transformer Engine's layers on a GPU: leave it out; emulation rounds "
            "the same weights"
        )
    if not settings.parallel.use_distributed_optimizer:
        yield f"{flag} needs --use-distributed-optimizer: add it"
    if not settings.precision.bf16:
        yield f"{flag} needs --bf16: add it"
    if settings.precision.fp8_recipe == "mxfp8":
        yield (
            f"{flag} with --fp8-recipe mxfp8 needs reuse of gradient buffers, which is not "
            "supported: use tensorwise or blockwise"
        )


def recomputed(case: Case) -> Iterator[str]:
    """Check that a recomputed layer uses the scales of its first run."""
    precision, parallel = case.settings.precision, case.settings.parallel
    if precision.fp8_format is None or precision.fp8_recipe != "delayed":
        return
    modules = set(parallel.recompute_modules or [])
    if modules & {"moe_act", "layernorm"}:
        yield (
            "--recompute-modules moe_act and layernorm are incompatible with --fp8-recipe delayed "
            "(megatron-core): leave them out or use --fp8-recipe tensorwise"
        )
    again = parallel.recompute_granularity == "full" or bool(modules & _HOLD_LINEAR_LAYERS)
    if case.local and again and parallel.pipeline_model_parallel_size > 1:
        yield (
            "--fp8-recipe delayed, emulated, cannot recompute linear layers in a pipeline: other "
            "micro-batches change the scales; use --fp8-recipe tensorwise, blockwise or "
            "mxfp8, or --recompute-granularity selective with core_attn"
        )


def widths(case: Case) -> Iterator[str]:
    """Check the widths of Transformer Engine's linear layers: FP8 products need multiples of 16."""
    if case.settings.precision.fp8_format is None or case.local:
        return
    for name, width in _widths(case).items():
        if width % _FP8_WIDTH:
            yield (
                f"{name} is {width} on a rank: FP8 matrix products need a multiple of "
                f"{_FP8_WIDTH}; change it, or leave --fp8-format out"
            )


def _widths(case: Case) -> dict[str, int]:
    """Return inputs and outputs of linear layers on a tensor rank, by their settings."""
    settings = case.settings
    model, latent, moe = settings.model, settings.attention, settings.moe
    tp = settings.parallel.tensor_model_parallel_size
    found = {"--hidden-size": model.hidden_size}
    if latent.multi_latent_attention:
        heads = model.num_attention_heads // tp
        joint = latent.kv_lora_rank + latent.qk_pos_emb_head_dim
        found |= {
            "--kv-lora-rank": latent.kv_lora_rank,
            "--kv-lora-rank + --qk-pos-emb-head-dim": joint,
            "heads x (--qk-head-dim + --v-head-dim)": heads
            * (latent.qk_head_dim + latent.v_head_dim),
            "heads x --v-head-dim": heads * latent.v_head_dim,
        }
        if latent.q_lora_rank is not None:
            found["--q-lora-rank"] = latent.q_lora_rank
    else:
        width = derived.head_dim(model)
        rows = (model.num_attention_heads + 2 * derived.query_groups(model)) // tp * width
        found["heads x head width"] = model.num_attention_heads // tp * width
        found["(heads + 2 query groups) x head width"] = rows
    if not all(derived.moe_layers(settings)):
        found["--ffn-hidden-size"] = derived.dense_ffn_size(model) // tp
    if moe.num_experts is not None:
        etp = derived.expert_tensor_parallel_size(settings.parallel)
        if case.experts_impl != "grouped_mm":  # which has a rule of its own
            found["--moe-ffn-hidden-size"] = derived.expert_ffn_size(settings) // etp
        if shared := moe.moe_shared_expert_intermediate_size:
            found["--moe-shared-expert-intermediate-size"] = shared // tp
    return found


RULES = (fp8, parameters, recomputed, widths)
