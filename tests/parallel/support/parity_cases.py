"""The layouts that are compared with one process, and the tiny model that they train."""

from typing import Any

from moetron.moe.config.schema.settings import Settings
from moetron.moe.plan.named_layouts import parse
from moetron.moe.verify.parity import Tolerance
from tests.unit.config.config_cases import found, make

MODES: dict[str, dict[str, Any]] = {
    "dropless": {},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "capacity": {"moe_expert_capacity_factor": 1.25},
    "sequential": {"moe_grouped_gemm": False},
}

QUICK = {
    "dropless": ("dp2zero1", "tp2", "tp2ep2etp1", "pp2vpp2", "ep2", "cp2ep2"),
    "capacity": ("tp2", "cp2ep2"),
    "sequential": ("etp2",),
}
"""Layouts compared in every test run, by mode: two ranks each."""

FULL = (
    *("dp2", "dp2zero1", "dp2ep2zero1", "tp2", "tp2etp1", "tp2ep2etp1", "pp2", "pp2vpp2"),
    *("ep2", "etp2", "cp2", "cp2ep2"),
    *("tp4", "pp4", "pp4vpp2", "ep4", "ep2etp2", "tp2ep2", "tp2pp2", "tp2pp2etp1", "pp2ep2"),
    *("pp2vpp2ep2", "pp2cp2", "pp2vpp2cp2", "cp4", "tp2cp2", "tp2cp2ep2", "tp2cp2ep2etp1"),
    *("dp4zero1", "dp4ep2zero1"),
    *("tp2pp2ep2", "tp2pp2ep2etp1dp2", "tp2pp2vpp2ep2", "tp2pp2cp2", "pp2cp2ep2dp2zero1"),
)
"""Layouts compared by `bash tests/run.sh --parallel-full`."""

MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 48,
    "seq_length": 16,
    "vocab_size": 96,
    "make_vocab_size_divisible_by": 8,  # times 4 tensor ranks is still a divisor
    "qk_layernorm": True,
    "qk_layernorm_scope": "full",
    "init_method_std": 0.2,  # so that every gradient is far from zero
    "moe_ffn_hidden_size": 16,
    "moe_router_pre_softmax": True,
    "moe_aux_loss_coeff": 0.05,
    "moe_z_loss_coeff": 0.01,
    "moe_shared_expert_intermediate_size": 16,
    "global_batch_size": 8,
    "lr": 5e-3,
    "lr_warmup_iters": 2,
    "finetune": True,
}


def layouts(ranks: int) -> list[str]:
    """Return the layouts with this number of ranks."""
    return [name for name in FULL if parse(name).smallest_world_size == ranks]


def num_layers(layout: str) -> int:
    """Return the number of layers to test a layout: at least one per virtual stage."""
    sizes = parse(layout)
    return max(2, sizes.pp * sizes.vpp)


def settings(layout: str, layers: int, device: str = "cpu", **changes: Any) -> Settings:
    """Return settings of a run in ``layout``; the first of more than two layers is dense."""
    sizes = parse(layout)
    frequency = [int(layers == 2), *[1] * (layers - 1)]
    values = {
        **MODEL,
        "num_layers": layers,
        "moe_layer_freq": frequency,
        **sizes.values(layers),
        **changes,
    }
    assert found(sizes.smallest_world_size, device, te=device == "cuda", **values) == []
    return make(**values)


def tolerance(layout: str) -> Tolerance:
    """Return the tolerance against one process: tensor ranks split sums, others reorder."""
    if parse(layout).tp > 1:
        return Tolerance(loss=1e-5, grad_norm=1e-3, gradient=1e-5)
    return Tolerance(loss=1e-6, grad_norm=1e-5, gradient=1e-5)
