"""Speed of training on one GPU: ours, megatron-core's own layers, transformers; in one process.

    python -m tests.bench.bench_gpu [--out FOLDER] [--only REGEX] [--variant "NAME=FLAGS" ...]
    python -m tests.bench.bench_gpu --each-flag      (docs/gpu.md's flags, one at a time)
    python -m tests.bench.bench_gpu --kernels
    python -m tests.bench.bench_gpu --loss-steps 200 local fp8-tensorwise-local
    python -m tests.bench.bench_gpu --smoke          (any machine: a tiny shape)

Each variant is built, warmed up, timed, profiled and freed. ``bench.md`` and ``bench.json`` in the
folder are rewritten after each; one that fails has its reason in its row. Shape:
tests/bench/bench_gpu.yaml, OLMoE's width and experts in 4 layers.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from moetron.moe.config.schema.settings import Settings
from moetron.moe.host.device import resolve_device
from moetron.moe.plan.flops import flops_per_token
from tests.bench.gpu import result_files
from tests.bench.gpu.ceilings import measured_ceilings
from tests.bench.gpu.result_files import Result
from tests.bench.gpu.step_meter import GIB, Measured, Plan, Program, measure
from tests.bench.gpu.variants import (
    EACH_FLAG,
    SMOKE,
    VARIANTS,
    Variant,
    holders,
    run_program,
    settings_of,
)

BUDGET_S = 235.0
EXPECTED_S = 20.0
"""Room for one variant: none starts with less left."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    device = resolve_device("auto")
    if options.kernels:
        from tests.bench.gpu.kernel_times import run_kernels

        run_kernels(device, options.out, options.only, options.smoke)
    elif options.loss_steps:
        from tests.bench.gpu.loss_gap import run_losses

        names = options.loss_steps[1:] or ["local", "fp8-tensorwise-local"]
        steps = int(options.loss_steps[0])
        run_losses([_named(name, options) for name in names], steps, flags_of(options), options.out)
    else:
        run_bench(device, options)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench_gpu"), help="folder")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="names to run")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=FLAGS", help="add or replace one"
    )
    parser.add_argument("--flags", default="", help="flags of ours for all variants (the shape)")
    parser.add_argument("--profile", action="append", default=[], metavar="NAME")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a variant")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="of the process's life")
    parser.add_argument("--each-flag", action="store_true", help="single flags against their base")
    parser.add_argument("--kernels", action="store_true", help="time single kernels instead")
    parser.add_argument("--loss-steps", nargs="+", metavar=("STEPS", "NAME"))
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, on any machine")
    return parser.parse_args(argv)


def flags_of(options: argparse.Namespace) -> list[str]:
    """Return the flags that apply to all variants."""
    return [*(SMOKE if options.smoke else []), *options.flags.split()]


def table(options: argparse.Namespace) -> dict[str, str]:
    """Return the variants with those of the command line."""
    added = (text.partition("=") for text in options.variant)
    known = EACH_FLAG if options.each_flag else VARIANTS
    return {**known, **{name.strip(): text.strip() for name, _, text in added}}


def _named(name: str, options: argparse.Namespace) -> Variant:
    known = table(options)
    if name not in known:
        raise SystemExit(f"no variant {name!r}; there are: {', '.join(known)}")
    return Variant(name, known[name])


def run_bench(device: torch.device, options: argparse.Namespace) -> None:
    """Measure the ceilings and every chosen variant."""
    plan = Plan(1, 2, 1) if options.smoke else Plan(timed=options.steps)
    ceilings = measured_ceilings(device, options.smoke)
    base = settings_of(Variant("shape", ""), plan.steps, flags_of(options))
    rows: list[Result] = []
    head = heading(device, base, ceilings)
    for name, text in table(options).items():
        if not options.only.search(name):
            continue
        rows.append(run_variant(Variant(name, text), plan, options, ceilings))
        head["machine"]["process_s"] = process_age_s()
        result_files.write(options.out, head, rows)
        row = rows[-1]
        rate = f"{row['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in row else row["error"]
        print(f"[{process_age_s():5.0f} s] {name}: {rate}", flush=True)
        if (row.get("left_gib") or 0) > 1:
            print("  left on the device:", *holders(), sep="\n    ", flush=True)
    print((options.out / "bench.md").read_text(encoding="utf-8"))


def run_variant(
    variant: Variant, plan: Plan, options: argparse.Namespace, ceilings: dict[str, float]
) -> Result:
    """Return a variant's row; with ``error`` if it could not be measured."""
    row: Result = {"name": variant.name, "kind": variant.kind, "text": variant.text}
    start, before = time.monotonic(), left_gib()
    if options.budget_s - process_age_s() < EXPECTED_S and not options.smoke:
        return {**row, "error": f"not started: {process_age_s():.0f} s are over"}
    if reason := variant.why_not():
        return {**row, "error": reason}
    try:
        profiled = variant.name in options.profile
        steps = plan.steps + plan.profiled * profiled
        settings = settings_of(variant, steps, flags_of(options))
        path = options.out / f"profile_{re.sub('[^a-z0-9]+', '_', variant.name)}.txt"

        def use(program: Program) -> tuple[float, Measured]:
            built_s = time.monotonic() - start
            return built_s, measure(program, plan, path if profiled else None)

        built_s, found = run_program(variant, settings, use)
    except Exception as error:  # whatever it is belongs into its row
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return {**row, "error": text[:300], "left_gib": left_gib()}
    return {
        **row,
        **asdict(found),
        "peak_gib": None if before is None else (found.peak_gib or 0) - before,
        "wall_over_device": found.wall_over_device,
        **rates(settings, found.step_ms, ceilings),
        "built_s": built_s,
        "took_s": time.monotonic() - start,
        "left_gib": left_gib(),
    }


def rates(settings: Settings, step_ms: float, ceilings: dict[str, float]) -> Result:
    """Return tokens/s and FLOP/s of a step's duration."""
    assert settings.model.vocab_size is not None
    tokens = settings.training.global_batch_size * settings.model.seq_length
    tokens_per_s = tokens / step_ms * 1e3
    tflops = tokens_per_s * flops_per_token(settings, settings.model.vocab_size) / 1e12
    of_peak = tflops / ceilings["bf16_product_tflops_per_s"]
    return {"tokens_per_s": tokens_per_s, "tflops_per_s": tflops, "of_peak": of_peak}


def left_gib() -> float | None:
    """Return the memory in tensors that a freed variant has left behind."""
    return torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else None


def heading(device: torch.device, base: Settings, ceilings: dict[str, float]) -> Result:
    """Return what all rows share."""
    from tests.bench.gpu.megatron_step import DIFFERENCES as MEGATRON
    from tests.bench.gpu.transformers_step import DIFFERENCES as TRANSFORMERS

    model, training = base.model, base.training
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "CPU",
        "shape": (
            f"{model.num_layers} layers of width {model.hidden_size}, {base.moe.num_experts} "
            f"experts, {base.moe.moe_router_topk} a token; sequences of {model.seq_length}, "
            f"{training.micro_batch_size} a micro-batch, {training.global_batch_size} a step."
        ),
        "machine": {"torch": torch.__version__, **ceilings},
        "notes": [*notes(), MEGATRON, TRANSFORMERS],
    }


def notes() -> Iterator[str]:
    """Yield how the columns are measured."""
    yield "wall: median step, end to end on the device, without waiting between steps"
    yield "device: time with at least one kernel running (union over streams), of profiled steps"
    yield "syncs: calls of one step that block the host (torch's debug mode, and event waits)"
    yield "of peak: model FLOPs of moe/plan/flops.py over the bf16 product measured here"
    yield "loss: of the last timed step; x megatron: over the fastest of its rows"


def process_age_s() -> float:
    """Return the seconds since this process started, imports included."""
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return uptime_s - int(ticks) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
