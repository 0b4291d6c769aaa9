"""Latent attention, rotary scaling and multi-token prediction."""

from collections.abc import Iterator

from moetron.moe.config.rules.case import Case, not_multiple
from moetron.moe.config.schema import derived


def latent(case: Case) -> Iterator[str]:
    """Check settings used with latent attention (--multi-latent-attention)."""
    model, attention = case.settings.model, case.settings.attention
    if not attention.multi_latent_attention:
        if attention.q_lora_rank is not None:
            yield f"{case.given('q_lora_rank')} needs --multi-latent-attention: add it"
        return
    flag = "--multi-latent-attention"
    for name in ("num_query_groups", "kv_channels"):
        if getattr(model, name) is not None:
            yield f"{case.given(name)} has no effect with {flag}: drop it"
    if attention.softmax_scale is not None:
        yield f"{case.given('softmax_scale')} has no effect with {flag}: drop it"
    for name, used in (
        ("add_qkv_bias", attention.add_qkv_bias),
        ("add_bias_linear", model.add_bias_linear),
    ):
        if used:
            yield f"{case.given(name)}: {flag} has no biases; drop one"
    if model.qk_layernorm_scope == "full":
        yield f"--qk-layernorm-scope full is incompatible with {flag}: use head"
    if model.position_embedding_type != "rope":
        yield f"{flag} needs --position-embedding-type rope"
    if attention.qk_pos_emb_head_dim % 2:
        yield f"{case.given('qk_pos_emb_head_dim')} must be even: channels are rotated in pairs"
    if case.local and model.attention_backend == "unfused":
        yield f"{flag} is incompatible with --attention-backend unfused: use sdpa"
    yield from _latent_ranks(case)


def _latent_ranks(case: Case) -> Iterator[str]:
    """Check latent attention with tensor parallelism."""
    parallel, attention = case.settings.parallel, case.settings.attention
    ranks = parallel.tensor_model_parallel_size
    if ranks > 1 and parallel.sequence_parallel is False:
        yield (
            f"--multi-latent-attention with {case.given('tensor_model_parallel_size')} needs "
            "sequence parallelism: drop --no-sequence-parallel"
        )
    # megatron-core's constructor divides the compressed widths even if it then replicates them.
    if attention.q_lora_rank is not None:
        unit = "tensor_model_parallel_size"
        yield from not_multiple(case, "q_lora_rank", attention.q_lora_rank, unit, ranks)
    kept = attention.kv_lora_rank + attention.qk_pos_emb_head_dim
    if kept % ranks:
        yield (
            f"{case.given('kv_lora_rank', 'qk_pos_emb_head_dim')}: their sum {kept} is not a "
            f"multiple of {case.given('tensor_model_parallel_size')}"
        )


def rotary(case: Case) -> Iterator[str]:
    """Check scaled rotary frequencies."""
    attention = case.settings.attention
    kind, is_latent = attention.rope_type, attention.multi_latent_attention
    if kind == "yarn" and not is_latent:
        yield "--rope-type yarn needs --multi-latent-attention: use rope or llama3"
    if kind == "llama3" and is_latent:
        yield "--rope-type llama3 is incompatible with --multi-latent-attention: use rope or yarn"
    if kind == "rope" and attention.rotary_scaling_factor != 1:
        yield f"{case.given('rotary_scaling_factor')} needs --rope-type llama3 or yarn"


def prediction(case: Case) -> Iterator[str]:
    """Check multi-token prediction."""
    parallel = case.settings.parallel
    if case.settings.model.mtp_num_layers is None:
        return
    tied = not case.settings.model.untie_embeddings_and_output_weights
    if tied and parallel.pipeline_model_parallel_size > 1:
        yield (
            f"--mtp-num-layers with {case.given('pipeline_model_parallel_size')} needs "
            "--untie-embeddings-and-output-weights: megatron-core cannot save the last stage's two "
            "copies of a shared embedding"
        )
    if parallel.recompute_method == "uniform" and parallel.recompute_num_layers not in (None, 1):
        yield (
            f"--mtp-num-layers with --recompute-method uniform and "
            f"{case.given('recompute_num_layers')}: megatron-core recomputes its modules one at a "
            "time; use --recompute-num-layers 1 or --recompute-method block"
        )
    if case.settings.moe.moe_sequential_ffn_hidden_size is not None:
        used = case.given("moe_sequential_ffn_hidden_size")
        yield f"--mtp-num-layers is incompatible with {used}"


def logits(case: Case) -> Iterator[str]:
    """Check that largest attention logits can be had, and that weights can be clipped."""
    attention, settings = case.settings.attention, case.settings
    asked = [n for n in ("log_max_attention_logit", "qk_clip") if getattr(attention, n)]
    if not asked:
        return
    flags = case.given(*asked)
    if case.local and settings.model.attention_backend == "unfused":
        yield f"{flags}: {case.given('attention_backend')} gives no logits; use sdpa"
    if settings.performance.cuda_graph_impl != "none":
        yield f"{flags}: CUDA graphs give no logits; use --cuda-graph-impl none"
    if not attention.qk_clip:
        return
    if settings.model.qk_layernorm and not attention.multi_latent_attention:
        yield "--qk-clip has no effect with --qk-layernorm, which undoes any scale: drop one"
    if derived.query_groups(settings.model) < settings.parallel.tensor_model_parallel_size:
        unit = case.given("tensor_model_parallel_size")
        yield f"--qk-clip with fewer key heads than {unit}: use as many or more --num-query-groups"
    for group, name in (
        (settings.parallel, "overlap_param_gather"),
        (settings.precision, "fp8_param_gather"),
        (settings.optimizer, "use_precision_aware_optimizer"),
        (settings.performance, "optimizer_cpu_offload"),
    ):
        if getattr(group, name):
            yield f"--qk-clip is incompatible with {case.given(name)}: drop one"


RULES = (latent, rotary, prediction, logits)
