"""Requirements and exclusions of each --moe-router-type."""

import importlib.util
from collections.abc import Iterator
from functools import partial

from moetron.moe.config.rules.case import Case
from moetron.moe.config.schema.experts import EVEN_WEIGHTS
from moetron.moe.config.schema.field import flag_name

_EVEN = ("expert_choice", "base")  # exactly balanced, without a loss
_TOKENS_CHOOSE = ("topk", "random_second", "noisy_topk")  # through megatron-core's own top-k
_SOFTMAX_OVER_ALL = ("expert_choice", "straight_through", "gumbel")
_NEEDS_LOGITS = (
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_input_jitter_eps",
    "moe_router_init_method_std",
    "moe_router_enable_expert_bias",
)
"""Settings that hash routing cannot use: it has no logits."""
_READERS = {
    "moe_expert_choice_eval": ("expert_choice",),
    "moe_second_expert_threshold": ("random_second",),
    "moe_router_temperature": ("gumbel", "relaxed_topk"),
    "moe_router_anneal_samples": ("gumbel",),
    "moe_router_final_temperature": ("gumbel",),
}
"""Settings that only some routers read."""


def readers(case: Case) -> Iterator[str]:
    """Check settings that the router does not read."""
    moe = case.settings.moe
    for name, kinds in _READERS.items():
        changed = getattr(moe, name) != type(moe).model_fields[name].default
        if changed and moe.moe_router_type not in kinds:
            yield f"{case.given(name)} needs --moe-router-type {' or '.join(kinds)}"
    if moe.moe_router_load_balancing_type == "noisy_load" and moe.moe_router_type != "noisy_topk":
        yield "--moe-router-load-balancing-type noisy_load needs --moe-router-type noisy_topk"
    scoped = ("aux_loss", "seq_aux_loss", "global_aux_loss")
    if moe.moe_aux_loss_first_choice_only and moe.moe_router_load_balancing_type not in scoped:
        yield (
            "--moe-aux-loss-first-choice-only needs --moe-router-load-balancing-type "
            f"{', '.join(scoped[:-1])} or {scoped[-1]}"
        )


def kinds(case: Case) -> Iterator[str]:
    """Check routers other than plain top-k."""
    moe, kind = case.settings.moe, case.settings.moe.moe_router_type
    router = f"--moe-router-type {kind}"
    if kind == "topk":
        return
    if moe.num_experts is None:
        yield f"{router} needs --num-experts"
        return
    if moe.moe_router_load_balancing_type == "sinkhorn":
        yield f"{router} and --moe-router-load-balancing-type sinkhorn both assign: use one of them"
    if kind in _EVEN and moe.moe_aux_loss_coeff:
        yield f"{router} needs no balance loss: drop {case.given('moe_aux_loss_coeff')}"
    if kind not in _TOKENS_CHOOSE:
        for name in ("moe_router_num_groups", "moe_router_topk_scaling_factor"):
            if getattr(moe, name) is not None:
                yield f"{case.given(name)} is incompatible with {router}: leave it out"
    if kind in EVEN_WEIGHTS and moe.moe_router_pre_softmax:
        yield f"{router} gives every expert weight 1 / k: drop --moe-router-pre-softmax"
    if kind in EVEN_WEIGHTS and case.settings.model.mtp_num_layers is not None:
        yield f"{router} routes only the main model's tokens: drop --mtp-num-layers"
    if kind in _SOFTMAX_OVER_ALL and not moe.moe_router_pre_softmax:
        yield f"{router} needs a softmax over all experts: add --moe-router-pre-softmax"
    wanted = "sigmoid" if kind == "base" else "softmax"
    if moe.moe_router_score_function != wanted:
        yield f"{router} needs --moe-router-score-function {wanted}"
    yield from _particular(case, router)


def _particular(case: Case, router: str) -> Iterator[str]:
    moe, kind = case.settings.moe, case.settings.moe.moe_router_type
    if kind == "base" and importlib.util.find_spec("scipy") is None:
        yield f"{router} needs the package scipy: install moetron[base]"
    if kind == "base" and moe.moe_router_topk != 1:
        yield f"{router} gives each token one expert: use --moe-router-topk 1"
    if kind == "random_second":
        if moe.moe_router_topk < 2:
            yield f"{router} needs --moe-router-topk 2 or more"
        if moe.moe_router_pre_softmax:
            yield f"{router} renormalises the weights: drop --moe-router-pre-softmax"
    if kind in ("expert_choice", "random_second"):  # tokens have more or fewer than k experts
        if moe.moe_expert_capacity_factor is None:
            yield f"{router} needs --moe-expert-capacity-factor (expert_choice: 1 for k per token)"
        if moe.moe_token_dispatcher_type == "flex":
            yield f"{router} needs --moe-token-dispatcher-type alltoall or allgather"
    if kind == "expert_choice" and moe.moe_token_drop_policy != "probs":
        yield f"{case.given('moe_token_drop_policy')} is incompatible with {router}: leave it out"
    if kind == "hash":
        for name in filter(partial(getattr, moe), _NEEDS_LOGITS):
            yield f"{case.given(name)} is incompatible with {router}, which has no logits: drop it"
    if kind == "reinforce" and case.settings.parallel.pipeline_model_parallel_size > 1:
        yield (
            f"{router} needs token losses, which only the last pipeline stage has: use "
            "--pipeline-model-parallel-size 1"
        )
    if kind == "base" and moe.moe_router_enable_expert_bias:
        flag = flag_name("moe_router_enable_expert_bias")
        yield f"{flag} is incompatible with {router}: leave it out"


RULES = (readers, kinds)
