"""Rules on experts, routing, capacity and dispatch."""

import importlib.util
from collections.abc import Iterator

from moetron.moe.config.rules.case import Case, nearest_divisors, not_multiple
from moetron.moe.config.schema.derived import expert_slots, moe_layers
from moetron.moe.config.schema.experts import EVEN_WEIGHTS, MoESettings
from moetron.moe.config.schema.field import flag_name

_NEED_EXPERTS = (
    "moe_ffn_hidden_size",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_z_loss_coeff",
    "moe_input_jitter_eps",
    "moe_expert_capacity_factor",
    "moe_shared_expert_intermediate_size",
    "moe_router_topk_scaling_factor",
)


def presence(case: Case) -> Iterator[str]:
    """Check expert settings of a dense model, and the placement of experts."""
    moe = case.settings.moe
    if moe.num_experts is None:
        for name in _NEED_EXPERTS:
            if getattr(moe, name) is not None:
                yield f"{case.given(name)} needs --num-experts: add it or leave this out"
        for name in ("moe_router_enable_expert_bias", "moe_shared_expert_gate"):
            if getattr(moe, name):
                yield f"{case.given(name)} needs --num-experts: add it or leave this out"
        return
    if moe.moe_router_topk > moe.num_experts:
        yield (
            f"{case.given('moe_router_topk')} exceeds {case.given('num_experts')}: a token needs "
            f"distinct experts; use --moe-router-topk {moe.num_experts} or less"
        )
    yield from _placement(case, moe)


def _placement(case: Case, moe: MoESettings) -> Iterator[str]:
    """Check the layers with experts."""
    listed, layers = isinstance(moe.moe_layer_freq, list), case.settings.model.num_layers
    if isinstance(moe.moe_layer_freq, list) and len(moe.moe_layer_freq) != layers:
        yield (
            f"--moe-layer-freq lists {len(moe.moe_layer_freq)} layers, but "
            f"{case.given('num_layers')}: give one 0 or 1 for each layer"
        )
    elif not any(moe_layers(case.settings)):
        yield (
            f"{case.given('moe_layer_freq', 'moe_layer_position', 'first_k_dense_replace')} give "
            "no layer experts: change one, or leave out --num-experts"
        )
    if moe.moe_layer_position == "last" and (listed or moe.moe_layer_freq == 1):
        yield "--moe-layer-position last has no effect without --moe-layer-freq N above 1: drop it"
    if moe.first_k_dense_replace and listed:
        used = case.given("first_k_dense_replace")
        yield f"{used} has no effect with a list of layers: drop it"


def parallelism(case: Case) -> Iterator[str]:
    """Check the partitioning of experts over ranks."""
    moe, parallel = case.settings.moe, case.settings.parallel
    if moe.num_experts is None:
        for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if (getattr(parallel, name) or 1) > 1:
                yield f"{case.given(name)} needs --num-experts: add it or use {flag_name(name)} 1"
        return
    yield from not_multiple(
        case,
        "num_experts",
        moe.num_experts,
        "expert_model_parallel_size",
        parallel.expert_model_parallel_size,
    )
    if parallel.tensor_model_parallel_size > 1 and parallel.sequence_parallel is False:
        yield (
            f"experts with {case.given('tensor_model_parallel_size')} need sequence parallelism: "
            "drop --no-sequence-parallel"
        )


def scores(case: Case) -> Iterator[str]:
    """Check the computation of weights from logits."""
    moe = case.settings.moe
    balance, softmax = (
        moe.moe_router_load_balancing_type,
        moe.moe_router_score_function == "softmax",
    )
    if moe.num_experts is None:
        return
    weighed = balance != "sinkhorn" and moe.moe_router_type not in EVEN_WEIGHTS
    if moe.moe_router_topk == 1 and softmax and weighed and not moe.moe_router_pre_softmax:
        yield (
            "--moe-router-topk 1 needs --moe-router-pre-softmax: a softmax over one expert is 1 "
            "and gives the router no gradient"
        )
    if moe.moe_router_pre_softmax and not softmax:
        yield "--moe-router-pre-softmax needs --moe-router-score-function softmax"
    if moe.moe_router_enable_expert_bias and softmax:
        yield "--moe-router-enable-expert-bias needs --moe-router-score-function sigmoid"
    if balance == "sinkhorn" and moe.moe_aux_loss_coeff:
        yield (
            f"--moe-router-load-balancing-type sinkhorn has no balance loss, but "
            f"{case.given('moe_aux_loss_coeff')}: set it to 0"
        )
    if balance == "none" and moe.moe_aux_loss_coeff:
        yield (
            f"{case.given('moe_aux_loss_coeff')} has no effect with "
            "--moe-router-load-balancing-type none: choose aux_loss or set it to 0"
        )
    if moe.moe_global_aux_loss_counts != "running" and balance != "global_aux_loss":
        yield (
            f"{case.given('moe_global_aux_loss_counts')} needs "
            "--moe-router-load-balancing-type global_aux_loss"
        )
    if balance == "sinkhorn" and moe.moe_router_num_groups:
        yield (
            "--moe-router-load-balancing-type sinkhorn does not support groups: "
            "drop --moe-router-num-groups and --moe-router-group-topk"
        )


def groups(case: Case) -> Iterator[str]:
    """Check group-limited routing."""
    moe = case.settings.moe
    experts, count, chosen = moe.num_experts, moe.moe_router_num_groups, moe.moe_router_group_topk
    if (count is None) != (chosen is None):
        yield "--moe-router-num-groups and --moe-router-group-topk go together: give both, or none"
    if experts is None or count is None or chosen is None:
        return
    yield from not_multiple(case, "num_experts", experts, "moe_router_num_groups", count)
    if chosen > count:
        yield (
            f"{case.given('moe_router_group_topk')} exceeds {case.given('moe_router_num_groups')}: "
            f"use {count} or less"
        )
    if moe.moe_router_topk % chosen:
        yield (
            f"{case.given('moe_router_topk')} must be a multiple of "
            f"{case.given('moe_router_group_topk')}: use --moe-router-group-topk "
            f"{nearest_divisors(moe.moe_router_topk, chosen)}"
        )
    elif experts % count == 0 and moe.moe_router_topk > chosen * (experts // count):
        yield (
            f"{case.given('moe_router_topk')} exceeds the {chosen * (experts // count)} experts of "
            f"{chosen} groups: raise --moe-router-group-topk"
        )


def capacity(case: Case) -> Iterator[str]:
    """Check limited expert capacity and token dropping."""
    moe = case.settings.moe
    limited = moe.moe_expert_capacity_factor is not None
    for name, used in (
        ("moe_pad_expert_input_to_capacity", moe.moe_pad_expert_input_to_capacity),
        ("moe_eval_capacity_factor", moe.moe_eval_capacity_factor is not None),
        ("moe_minimum_capacity", moe.moe_minimum_capacity > 0),
        ("moe_capacity_includes_topk", not moe.moe_capacity_includes_topk),
        ("moe_token_drop_policy", moe.moe_token_drop_policy != "probs"),
        ("moe_capacity_scope", moe.moe_capacity_scope != "micro_batch"),
    ):
        if used and not limited:
            yield f"{case.given(name)} needs --moe-expert-capacity-factor: add it or leave this out"
    if limited and moe.moe_router_load_balancing_type == "sinkhorn":
        yield (
            f"{case.given('moe_expert_capacity_factor')} is incompatible with "
            "--moe-router-load-balancing-type sinkhorn: choose aux_loss or leave the factor out"
        )
    if limited:
        yield from _slots(case, moe)
    parallel = case.settings.parallel
    shared = parallel.tensor_model_parallel_size * parallel.context_parallel_size > 1
    # allgather follows the routing map; alltoall assumes a fixed number of slots from each rank.
    fixed_slots = shared and moe.moe_token_dispatcher_type != "allgather"
    if moe.moe_pad_expert_input_to_capacity and fixed_slots and moe.moe_capacity_scope != "rank":
        yield (
            "--moe-pad-expert-input-to-capacity with --tensor-model-parallel-size or "
            "--context-parallel-size above 1 needs slots for each rank: use "
            "--moe-capacity-scope rank, --moe-token-dispatcher-type allgather, or no padding"
        )


def _slots(case: Case, moe: MoESettings) -> Iterator[str]:
    """Check that every expert has a capacity of at least one token."""
    parallel, tokens = case.settings.parallel, case.settings.model.seq_length
    if moe.moe_capacity_scope != "sequence":
        tokens *= case.settings.training.micro_batch_size
    if moe.moe_capacity_scope == "rank":
        ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
        tokens //= ranks
    for name in ("moe_expert_capacity_factor", "moe_eval_capacity_factor"):
        factor, experts = getattr(moe, name), moe.num_experts
        if factor is None or experts is None or moe.moe_router_topk > experts:
            continue
        rule = moe.moe_capacity_includes_topk
        if not expert_slots(factor, tokens, experts, moe.moe_router_topk, rule, 0) and (
            moe.moe_minimum_capacity == 0
        ):
            yield (
                f"{case.given(name)} leaves an expert no slot: round({factor} x {tokens:,} tokens "
                f"of a {moe.moe_capacity_scope.replace('_', '-')} / {experts} experts) is 0; use a "
                f"factor above {experts / 2 / tokens:g}, --moe-minimum-capacity 1 or more, or a "
                "larger --micro-batch-size"
            )


def dispatch(case: Case) -> Iterator[str]:
    """Check the token dispatcher and its overlap."""
    moe, parallel = case.settings.moe, case.settings.parallel
    if moe.num_experts is None:
        return
    if moe.moe_token_dispatcher_type == "flex":
        yield from _flex(case, moe)
    if moe.moe_shared_expert_gate and moe.moe_shared_expert_intermediate_size is None:
        yield "--moe-shared-expert-gate needs --moe-shared-expert-intermediate-size"
    if not moe.moe_shared_expert_overlap:
        return
    if moe.moe_shared_expert_intermediate_size is None:
        yield "--moe-shared-expert-overlap needs --moe-shared-expert-intermediate-size"
    if moe.moe_token_dispatcher_type != "alltoall":
        yield "--moe-shared-expert-overlap needs --moe-token-dispatcher-type alltoall"
    if case.device == "cpu":
        yield "--moe-shared-expert-overlap needs a CUDA device: drop it"
    if parallel.sequence_parallel is False and parallel.tensor_model_parallel_size > 1:
        yield "--moe-shared-expert-overlap needs --sequence-parallel"


def _flex(case: Case, moe: MoESettings) -> Iterator[str]:
    parallel = case.settings.parallel
    if case.device == "cpu":
        yield "--moe-token-dispatcher-type flex needs a CUDA device: use alltoall"
    elif importlib.util.find_spec("deep_ep") is None:
        yield (
            "--moe-token-dispatcher-type flex needs the package deep_ep "
            "(github.com/deepseek-ai/DeepEP): install it or use alltoall"
        )
    if parallel.tensor_model_parallel_size * parallel.expert_model_parallel_size == 1:
        yield (
            "--moe-token-dispatcher-type flex needs --expert-model-parallel-size (or "
            "--tensor-model-parallel-size) above 1: use alltoall"
        )
    if moe.moe_pad_expert_input_to_capacity:
        yield "--moe-pad-expert-input-to-capacity needs --moe-token-dispatcher-type alltoall"


RULES = (presence, parallelism, scores, groups, capacity, dispatch)
