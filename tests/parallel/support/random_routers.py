"""Random routers and capacities for the models of random_layouts.py."""

import random
from typing import Any

Values = dict[str, Any]

_TOKENS_CHOOSE = ("random_second", "noisy_topk")
"""Routers that use megatron-core's top-k, and so support groups and a scaling factor."""
_KINDS = (
    *("expert_choice", "base", "straight_through", "gumbel", "relaxed_topk", "reinforce", "hash"),
    *_TOKENS_CHOOSE,
)


def another_router(rng: random.Random, values: Values) -> Values:
    """Draw a router other than top-k half of the time, and sometimes options of any router."""
    kind = rng.choice(("topk", *_KINDS)) if rng.random() < 0.55 else "topk"
    changes: Values = {} if kind == "topk" else _kind(rng, kind, values)
    balance = changes.get(
        "moe_router_load_balancing_type", values["moe_router_load_balancing_type"]
    )
    if kind != "hash" and rng.random() < 0.15:
        changes["moe_input_jitter_eps"] = 0.1
    if balance.endswith("aux_loss") and rng.random() < 0.2:
        changes["moe_aux_loss_first_choice_only"] = True
    if "moe_expert_capacity_factor" in {**values, **changes} and kind != "expert_choice":
        changes["moe_token_drop_policy"] = rng.choice(
            ("probs", "position", "choice", "batch_prioritized")
        )
    return changes


def _kind(rng: random.Random, kind: str, values: Values) -> Values:
    """Draw settings that a router needs, and mostly none that it rejects."""
    one, limited = values["moe_router_topk"] == 1, "moe_expert_capacity_factor" in values
    balance = values["moe_router_load_balancing_type"]
    changes: Values = {
        "moe_router_type": kind,
        "moe_router_score_function": sound(rng, "softmax", "sigmoid"),
        "moe_router_enable_expert_bias": False,
        "moe_router_pre_softmax": one or rng.random() < 0.5,
        "moe_router_load_balancing_type": sound(rng, "none", balance),
        "moe_global_aux_loss_counts": "running",
        "moe_aux_loss_coeff": 0.0,
    }
    if kind not in ("expert_choice", "base", "hash"):
        balance = rng.choice(("aux_loss", "seq_aux_loss", "global_aux_loss"))
        if kind == "noisy_topk" and rng.random() < 0.5:
            balance = "noisy_load"
        changes["moe_router_load_balancing_type"] = balance
        changes["moe_aux_loss_coeff"] = rng.choice((0.01, 0.05))
        if balance == "global_aux_loss":
            changes["moe_global_aux_loss_counts"] = "previous_step"
    if kind not in _TOKENS_CHOOSE:
        for name in ("moe_router_num_groups", "moe_router_group_topk"):
            changes[name] = None
        changes["moe_router_topk_scaling_factor"] = sound(rng, None, 2.5)
    if kind in ("expert_choice", "random_second") and not limited:
        changes |= capacity(rng, values)
    return changes | _particular(rng, kind, values)


def _particular(rng: random.Random, kind: str, values: Values) -> Values:
    temperature = {"moe_router_temperature": rng.choice((1.0, 2.0))}
    if kind == "expert_choice":
        return {"moe_router_pre_softmax": True, "moe_token_drop_policy": "probs"}
    if kind == "base":
        return {
            "moe_router_topk": sound(rng, 1, 2),
            "moe_router_score_function": "sigmoid",
            "moe_router_pre_softmax": False,
        }
    if kind == "random_second":
        return {
            "moe_router_topk": max(values["moe_router_topk"], 2),
            "moe_router_pre_softmax": False,
            "moe_second_expert_threshold": rng.choice((0.2, 0.9)),
        }
    if kind == "straight_through":
        return {"moe_router_pre_softmax": True}
    if kind == "gumbel":
        anneal = {"moe_router_anneal_samples": rng.choice((None, 36))}
        return {"moe_router_pre_softmax": True, **temperature, **anneal}
    if kind == "relaxed_topk":
        return temperature
    if kind == "reinforce":
        return {"moe_router_pre_softmax": False}
    if kind == "hash":
        return {"moe_router_pre_softmax": False, "moe_z_loss_coeff": sound(rng, None, 0.01)}
    return {}


def capacity(rng: random.Random, layout: Values) -> Values:
    """Draw a capacity; scope ``rank`` depends on TP and CP: comparable only if both are 1."""
    is_split = layout["tensor_model_parallel_size"] * layout["context_parallel_size"] > 1
    return {
        "moe_expert_capacity_factor": rng.choice((0.5, 1.25, 4.0)),
        "moe_capacity_scope": mostly(
            rng, "micro_batch", "sequence", *(() if is_split else ("rank",))
        ),
        "moe_capacity_includes_topk": rng.random() < 0.7,
        "moe_minimum_capacity": rng.choice((0, 4)),
        "moe_token_drop_policy": rng.choice(("probs", "position")),
        "moe_pad_expert_input_to_capacity": rng.random() < (0.15 if is_split else 0.4),
    }


def mostly(rng: random.Random, usual: Any, *others: Any) -> Any:
    """Return ``usual`` in three of four draws."""
    return usual if rng.random() < 0.75 else rng.choice(others)


def sound(rng: random.Random, usual: Any, *unsound: Any) -> Any:
    """Return mostly ``usual``; the others fit only some layouts, or none."""
    return usual if rng.random() < 0.96 else rng.choice(unsound)
