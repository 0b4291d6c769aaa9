"""Time, memory and error of experts on FP8 tensor cores against those in bfloat16, on one device.

    python -m tests.bench.bench_scaled_experts [--tokens 16384] [--hidden 2048] [--ffn 1024]

The default shape is a layer of OLMoE with a micro-batch of four sequences. First the parts of a
layer: device time, and TFLOP/s of products or GB/s of everything else (of the bytes that must be
read and written). Then forward and backward passes of the layer without the weights' copies, which
are made once per optimizer step. On a CPU a small shape checks the program; its times mean nothing.
"""

import argparse
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from moetron.moe.host.adapt import adapt_host
from moetron.moe.kernels import scaled_activation
from moetron.moe.kernels.expert_rows import RowPlan, plan_rows
from moetron.moe.kernels.fp8_rows import quantize_columns, quantize_rows, scaled_grouped_mm
from moetron.moe.layers.experts import GroupedExperts
from moetron.moe.layers.scaled_experts import ScaledGroupedExperts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {"bf16": GroupedExperts, "fp8": ScaledGroupedExperts}


def _experts(kind: type[GroupedExperts], options: argparse.Namespace) -> GroupedExperts:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=options.hidden,
        num_attention_heads=1,
        num_moe_experts=options.experts,
        moe_ffn_hidden_size=options.ffn,
        moe_router_topk=options.topk,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        perform_initialization=False,
    )
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups: Any = SimpleNamespace(ep=alone, expt_tp=alone, expt_dp=alone, tp=alone)
    experts = kind(options.experts, config, pg_collection=groups)
    torch.manual_seed(1)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return experts


def _seconds(work: Callable[[], Any], rounds: int) -> float:
    """Return the median device time; the cache does not keep operands that exceed it."""
    times = []
    for _ in range(rounds + 2):
        if DEVICE == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            work()
            times.append(time.perf_counter() - begun)
    return sorted(times[2:])[rounds // 2]


def _parts(options: argparse.Namespace, plan: RowPlan) -> list[dict[str, Any]]:
    """Return time and rate of the parts of a layer."""
    experts = _experts(ScaledGroupedExperts, options)
    weight1 = experts.weight1.detach()
    tokens, rows, wide = options.tokens, len(plan.source_R), weight1.shape[1]
    x = torch.randn(tokens, options.hidden, device=DEVICE, dtype=torch.bfloat16)
    x_RH, x8 = plan.gather(x), quantize_rows(plan.gather(x))
    w8, w8t = quantize_rows(weight1), quantize_columns(weight1)
    hidden = torch.randn(rows, wide, device=DEVICE, dtype=torch.bfloat16)
    hidden8, grad = quantize_rows(hidden), torch.randn_like(hidden[:, : wide // 2])
    weight_R = torch.rand(rows, device=DEVICE)
    bytes8, act, ends = x8.values[:tokens].view(torch.uint8), experts.activation, plan.ends_E
    size, dtype = weight1.numel(), torch.bfloat16
    flops = 2 * tokens * options.topk * options.hidden * wide
    works: dict[str, tuple[int, Callable[[], Any]]] = {
        "product bf16": (flops, lambda: F.grouped_mm(x_RH, weight1.transpose(1, 2), offs=ends)),
        "product fp8": (flops, lambda: scaled_grouped_mm(x8, w8, ends, dtype)),
        "input gradient bf16": (flops, lambda: F.grouped_mm(hidden, weight1, offs=ends)),
        "input gradient fp8": (flops, lambda: scaled_grouped_mm(hidden8, w8t, ends, dtype)),
        "quantise tokens": (3 * x.numel(), lambda: quantize_rows(x)),
        "quantise weight": (3 * size, lambda: quantize_rows(weight1)),
        "quantise and transpose weight": (3 * size, lambda: quantize_columns(weight1)),
        "gather bf16": (2 * (x.numel() + x_RH.numel()), lambda: plan.gather(x)),
        "gather fp8": (x.numel() + x_RH.numel(), lambda: plan.gather(bytes8)),
        "activation bf16": (3 * hidden.numel(), lambda: act.forward(hidden, weight_R)),
        "activation fp8": (
            5 * hidden.numel() // 2,
            lambda: scaled_activation.forward(act, hidden, weight_R),
        ),
        "activation's gradient bf16": (
            6 * hidden.numel(),
            lambda: act.backward(grad, hidden, weight_R),
        ),
        "activation's gradient fp8": (
            7 * hidden.numel(),
            lambda: scaled_activation.backward(act, grad, hidden, weight_R),
        ),
    }
    found = []
    for name, (amount, work) in works.items():
        seconds = _seconds(work, options.rounds)
        unit, per = ("TFLOP/s", 1e12) if amount == flops else ("GB/s", 1e9)
        found.append(
            {"part": name, "ms": seconds * 1e3, "rate": amount / seconds / per} | {"unit": unit}
        )
    return found


def _layer(options: argparse.Namespace, kind: str, plan: RowPlan) -> dict[str, Any]:
    """Return time, memory and results of forward and backward passes of a layer."""
    experts = _experts(KINDS[kind], options)
    torch.manual_seed(2)
    x = torch.randn(options.tokens, options.hidden, device=DEVICE, dtype=torch.bfloat16)
    grad = torch.randn_like(x)
    probs = torch.rand(plan.map_shape, device=DEVICE).requires_grad_()
    x.requires_grad_()

    def step() -> torch.Tensor:
        experts.zero_grad()
        x.grad = probs.grad = None
        out, _ = experts(x, plan, probs)
        out.backward(grad)
        return out.detach()

    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, out = _seconds(step, options.rounds), step()
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
    gradients = {name: weight.grad for name, weight in experts.named_parameters()}
    results = {"out": out, "x": x.grad, "probs": probs.grad, **gradients}
    return {"ms": seconds * 1e3, "peak_gib": peak, "results": results}


def main() -> None:
    """Print a line for each part and layer, then one of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"tokens": 16384, "hidden": 2048, "ffn": 1024, "experts": 64, "topk": 8, "rounds": 11}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    adapt_host()
    torch.manual_seed(0)
    scores = torch.randn(options.tokens, options.experts, device=DEVICE)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(
        1, scores.topk(options.topk)[1], True
    )
    plan = plan_rows(chosen, options.topk)
    parts = _parts(options, plan)
    for part in parts:
        print(f"{part['part']:32} {part['ms']:9.3f} ms {part['rate']:9.1f} {part['unit']}")
    layers = {kind: _layer(options, kind, plan) for kind in KINDS}
    results = [layer.pop("results") for layer in layers.values()]
    errors = {
        name: float((results[1][name] - plain).float().norm() / plain.float().norm())
        for name, plain in results[0].items()
    }
    for kind, layer in layers.items():
        print(
            f"layer {kind}: forward and backward {layer['ms']:.3f} ms, peak {layer['peak_gib']} GiB"
        )
    print("relative error:", ", ".join(f"{name} {error:.4f}" for name, error in errors.items()))
    print(json.dumps({"device": DEVICE, "parts": parts, "layers": layers, "errors": errors}))


if __name__ == "__main__":
    main()
