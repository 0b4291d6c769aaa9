"""Random models in random layouts: many valid, many not, most with several features.

Settings that a draw does not set have their defaults, so every new flag is off here until
it is added below.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moetron.moe.config.schema.settings import Settings
from tests.parallel.support.random_routers import another_router, capacity, mostly, sound
from tests.unit.config.config_cases import found, make

Values = dict[str, Any]

_LAYOUT = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel"),
    *("num_layers_per_virtual_pipeline_stage", "pipeline_model_parallel_layout"),
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    "use_distributed_optimizer",
    *("overlap_grad_reduce", "overlap_param_gather", "attention_backend"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"),
    *("moe_token_dispatcher_type", "moe_grouped_gemm", "moe_pad_expert_input_to_capacity"),
)
"""Settings that must not change the results of training."""


@dataclass(frozen=True)
class Draw:
    """A model, a layout and the number of ranks."""

    seed: int
    ranks: int
    values: Values

    @property
    def settings(self) -> Settings:
        """Settings without checks."""
        return make(**self.values)

    @property
    def problems(self) -> list[str]:
        """Problems found by our checks."""
        return found(self.ranks, **self.values)

    @property
    def one_rank(self) -> Settings:
        """The same model on one process, with the simplest implementation."""
        model = {name: value for name, value in self.values.items() if name not in _LAYOUT}
        rows = model["make_vocab_size_divisible_by"] * self.values["tensor_model_parallel_size"]
        return make(**{**model, "make_vocab_size_divisible_by": rows})


def draw(seed: int) -> Draw:
    """Return the draw of a seed, the same on every machine."""
    rng = random.Random(seed)
    layout = _layout(rng)
    groups = [_batch(rng, layout), _model(rng, layout), _memory(rng)]
    values: Values = {"finetune": True, **layout}
    for group in groups:
        values.update(group)
    if rng.random() < 0.85:
        values.update(_experts(rng, layout))
    else:
        values["num_experts"] = None
    ranks = _ranks(rng, values)
    values |= _stages(rng, values)
    if values["num_experts"] is not None:
        values |= another_router(rng, values)
    return Draw(seed, ranks, values)


def _layout(rng: random.Random) -> Values:
    """Draw parallel sizes whose dense side fits eight ranks."""
    tp, pp, cp = 8, 8, 8
    while tp * pp * cp > 8:
        tp, pp, cp = (rng.choices((1, 2, 3, 4), (6, 4, 0.3, 1.5))[0] for _ in range(3))
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "sequence_parallel": sound(rng, None, True, False),
        "use_distributed_optimizer": (zero := rng.random() < 0.4),
        "overlap_grad_reduce": (overlap := rng.random() < 0.25),
        "overlap_param_gather": zero and overlap and rng.random() < 0.5,
    }


def _stages(rng: random.Random, values: Values) -> Values:
    """Draw unequal stages, if there are several, in one of the three ways to specify them."""
    stages = values["pipeline_model_parallel_size"]
    way = rng.choice(("alike", "ends", "accounts", "written", "written"))
    if stages == 1 or way == "alike":
        return {}
    if way == "accounts":
        embedding, loss = rng.choice(((True, False), (False, True), (True, True)))
        return {
            "account_for_embedding_in_pipeline_split": embedding,
            "account_for_loss_in_pipeline_split": loss,
            "num_layers": sound(rng, stages * rng.choice((2, 3)) - embedding - loss, 4),
        }
    if way == "ends":
        first, last = rng.choice(((1, None), (2, None), (None, 1), (None, 3), (2, 1), (1, 3)))
        others = (stages - (first is not None) - (last is not None)) * rng.choice((1, 2))
        return {
            "decoder_first_pipeline_num_layers": first,
            "decoder_last_pipeline_num_layers": last,
            "num_layers_per_virtual_pipeline_stage": sound(rng, None, 1),
            "num_layers": sound(rng, (first or 0) + (last or 0) + others, 5),
        }
    return _written(rng, stages, values["mtp_num_layers"] or 0)


def _written(rng: random.Random, stages: int, predictors: int) -> Values:
    """Draw an explicit layout, plain or of two rounds; the ends may have no layer."""
    inner = [rng.choice((1, 1, 2)) for _ in range(stages * rng.choice((1, 1, 2)) - 2)]
    first = rng.choice((0, 1, 2))
    sizes = [first, *inner, rng.choice((0, 1, 2)) if first else rng.choice((1, 2, 3))]
    chunks = ["t" * size for size in sizes]
    chunks[0] = "E" + chunks[0]
    chunks[-1] += "m" * predictors + "L"
    return {
        "pipeline_model_parallel_layout": "|".join(chunks),
        "num_layers_per_virtual_pipeline_stage": sound(rng, None, 1),
        "num_layers": sound(rng, sum(sizes), sum(sizes) + 1),
    }


def _ranks(rng: random.Random, values: Mapping[str, Any]) -> int:
    """Draw the ranks: mostly a multiple of what both sides need, if that is at most eight."""
    dense = values["tensor_model_parallel_size"] * values["context_parallel_size"]
    width = values.get("expert_tensor_parallel_size") or values["tensor_model_parallel_size"]
    experts = width * values.get("expert_model_parallel_size", 1)
    stages = values["pipeline_model_parallel_size"]
    fitting = [
        ranks for ranks in range(1, 9) if ranks % (dense * stages) + ranks % (experts * stages) == 0
    ]
    if not fitting or rng.random() < 0.05:
        return rng.randint(1, 8)
    return rng.choices(fitting, [1 / ranks for ranks in fitting])[0]


def _batch(rng: random.Random, layout: Values) -> Values:
    unit = layout["context_parallel_size"] * layout["tensor_model_parallel_size"]
    return {
        "seq_length": sound(rng, 24 if unit % 3 == 0 else 16, 8, 12, 20),
        "micro_batch_size": sound(rng, rng.choice((1, 1, 2)), 3, 5),
        "global_batch_size": sound(rng, 24, 8, 12),
        "calculate_per_token_loss": rng.random() < 0.8,
        "train_iters": 20,
        "lr": rng.choice((1e-3, 1e-2)),
        "lr_warmup_iters": rng.choice((0, 2)),
        "optimizer": "adam" if layout["use_distributed_optimizer"] else mostly(rng, "adam", "sgd"),
        "clip_grad": rng.choice((1.0, 0.1, 0.0)),
        "decay_norms_and_biases": rng.random() < 0.5,
        "seed": rng.randrange(1000),
    }


def _model(rng: random.Random, layout: Values) -> Values:
    tp, pp = layout["tensor_model_parallel_size"], layout["pipeline_model_parallel_size"]
    heads = 12 if tp == 3 else 8
    chunk = mostly(rng, None, sound(rng, 1, 2))
    attention = sound(rng, "auto", "unfused")
    per_stage = rng.choice((1, 2, 2, 3))
    norm = mostly(rng, "RMSNorm", "LayerNorm")
    qk_norm = rng.random() < 0.4
    scope = mostly(rng, "full", "head") if qk_norm and norm == "RMSNorm" else "head"
    return {
        "num_layers": sound(rng, pp * per_stage, pp * per_stage + 1),
        "num_layers_per_virtual_pipeline_stage": chunk if pp > 1 else None,
        "hidden_size": 48 if tp == 3 else 32,
        "num_attention_heads": sound(rng, heads, 6, 2),
        "num_query_groups": rng.choice((None, heads // 2, mostly(rng, tp, 1))),
        "kv_channels": mostly(rng, None, sound(rng, 8, 5)),
        "ffn_hidden_size": sound(rng, 48, 40, 30),
        "vocab_size": 90,
        "make_vocab_size_divisible_by": 8,
        "init_method_std": 0.2,
        "normalization": norm,
        "qk_layernorm": qk_norm,
        "qk_layernorm_scope": scope,
        "position_embedding_type": mostly(rng, "rope", "none"),
        "rotary_percent": mostly(rng, 1.0, 0.5),
        "swiglu": rng.random() < 0.7,
        "add_bias_linear": rng.random() < 0.08,
        "add_qkv_bias": rng.random() < 0.15,
        "untie_embeddings_and_output_weights": rng.random() < 0.7,
        "attention_backend": "auto" if layout["context_parallel_size"] > 1 else attention,
        **(_latent(rng) if rng.random() < 0.12 else {}),
        "mtp_num_layers": 1 if rng.random() < 0.08 else None,
    }


def _latent(rng: random.Random) -> Values:
    return {
        "multi_latent_attention": True,
        "num_query_groups": None,
        "kv_channels": None,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm_scope": "head",
        "position_embedding_type": "rope",
        "q_lora_rank": rng.choice((None, 12)),
        "kv_lora_rank": sound(rng, 8, 7),
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 6,
        "attention_backend": "auto",
    }


def _memory(rng: random.Random) -> Values:
    """Draw recomputation settings."""
    kind = rng.choice((None, None, None, "selective", "full"))
    if kind is None:
        return {}
    if kind == "full":
        method = rng.choice(("uniform", "block"))
        layers = sound(rng, 1, 2)
        return {
            "recompute_granularity": kind,
            "recompute_method": method,
            "recompute_num_layers": layers,
        }
    parts = ["core_attn", "layernorm", "mlp", "moe", sound(rng, "shared_experts", "moe_act")]
    modules = rng.sample(parts, rng.choice((1, 2)))
    return {"recompute_granularity": kind, "recompute_modules": modules}


def _experts(rng: random.Random, layout: Values) -> Values:
    ep = rng.choices((1, 2, 3, 4), (4, 5, 0.4, 2))[0]
    values = {
        "num_experts": sound(rng, 12 if ep == 3 else 8, 6, 4),
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": rng.choice((None, None, 1, 2)),
        "moe_layer_freq": mostly(rng, 1, 2),
        "moe_ffn_hidden_size": mostly(rng, 16, 24, 12, sound(rng, 48, 15)),
        "moe_grouped_gemm": rng.random() < 0.75,
        "moe_shared_expert_intermediate_size": (shared := rng.choice((None, 16))),
        "moe_shared_expert_gate": shared is not None and rng.random() < 0.3,
        "moe_token_dispatcher_type": rng.choice(("alltoall", "alltoall", "allgather")),
        "moe_z_loss_coeff": rng.choice((None, 0.01)),
    }
    values |= _router(rng)
    if rng.random() < 0.35:
        values |= capacity(rng, layout)
    return values


def _router(rng: random.Random) -> Values:
    topk = rng.choice((1, 2, 2, 3, 4))
    sigmoid = rng.random() < 0.25
    balance = mostly(rng, "aux_loss", "seq_aux_loss", "global_aux_loss", "none")
    balance = balance if sigmoid else sound(rng, balance, "sinkhorn")
    grouped = topk != 3 and rng.random() < 0.2
    scope = {"moe_global_aux_loss_counts": "previous_step"} if "global" in balance else {}
    return {
        "moe_router_topk": topk,
        "moe_router_score_function": "sigmoid" if sigmoid else "softmax",
        "moe_router_pre_softmax": not sigmoid and (topk == 1 or rng.random() < 0.5),
        "moe_router_enable_expert_bias": sigmoid and rng.random() < 0.6,
        "moe_router_topk_scaling_factor": mostly(rng, None, 2.5),
        "moe_router_num_groups": 4 if grouped else None,
        "moe_router_group_topk": sound(rng, 2 if topk % 2 == 0 else 1, 3) if grouped else None,
        "moe_router_load_balancing_type": balance,
        "moe_aux_loss_coeff": 0.0 if balance in ("sinkhorn", "none") else rng.choice((0.0, 0.05)),
        **scope,
    }
