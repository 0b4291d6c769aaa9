"""Rules on the partitioning of model and batch over ranks."""

from collections.abc import Iterator

from moetron.moe.config.rules.case import Case, nearest_divisors, nearest_multiples, not_multiple
from moetron.moe.config.schema.derived import (
    expert_tensor_parallel_size,
    head_dim,
    num_microbatches,
    sequence_parallel,
)
from moetron.moe.config.schema.pipeline_split import virtual_pipeline_size


def tensor(case: Case) -> Iterator[str]:
    """Check tensor parallelism."""
    settings = case.settings
    model, size = settings.model, settings.parallel.tensor_model_parallel_size
    for name, number in (
        ("num_attention_heads", model.num_attention_heads),
        ("ffn_hidden_size", model.ffn_hidden_size or size),
        ("moe_ffn_hidden_size", _expert_width(case)),
        ("moe_shared_expert_intermediate_size", settings.moe.moe_shared_expert_intermediate_size),
    ):
        unit = (
            expert_tensor_parallel_size(settings.parallel) if name.startswith("moe_ffn") else size
        )
        unit_name = (
            "expert_tensor_parallel_size"
            if name.startswith("moe_ffn") and settings.parallel.expert_tensor_parallel_size
            else "tensor_model_parallel_size"
        )
        if number is not None:
            yield from not_multiple(case, name, number, unit_name, unit)
    yield from _key_heads(case)


def _key_heads(case: Case) -> Iterator[str]:
    """Check key/value heads: sharded, or each on several ranks, which then gather projections."""
    model, ranks = case.settings.model, case.settings.parallel.tensor_model_parallel_size
    groups, unit = model.num_query_groups, "tensor_model_parallel_size"
    if groups is None:
        return
    if groups >= ranks or ranks % groups:
        yield from not_multiple(case, "num_query_groups", groups, unit, ranks)
        return
    used = case.given("num_query_groups", unit)
    if model.qk_layernorm_scope == "full":
        yield f"{used}: several ranks per head need --qk-layernorm-scope head"
    if model.query_init_folds_scale:
        yield (
            f"{used}: several ranks per head are incompatible with --query-init-folds-scale: drop "
            "it, or use fewer tensor ranks"
        )
    rows = (model.num_attention_heads + 2 * groups) * head_dim(model)
    if rows % ranks:
        yield (
            f"{used}: the {rows} channels of queries, keys and values are not a multiple of "
            f"{ranks}: change --kv-channels"
        )


def _expert_width(case: Case) -> int | None:
    return case.settings.moe.moe_ffn_hidden_size if case.settings.moe.num_experts else None


def sequence(case: Case) -> Iterator[str]:
    """Check the divisibility of the sequence length."""
    parallel, length = case.settings.parallel, case.settings.model.seq_length
    context, tensor_size = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if context > 1 and length % (2 * context):
        yield (
            f"{case.given('seq_length')} must be a multiple of 2 x "
            f"{case.given('context_parallel_size')}: use --seq-length "
            f"{nearest_multiples(length, 2 * context)}"
        )
    if context > 1 and not case.settings.training.calculate_per_token_loss:
        yield (
            f"{case.given('context_parallel_size')} needs --calculate-per-token-loss: parts of a "
            "sequence have unequal numbers of tokens with a loss, so a mean of means is a "
            "different loss"
        )
    if sequence_parallel(parallel) and (length // context) % tensor_size:
        yield (
            f"{case.given('seq_length')} must be a multiple of "
            f"{case.given('tensor_model_parallel_size')} (x --context-parallel-size) with sequence "
            f"parallelism: use --seq-length {nearest_multiples(length, tensor_size * context)}"
        )


def world(case: Case) -> Iterator[str]:
    """Check the number of ranks, for the dense and the expert side."""
    parallel, ranks = case.settings.parallel, case.world_size
    dense = (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )
    if ranks % dense:
        yield (
            f"{ranks} rank(s) are not a multiple of --tensor-model-parallel-size "
            f"{parallel.tensor_model_parallel_size} x --pipeline-model-parallel-size "
            f"{parallel.pipeline_model_parallel_size} x --context-parallel-size "
            f"{parallel.context_parallel_size} = {dense}: "
            f"start {nearest_multiples(ranks, dense)} ranks, or use smaller sizes"
        )
        return
    if case.settings.moe.num_experts is None:
        return
    tensor_size = expert_tensor_parallel_size(parallel)
    experts = (
        tensor_size * parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size
    )
    if ranks % experts:
        yield (
            f"{ranks} rank(s) are not a multiple of --expert-tensor-parallel-size {tensor_size} x "
            f"--expert-model-parallel-size {parallel.expert_model_parallel_size} x "
            f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size} = {experts}: "
            f"start {nearest_multiples(ranks, experts)} ranks, or use smaller sizes"
        )


def batch(case: Case) -> Iterator[str]:
    """Check the global batch, its ramp and its micro-batches."""
    training, parallel = case.settings.training, case.settings.parallel
    dense = (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )
    if case.world_size % dense:
        return
    ranks = case.world_size // dense
    unit = training.micro_batch_size * ranks
    unit_text = f"{case.given('micro_batch_size')} x {ranks} data-parallel rank(s) = {unit}"
    if training.global_batch_size % unit:
        yield (
            f"{case.given('global_batch_size')} is not a multiple of {unit_text}: use "
            f"--global-batch-size {nearest_multiples(training.global_batch_size, unit)}"
        )
    if training.rampup_batch_size is not None:
        yield from _ramp(case, training.rampup_batch_size, unit, unit_text)
    elif virtual_pipeline_size(case.settings) and training.global_batch_size % unit == 0:
        yield from _interleaved(case, num_microbatches(case.settings, case.world_size))


def _ramp(case: Case, ramp: tuple[int, int, int], unit: int, unit_text: str) -> Iterator[str]:
    start, increment, _ = ramp
    used, full = case.given("rampup_batch_size"), case.settings.training.global_batch_size
    if start >= full:
        yield f"{used}: the start must be below {case.given('global_batch_size')}"
    elif (full - start) % increment:
        yield (
            f"{used}: from {start} to {case.given('global_batch_size')} is not an integer number "
            f"of increments: use an increment of {nearest_divisors(full - start, increment)}"
        )
    for name, value in (("start", start), ("increment", increment)):
        if value % unit:
            yield (
                f"{used}: the {name} is not a multiple of {unit_text}: use "
                f"{nearest_multiples(value, unit)}"
            )
    if virtual_pipeline_size(case.settings):
        yield (
            f"{used} is incompatible with virtual pipeline stages: an interleaved pipeline needs a "
            "constant number of micro-batches; drop one"
        )


def _interleaved(case: Case, microbatches: int) -> Iterator[str]:
    """Check micro-batches; megatron-core raises only in the first step (schedules.py)."""
    stages = case.settings.parallel.pipeline_model_parallel_size
    if microbatches % stages:
        yield (
            f"an interleaved pipeline takes its {microbatches} micro-batches in groups of "
            f"{case.given('pipeline_model_parallel_size')}: choose --global-batch-size so that "
            f"there are {nearest_multiples(microbatches, stages)} micro-batches"
        )


RULES = (tensor, sequence, world, batch)
