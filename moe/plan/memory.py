"""Bytes that a rank needs, from the settings alone."""

from dataclasses import dataclass

from moetron.moe.config import derived
from moetron.moe.config.settings import Settings
from moetron.moe.plan.layout import stage_layers
from moetron.moe.plan.parameters import per_rank


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. The first three are exact; activations are an estimate."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them, without allocator slack and communication buffers."""
        states = self.parameters + self.gradients + self.optimizer
        return states + self.activations + self.logits


def _number_bytes(settings: Settings) -> int:
    return 2 if settings.precision.bf16 else 4


def _optimizer_bytes_per_parameter(settings: Settings) -> int:
    """fp32 moments, and fp32 main parameters beside bf16 ones."""
    adam = settings.optimizer.optimizer == "adam"
    moments = 2 if adam else int(settings.optimizer.sgd_momentum > 0)
    return 4 * (moments + int(settings.precision.bf16))


def _layer_activations(settings: Settings, has_experts: bool) -> int:
    """Numbers that a layer keeps for the backward pass, of one micro-batch on one rank.

    Kept: the inputs and outputs of both norms (4 H a token), queries, keys and values before and
    after rotation, attention's output, and for each FFN that a token visits its two inner widths;
    experts also keep the token's copies before and after (2 H each), and balanced routing is
    assumed. The score matrix counts only where attention materialises it.
    """
    model, moe, parallel = settings.model, settings.moe, settings.parallel
    width, tensor = model.hidden_size, parallel.tensor_model_parallel_size
    tokens = model.seq_length * settings.training.micro_batch_size // parallel.context_parallel_size
    head, value_head = derived.attention_widths(settings)
    queries = model.num_attention_heads * (2 * head + value_head)
    keys = 2 * derived.query_groups(model) * (head + value_head)
    shard = tensor if derived.sequence_parallel(parallel) else 1
    per_token = 4 * width / shard + (queries + keys) / tensor
    if model.attention_backend == "unfused":
        per_token += 2 * model.num_attention_heads * model.seq_length / tensor
    inner = 3 if model.swiglu else 2
    if not has_experts:
        return int(tokens * (per_token + inner * derived.dense_ffn_size(model) / tensor))
    visits = moe.moe_router_topk * min(moe.moe_expert_capacity_factor or 1.0, 1.0)
    if moe.moe_pad_expert_input_to_capacity:
        visits = moe.moe_router_topk * (moe.moe_expert_capacity_factor or 1.0)
    # Tokens are sharded over TP ranks and gathered over ETP ranks, which also share F.
    gathered = derived.expert_tensor_parallel_size(parallel) / tensor
    expert_ffn = derived.expert_ffn_size(settings)
    per_token += visits * (2 * width * gathered + inner * expert_ffn / tensor)
    per_token += inner * (moe.moe_shared_expert_intermediate_size or 0) / tensor
    return int(tokens * per_token)


def _activation_bytes(settings: Settings, stage: int, microbatches: int) -> int:
    """Activations of all micro-batches in flight on a stage of a 1F1B pipeline."""
    parallel, pattern = settings.parallel, derived.moe_layers(settings)
    layers = [_layer_activations(settings, pattern[i]) for i in stage_layers(settings, stage)]
    if stage == parallel.pipeline_model_parallel_size - 1:
        layers += [_layer_activations(settings, pattern[-1])] * (settings.model.mtp_num_layers or 0)
    numbers = sum(layers)
    if parallel.recompute_granularity == "full":
        tokens = settings.model.seq_length * settings.training.micro_batch_size
        kept = tokens * settings.model.hidden_size // parallel.context_parallel_size
        numbers = kept * len(layers) + max(layers)
    stages = parallel.pipeline_model_parallel_size
    in_flight = float(min(stages - stage, microbatches))
    rounds = derived.virtual_pipeline_size(settings)
    if rounds is not None:  # Megatron-LM (arXiv 2104.04473), section 2.2: one more part in flight
        in_flight *= 1 + (stages - 1) / (stages * rounds)
    return int(numbers * in_flight * _number_bytes(settings))


def memory_per_rank(settings: Settings, vocab_size: int, world_size: int, stage: int) -> Memory:
    """What a rank of pipeline stage ``stage`` holds at the peak of a step, in bytes.

    bf16 parameters 2 bytes, else 4; gradients 4, or 2 in bf16 without fp32 accumulation; Adam 8,
    and 4 of main parameters in bf16, both shared by data-parallel ranks under the distributed
    optimizer (experts by theirs); fp32 logits and their gradient on the last stage.
    """
    parallel, training = settings.parallel, settings.training
    held = per_rank(settings, vocab_size, stage)
    count = held.dense + held.expert
    fp32_gradients = settings.precision.accumulate_allreduce_grads_in_fp32
    dense_share = expert_share = 1
    if parallel.use_distributed_optimizer:
        dense_share = (
            derived.data_parallel_size(parallel, world_size) * parallel.context_parallel_size
        )
        expert_share = derived.expert_data_parallel_size(parallel, world_size)
    logits = 0
    if stage == parallel.pipeline_model_parallel_size - 1:
        tokens = settings.model.seq_length * training.micro_batch_size
        rows = derived.padded_vocab_size(vocab_size, settings)
        cut = parallel.tensor_model_parallel_size * parallel.context_parallel_size
        logits = 2 * 4 * tokens * rows // cut * (1 + (settings.model.mtp_num_layers or 0))
    microbatches = derived.num_microbatches(settings, world_size)
    return Memory(
        parameters=count * _number_bytes(settings),
        gradients=count * (4 if fp32_gradients else _number_bytes(settings)),
        optimizer=_optimizer_bytes_per_parameter(settings)
        * (held.dense // dense_share + held.expert // expert_share),
        activations=_activation_bytes(settings, stage, microbatches),
        logits=logits,
    )
