"""Memory per rank, computed from settings."""

from dataclasses import dataclass

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.pipeline_split import stage_chunks, virtual_pipeline_size
from moetron.moe.config.schema.settings import Settings
from moetron.moe.plan.parameters import hidden_matrices, per_rank


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. The first three are exact; activations are estimated."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum, without allocator slack and communication buffers."""
        states = self.parameters + self.gradients + self.optimizer
        return states + self.activations + self.logits


def _number_bytes(settings: Settings) -> int:
    return 2 if settings.precision.bf16 else 4


def _optimizer_bytes(settings: Settings, parameters: int, matrices: int) -> int:
    """Return bytes of moments (without Adafactor's rows and columns) and main parameters.

    Args:
        settings: the run's settings.
        parameters: parameters whose state the rank keeps.
        matrices: number of these that Muon would update, with one moment rather than two.
    """
    formats = settings.optimizer
    if formats.use_precision_aware_optimizer:
        width = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
        # Main parameters are 16 bits beside the bf16 weight, or fp16.
        each = 2 + width[formats.exp_avg_dtype] + width[formats.exp_avg_sq_dtype]
        if settings.performance.optimizer_cpu_offload:  # fp32; the rest is on the device
            return int(parameters * 12 * (1 - settings.performance.optimizer_offload_fraction))
        return parameters * each
    kept = {"adam": 2, "sgd": int(settings.optimizer.sgd_momentum > 0), "adafactor": 0, "muon": 2}
    chosen = settings.optimizer.optimizer
    numbers = parameters * (kept[chosen] + int(settings.precision.bf16))
    return 4 * (numbers - matrices if chosen == "muon" else numbers)


def _tokens(settings: Settings) -> int:
    """Return the tokens of one micro-batch on one context-parallel rank."""
    parallel, model = settings.parallel, settings.model
    return model.seq_length * settings.training.micro_batch_size // parallel.context_parallel_size


def _residual(settings: Settings) -> float:
    """Return the residual-stream elements per token on one rank."""
    parallel = settings.parallel
    ranks = parallel.tensor_model_parallel_size if derived.sequence_parallel(parallel) else 1
    return settings.model.hidden_size / ranks


def _recomputed(settings: Settings) -> set[str]:
    """Return the modules of selective recomputation."""
    parallel = settings.parallel
    if parallel.recompute_granularity != "selective":
        return set()
    return set(parallel.recompute_modules or ["core_attn"])


def _attention(settings: Settings) -> float:
    """Return the attention elements kept per token.

    These are queries, keys and values before and after rotation, and the output; the score matrix
    only if attention materialises it; every token's keys and values if context-parallel ranks
    gather them (all but Transformer Engine's attention).
    """
    model, parallel = settings.model, settings.parallel
    head, value_head = derived.attention_widths(settings)
    groups, ranks = derived.query_groups(model), parallel.tensor_model_parallel_size
    keys = max(groups, ranks) * (head + value_head)
    kept, inside = model.num_attention_heads * (2 * head + value_head) + 2 * keys, 0
    if groups < ranks:  # every rank gathers all projections; its value is a view of them
        kept += ranks * (model.num_attention_heads + 2 * groups) * head
    gathers = model.transformer_impl != "transformer_engine" and parallel.device != "cuda"
    if gathers and parallel.context_parallel_size > 1:
        inside = keys * parallel.context_parallel_size
    if model.attention_backend == "unfused":
        inside += 2 * model.num_attention_heads * model.seq_length
    if "core_attn" in _recomputed(settings):
        inside = 0
    return (kept + inside) / ranks


def _experts_per_token(settings: Settings) -> float:
    """Return the mean experts per token with balanced routing, including padding."""
    moe = settings.moe
    if moe.moe_expert_capacity_factor is None:
        return moe.moe_router_topk
    share = moe.moe_router_topk if moe.moe_capacity_includes_topk else 1
    slots = moe.moe_expert_capacity_factor * share
    return slots if moe.moe_pad_expert_input_to_capacity else min(slots, moe.moe_router_topk)


def _ffn(settings: Settings, has_experts: bool) -> float:
    """Return the FFN elements kept per token.

    These are the inner widths of each FFN it passes, and for routed experts its copies before and
    after (2 H each).
    """
    model, moe, parallel = settings.model, settings.moe, settings.parallel
    tensor, recomputed = parallel.tensor_model_parallel_size, _recomputed(settings)
    inner = 1 + derived.ffn_inner_matrices(model)
    if not has_experts:
        return 0 if "mlp" in recomputed else inner * derived.dense_ffn_size(model) / tensor
    if "moe" in recomputed:
        return 0
    # Tokens are sharded over TP ranks and gathered over ETP ranks, which also shard F.
    gathered = derived.expert_tensor_parallel_size(parallel) / tensor
    widths = (inner - ("moe_act" in recomputed)) * derived.expert_ffn_size(settings)
    routed = _experts_per_token(settings) * (2 * model.hidden_size * gathered + widths / tensor)
    shared = 0 if "shared_experts" in recomputed else moe.moe_shared_expert_intermediate_size or 0
    after = moe.moe_sequential_ffn_hidden_size
    if after is not None:
        shared += after
        routed += 2 * _residual(settings)
    return routed + inner * shared / tensor


def _layer_activations(settings: Settings, has_experts: bool) -> int:
    """Return the elements that a layer keeps for backward, per micro-batch and rank.

    In addition to attention and FFN: the inputs and outputs of both norms (4 H per token).
    """
    norms = 2 if "layernorm" in _recomputed(settings) else 4
    per_token = norms * _residual(settings) + _attention(settings) + _ffn(settings, has_experts)
    return int(_tokens(settings) * per_token)


def _layers(settings: Settings) -> list[int]:
    """Return `_layer_activations` of every layer, multi-token prediction modules included.

    A layer of an encoder-decoder reads its stack's part of a sample. Cross-attention keeps another
    norm, queries and output of the decoder's tokens, and keys and values of the encoder's.
    """
    kept = [_layer_activations(settings, sparse) for sparse in derived.routed_layers(settings)]
    model, lengths = settings.model, derived.stack_lengths(settings)
    if "encoder" not in lengths:
        return kept
    inner = model.num_attention_heads * derived.head_dim(model)
    inner //= settings.parallel.tensor_model_parallel_size
    crossed = lengths["decoder"] * (2 * inner + 2 * _residual(settings))
    crossed += lengths["encoder"] * 2 * inner
    parts = [
        count * read // model.seq_length
        for count, read in zip(kept, derived.tokens_of_layers(settings), strict=True)
    ]
    for index in derived.stack_layers(model)["decoder"]:
        parts[index] += int(crossed * settings.training.micro_batch_size)
    return parts


def _chunk_activations(settings: Settings, chunk: range) -> tuple[int, int]:
    """Return one chunk's elements (kept per micro-batch in flight, recomputed at a time)."""
    parallel, every_layer = settings.parallel, _layers(settings)
    layers = [every_layer[layer] for layer in chunk]
    if parallel.recompute_granularity != "full" or not layers:
        return sum(layers), 0
    unit, one_input = parallel.recompute_num_layers or 1, _tokens(settings) * _residual(settings)
    if parallel.recompute_method == "block":
        unit = min(unit, sum(layer < settings.model.num_layers for layer in chunk))  # no predictor
        again = max(layers[:unit], default=0)
        return int(one_input * unit) + sum(layers[unit:]), again
    units = [layers[start : start + unit] for start in range(0, len(layers), unit)]
    return int(one_input * len(units)), max(map(sum, units))


def _activation_bytes(settings: Settings, stage: int, microbatches: int) -> int:
    """Return activation bytes of all micro-batches in flight on a stage of a 1F1B pipeline."""
    stages, held = settings.parallel.pipeline_model_parallel_size, stage_chunks(settings, stage)
    if stage == stages - 1:
        held[-1] = range(held[-1].start, held[-1].stop + (settings.model.mtp_num_layers or 0))
    chunks = [_chunk_activations(settings, chunk) for chunk in held]
    in_flight = float(min(stages - stage, microbatches))
    rounds = virtual_pipeline_size(settings)
    if rounds is not None:  # Megatron-LM (arXiv 2104.04473), section 2.2: one more part in flight
        in_flight *= 1 + (stages - 1) / (stages * rounds)
        if settings.performance.overlap_moe_expert_parallel_comm:
            in_flight += 1 / rounds  # one more chunk's forward pass before the first backward pass
    kept, again = sum(kept for kept, _ in chunks), max(again for _, again in chunks)
    return int(kept * in_flight + again) * _number_bytes(settings)


def memory_per_rank(settings: Settings, vocab_size: int, world_size: int, stage: int) -> Memory:
    """Return the peak memory of a rank of pipeline stage ``stage``, in bytes.

    Per parameter: 2 bytes in bf16, else 4; gradients 4, or 2 in bf16 without fp32 accumulation;
    Adam 8 (Muon's matrices 4), and 4 for main parameters in bf16, both less with
    --use-precision-aware-optimizer or
    --optimizer-cpu-offload, and sharded over data-parallel ranks by the distributed
    optimizer (experts over expert-data-parallel ranks). The last stage has fp32 logits and their
    gradient.
    """
    parallel, training = settings.parallel, settings.training
    held = per_rank(settings, vocab_size, stage)
    count = held.dense + held.expert
    fp32_gradients = settings.precision.accumulate_allreduce_grads_in_fp32
    dense_ranks = expert_ranks = 1
    if parallel.use_distributed_optimizer:
        dense_ranks = (
            derived.data_parallel_size(parallel, world_size) * parallel.context_parallel_size
        )
        expert_ranks = derived.expert_data_parallel_size(parallel, world_size)
    logits = 0
    if stage == parallel.pipeline_model_parallel_size - 1:
        tokens = derived.stack_lengths(settings)["decoder"] * training.micro_batch_size
        rows = derived.padded_vocab_size(vocab_size, settings)
        ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
        logits = 2 * 4 * tokens * rows // ranks * (1 + (settings.model.mtp_num_layers or 0))
    microbatches = derived.num_microbatches(settings, world_size)
    return Memory(
        parameters=count * _number_bytes(settings),
        gradients=count * (4 if fp32_gradients else _number_bytes(settings)),
        optimizer=_optimizer_bytes(
            settings,
            held.dense // dense_ranks + held.expert // expert_ranks,
            hidden_matrices(settings, vocab_size, stage),
        ),
        activations=_activation_bytes(settings, stage, microbatches),
        logits=logits,
    )
