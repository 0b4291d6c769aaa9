"""Time of a rank's experts: grouped matrix products against megatron-core's sequential ones.

    python -m tests.bench.bench_experts [--rounds 7] [--threads 2]

Rounds alternate between the two, so that machine noise affects both. The ratio is of medians of
forward plus backward passes, in wall time and in CPU time, which other programs disturb less.
Freed memory is kept, as in a run (--no-keep-memory disables this). Loads are Dirichlet-skewed, like
those of routers.
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
from megatron.core.transformer.transformer_config import TransformerConfig

from moetron.moe.host.allocator import keep_freed_memory
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


def _skewed_counts(experts: int, rows: int) -> torch.Tensor:
    share = torch.distributions.Dirichlet(torch.full((experts,), 5.0)).sample()
    counts = (share * rows).long()
    counts[0] += rows - counts.sum()
    return counts


def _one_round(module: torch.nn.Module, x: torch.Tensor, counts: torch.Tensor) -> np.ndarray:
    """Return [wall, CPU] seconds of one forward and backward pass."""
    probs = torch.rand(len(x), requires_grad=True)
    grad = torch.randn_like(x)
    start = _clocks()
    out, _ = module(x, counts, probs)
    out.backward(grad)
    elapsed = _clocks() - start
    x.grad = None
    module.zero_grad()
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
    x = torch.randn(TOKENS * topk, hidden, dtype=dtype, requires_grad=True)
    counts = _skewed_counts(experts, len(x))
    pairs = [
        (_one_round(grouped, x, counts), _one_round(sequential, x, counts))
        for _ in range(WARM_UP + rounds)
    ]
    ours, theirs = np.median(pairs[WARM_UP:], axis=0)
    name = f"H{shape[0]} F{shape[1]} E{experts} top{topk} {str(dtype).removeprefix('torch.')}"
    for clock, mine, other in zip(("wall", "CPU"), ours, theirs, strict=True):
        print(
            f"{name}, {clock}: grouped {mine * 1e3:.0f} ms, sequential {other * 1e3:.0f} ms, "
            f"sequential / grouped {other / mine:.2f}"
        )


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
