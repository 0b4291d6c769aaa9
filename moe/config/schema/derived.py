"""Values computed from settings: unset sizes, layout, batches, schedule."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

from moetron.moe.config.schema.model import FfnType, ModelSettings
from moetron.moe.config.schema.parallel import ParallelSettings
from moetron.moe.config.schema.settings import Settings


def head_dim(model: ModelSettings) -> int:
    """Return the channels of one attention head."""
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def query_groups(model: ModelSettings) -> int:
    """Return the number of key/value heads."""
    return model.num_query_groups or model.num_attention_heads


def dense_ffn_size(model: ModelSettings) -> int:
    """Return the width F of a dense FFN."""
    return model.ffn_hidden_size or 4 * model.hidden_size


def ffn_type(model: ModelSettings) -> FfnType:
    """Return the kind of every FFN."""
    return model.ffn_type or ("swiglu" if model.swiglu else "gelu")


def ffn_inner_matrices(model: ModelSettings) -> int:
    """Return the number of an FFN's matrices before its inner activation."""
    return {"swiglu": 2, "geglu": 2, "geglu_tanh": 2, "gelu": 1, "relu": 1, "double_gated": 3}[
        ffn_type(model)
    ]


def expert_ffn_size(settings: Settings) -> int:
    """Return the width F of one expert's FFN."""
    return settings.moe.moe_ffn_hidden_size or dense_ffn_size(settings.model)


def stack_layers(model: ModelSettings) -> dict[str, range]:
    """Return the layers of the encoder and of the decoder, or of the decoder only."""
    encoder = model.encoder_num_layers
    if encoder is None:
        return {"decoder": range(model.num_layers)}
    return {"encoder": range(encoder), "decoder": range(encoder, model.num_layers)}


def stack_lengths(settings: Settings) -> dict[str, int]:
    """Return the tokens of a sample that each stack reads."""
    total, encoder = settings.model.seq_length, settings.data.encoder_seq_length
    if settings.model.encoder_num_layers is None or encoder is None:
        return {"decoder": total}
    return {"encoder": encoder, "decoder": total - encoder}


def tokens_of_layers(settings: Settings) -> list[int]:
    """Return for each layer how many tokens of a sample it reads."""
    lengths = stack_lengths(settings)
    return [
        lengths[stack] for stack, layers in stack_layers(settings.model).items() for _ in layers
    ]


def moe_layers(settings: Settings) -> list[bool]:
    """Return for each layer whether it has experts; a pattern starts again in the decoder."""
    layers, moe = settings.model.num_layers, settings.moe
    frequency = moe.moe_layer_freq
    if moe.num_experts is None:
        return [False] * layers
    if isinstance(frequency, list):
        return [bool(flag) for flag in frequency]
    place = frequency - 1 if moe.moe_layer_position == "last" else 0
    dense = moe.first_k_dense_replace
    stacks = stack_layers(settings.model).values()
    numbers = [number for stack in stacks for number in range(len(stack))]
    return [number >= dense and number % frequency == place for number in numbers]


def routed_layers(settings: Settings) -> list[bool]:
    """Return `moe_layers` followed by the same for each multi-token prediction module."""
    layers = moe_layers(settings)
    return layers + layers[-1:] * (settings.model.mtp_num_layers or 0)


def attention_widths(settings: Settings) -> tuple[int, int]:
    """Return the channels of a query (and key) head, and of a value head."""
    latent = settings.attention
    if latent.multi_latent_attention:
        return latent.qk_head_dim + latent.qk_pos_emb_head_dim, latent.v_head_dim
    return head_dim(settings.model), head_dim(settings.model)


def fp8_layers(settings: Settings) -> list[bool]:
    """Return for each layer whether its linear layers and experts run in FP8."""
    layers, precision = settings.model.num_layers, settings.precision
    if precision.fp8_format is None:
        return [False] * layers
    kept = precision.first_last_layers_bf16
    start = precision.num_layers_at_start_in_bf16 if kept else 0
    end = layers - (precision.num_layers_at_end_in_bf16 if kept else 0)
    return [start <= layer < end for layer in range(layers)]


def sequence_parallel(parallel: ParallelSettings) -> bool:
    """Return whether norms and dropout are sharded along the sequence; never at TP 1."""
    return parallel.tensor_model_parallel_size > 1 and parallel.sequence_parallel is not False


def expert_tensor_parallel_size(parallel: ParallelSettings) -> int:
    """Return the tensor-parallel ranks of each expert."""
    return parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size


def data_parallel_size(parallel: ParallelSettings, world_size: int) -> int:
    """Return the ranks with different samples; context-parallel ranks hold parts of the same."""
    return world_size // (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def expert_data_parallel_size(parallel: ParallelSettings, world_size: int) -> int:
    """Return the number of ranks with the same experts."""
    return world_size // (
        expert_tensor_parallel_size(parallel)
        * parallel.expert_model_parallel_size
        * parallel.pipeline_model_parallel_size
    )


def smallest_world_size(parallel: ParallelSettings) -> int:
    """Return the smallest world size of a layout, for its dense and its expert side."""
    dense = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    experts = expert_tensor_parallel_size(parallel) * parallel.expert_model_parallel_size
    return math.lcm(dense, experts) * parallel.pipeline_model_parallel_size


def num_microbatches(settings: Settings, world_size: int) -> int:
    """Return the micro-batches per data-parallel rank and step at the full global batch size."""
    ranks = data_parallel_size(settings.parallel, world_size)
    return settings.training.global_batch_size // (settings.training.micro_batch_size * ranks)


def padded_vocab_size(vocab_size: int, settings: Settings) -> int:
    """Return the rows of the embedding: the vocabulary, padded for tensor-parallel sharding."""
    multiple = (
        settings.model.make_vocab_size_divisible_by * settings.parallel.tensor_model_parallel_size
    )
    return padded_to(multiple, vocab_size)


def padded_to(multiple: int, number: int) -> int:
    """Return ``number`` rounded up to a multiple of ``multiple``."""
    return -(-number // multiple) * multiple


def with_vocabulary(settings: Settings, vocab_size: int) -> Settings:
    """Return the settings with an explicit vocabulary size."""
    model = settings.model.model_copy(update={"vocab_size": vocab_size})
    return settings.model_copy(update={"model": model})


def with_tokenizer(settings: Settings, source: str) -> Settings:
    """Return the settings with another path of the same tokenizer."""
    data = settings.data.model_copy(update={"tokenizer_model": source})
    return settings.model_copy(update={"data": data})


def global_batch_size_at(settings: Settings, consumed_samples: int) -> int:
    """Return the batch size of the step that follows ``consumed_samples``.

    The ramp has equal steps over its samples, as in megatron-core's
    num_microbatches_calculator.py.
    """
    full = settings.training.global_batch_size
    if settings.training.rampup_batch_size is None:
        return full
    start, increment, ramp_samples = settings.training.rampup_batch_size
    stairs = max((full - start) // increment, 0)
    return start + increment * min(consumed_samples * stairs // ramp_samples, stairs)


def total_samples(settings: Settings) -> int:
    """Return the samples of the run, including the batch-size ramp."""
    full, seen, step = settings.training.global_batch_size, 0, 0
    while step < settings.training.train_iters and global_batch_size_at(settings, seen) < full:
        seen += global_batch_size_at(settings, seen)
        step += 1
    return seen + (settings.training.train_iters - step) * full


def stage_starts(settings: Settings) -> list[int]:
    """Return the first sample of each stage.

    A stage ends with the first sample that reaches until_tokens.
    """
    ends = [stage.until_tokens for stage in settings.data.stages or []]
    return [0, *(-(-end // settings.model.seq_length) for end in ends if end is not None)]


def stage_at(settings: Settings, sample: int) -> int:
    """Return the index of the stage that a sample belongs to."""
    return bisect_right(stage_starts(settings), sample) - 1


def objective_at(settings: Settings, sample: int) -> str:
    """Return the training objective of a sample; mock samples are causal."""
    if settings.data.mock_data:
        return "causal"
    stages = settings.data.planned_stages()
    return stages[stage_at(settings, sample)].objective if stages else settings.data.objective


def reads_prefix(settings: Settings, consumed_samples: int, has_mode: bool) -> bool:
    """Return whether a prompt has bidirectional attention, as prefixes of samples in training.

    Args:
        settings: the run's settings.
        consumed_samples: samples of the checkpoint; the last one determines the objective.
        has_mode: whether the prompt has the form of one of UL2's modes; otherwise it is plain text,
            which is a prefix if training samples had one.
    """
    if not settings.data.bidirectional_prefix:
        return False
    objective = objective_at(settings, max(consumed_samples - 1, 0))
    return has_mode or objective in ("prefix_lm", "ul2")


def separates_documents(settings: Settings) -> bool:
    """Return whether samples hold documents that do not see each other."""
    return settings.data.reset_attention_mask or settings.adaptation.sft


def masks_losses(settings: Settings) -> bool:
    """Return whether the loss of some tokens of training samples may be masked."""
    if settings.adaptation.sft:
        return True
    data = settings.data
    stages = data.planned_stages()
    filtered = data.eod_mask_loss or data.repetition_max_count is not None
    uneven = filtered or any(stage.objective != "causal" for stage in stages)
    return (uneven and not data.mock_data) or settings.model.encoder_num_layers is not None


def expert_slots(
    factor: float, tokens: int, experts: int, topk: int, includes_topk: bool, minimum: int
) -> int:
    """Return an expert's capacity for ``tokens`` tokens; may be 0.

    - includes_topk: ceil(factor k T / E), megatron-core's (GShard, arXiv 2006.16668, k = 2);
    - otherwise round(factor T / E), halves to even: flaxformer's (moe_layers.py), the convention
      of Switch, ST-MoE and OpenMoE. With k = 2 it is half of the former.
    """
    even = tokens * topk / experts if includes_topk else tokens / experts
    slots = math.ceil(even * factor) if includes_topk else round(factor * tokens / experts)
    return min(max(slots, minimum), tokens)


@dataclass(frozen=True)
class ScheduleLengths:
    """Lengths of the learning-rate schedule's segments, in one unit."""

    unit: Literal["steps", "tokens"]
    run: int
    """Length of the run."""
    warmup: int
    end: int
    """End of the decay, from the start of the run."""
    final_decay: int | None
    """WSD's decay before ``end``."""


def schedule_lengths(settings: Settings) -> ScheduleLengths:
    """Return the segments in tokens if any length is in tokens, else in steps.

    By default the decay ends with the run.
    """
    rate = settings.learning_rate
    tokens = (rate.lr_warmup_tokens, rate.lr_decay_tokens, rate.lr_wsd_decay_tokens)
    if any(length is not None for length in tokens):
        run = total_samples(settings) * settings.model.seq_length
        return ScheduleLengths("tokens", run, tokens[0] or 0, tokens[1] or run, tokens[2])
    run, end = settings.training.train_iters, rate.lr_decay_iters
    return ScheduleLengths(
        "steps", run, rate.lr_warmup_iters or 0, end or run, rate.lr_wsd_decay_iters
    )


def looks_ahead(settings: Settings) -> list[str]:
    """Return the flags that make a token's experts depend on later tokens in training."""
    moe = settings.moe
    found: list[str] = []
    if moe.num_experts is None:
        return found
    if moe.moe_router_type in ("expert_choice", "base"):
        found.append(f"--moe-router-type {moe.moe_router_type}")
    if moe.moe_router_load_balancing_type == "sinkhorn":
        found.append("--moe-router-load-balancing-type sinkhorn")
    limited = moe.moe_expert_capacity_factor is not None and moe.moe_router_type != "expert_choice"
    if limited and moe.moe_token_drop_policy in ("probs", "batch_prioritized"):
        found.append(f"--moe-token-drop-policy {moe.moe_token_drop_policy}")
    return found


def notes(settings: Settings) -> list[str]:
    """Return what is allowed, as in Megatron, but seldom meant: a line each."""
    parallel, found = settings.parallel, []
    if parallel.sequence_parallel and not sequence_parallel(parallel):
        found.append("--sequence-parallel has no effect with --tensor-model-parallel-size 1")
    if _is_unbalanced(settings):
        found.append(
            "no balance loss: --moe-aux-loss-coeff is 0, and a few experts may get most tokens; "
            "give one, or --moe-router-load-balancing-type none if this is meant"
        )
    return found


def _is_unbalanced(settings: Settings) -> bool:
    """Return whether a pretraining router that needs a balance loss has none."""
    moe = settings.moe
    return (
        moe.num_experts is not None
        and not settings.adaptation.sft  # off on purpose; the start block states it
        and moe.moe_router_type not in ("expert_choice", "base", "hash")
        and moe.moe_router_load_balancing_type not in ("none", "sinkhorn")
        and not moe.moe_router_enable_expert_bias
        and not moe.moe_aux_loss_coeff
    )
