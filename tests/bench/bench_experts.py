"""Time of a rank's routed experts: our dispatcher and grouped products against megatron-core's.

    python -m tests.bench.bench_experts [--rounds 7] [--threads 2]

Three ways from tokens and a routing map to their outputs: ours (`LocalDispatcher`, whose plan
`GroupedExperts` follows), our experts behind megatron-core's all-to-all dispatcher, and
megatron-core's sequential experts behind it. Rounds alternate between them, so that machine noise
affects all. Ratios are of medians of forward plus backward passes, in wall time and in CPU time,
which other programs disturb less. Freed memory is kept, as in a run (--no-keep-memory disables
this). Loads are Dirichlet-skewed, like those of routers.
"""

import argparse
import time
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from moetron.moe.host.allocator import keep_freed_memory
from moetron.moe.layers.dispatcher import LocalDispatcher
from moetron.moe.layers.experts import GroupedExperts
from tests.parallel.support.harness import model_parallel

SHAPES = ((512, 256, 16, 4), (256, 128, 64, 8))  # H, F, experts, top-k
TOKENS = 4096
WARM_UP = 2


def _config(
    hidden: int, ffn: int, experts: int, topk: int, dtype: torch.dtype
) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=4,
        num_moe_experts=experts,
        moe_ffn_hidden_size=ffn,
        moe_router_topk=topk,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
    )


def _skewed_map(experts: int, topk: int) -> torch.Tensor:
    """Return a map of ``topk`` experts for each token, some experts much more popular."""
    share = torch.distributions.Dirichlet(torch.full((experts,), 5.0)).sample()
    chosen = torch.multinomial(share.expand(TOKENS, -1), topk)
    return torch.zeros(TOKENS, experts, dtype=torch.bool).scatter_(1, chosen, True)


def _one_round(
    dispatcher: MoETokenDispatcher, experts: torch.nn.Module, x: torch.Tensor, map_TE: torch.Tensor
) -> np.ndarray:
    """Return [wall, CPU] seconds of one forward and backward pass."""
    probs = (torch.rand(map_TE.shape) * map_TE).requires_grad_()
    grad = torch.randn_like(x)
    start = _clocks()
    tokens, weights = dispatcher.dispatch_preprocess(x, map_TE, probs)
    rows, counts, weights = dispatcher.dispatch_postprocess(
        *dispatcher.token_dispatch(tokens, weights)
    )
    out, _ = experts(rows, counts, weights)
    out = dispatcher.token_combine(dispatcher.combine_preprocess(out))
    dispatcher.combine_postprocess(out).backward(grad)
    elapsed = _clocks() - start
    x.grad = None
    experts.zero_grad()
    return elapsed


def _clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def _compare(shape: tuple[int, int, int, int], dtype: torch.dtype, rounds: int) -> None:
    hidden, _, experts, topk = shape
    config = _config(*shape, dtype)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    grouped = GroupedExperts(experts, config, pg_collection=groups)
    sequential = SequentialMLP(experts, config, linear, pg_collection=groups)
    exchange = MoEAlltoAllTokenDispatcher(experts, list(range(experts)), config, groups)
    ways = {
        "ours": (LocalDispatcher(config, groups), grouped),
        "exchanged": (exchange, grouped),
        "sequential": (exchange, sequential),
    }
    x = torch.randn(TOKENS, 1, hidden, dtype=dtype, requires_grad=True)
    map_TE = _skewed_map(experts, topk)
    times = [
        [_one_round(*way, x, map_TE) for way in ways.values()] for _ in range(WARM_UP + rounds)
    ]
    medians = np.median(times[WARM_UP:], axis=0)
    name = f"H{shape[0]} F{shape[1]} E{experts} top{topk} {str(dtype).removeprefix('torch.')}"
    for clock, (ours, *others) in zip(("wall", "CPU"), medians.T, strict=True):
        line = f"{name}, {clock}: ours {ours * 1e3:.0f} ms"
        for way, other in zip(list(ways)[1:], others, strict=True):
            line += f", {way} {other * 1e3:.0f} ms ({other / ours:.2f} x)"
        print(line)


def main() -> None:
    """Print two lines per shape and dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-keep-memory", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.no_keep_memory:
        keep_freed_memory()
    with model_parallel():
        for shape, dtype in product(SHAPES, (torch.float32, torch.bfloat16)):
            _compare(shape, dtype, options.rounds)


if __name__ == "__main__":
    main()
