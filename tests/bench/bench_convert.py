"""Time and memory of converting a checkpoint of OLMoE-1B-7B's shape in both directions.

    python tests/bench/bench_convert.py --folder SCRATCH [--layers 16]

The HuggingFace folder is a sparse file of zeros; the output is not: 2 x 13.8 GB at 16 layers. Also
prints the write speed of the disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from moetron.moe.config.schema.settings import Settings
from moetron.moe.convert.families.family import PLACEHOLDERS, function_of
from moetron.moe.convert.families.registry import FAMILIES
from moetron.moe.convert.safetensors_folder import SINGLE, header

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"
GB = 10**9


def make_folder(folder: Path, layers: int) -> int:
    """Write a sparse folder of bf16 zeros; return its size in bytes."""
    model = {
        "num_layers": layers,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "seq_length": 4096,
        "vocab_size": 50304,
        "qk_layernorm": True,
        "qk_layernorm_scope": "full",
    }
    moe = {
        "num_experts": 64,
        "moe_ffn_hidden_size": 1024,
        "moe_router_topk": 8,
        "moe_router_pre_softmax": True,
    }
    values = function_of(Settings.model_validate({**PLACEHOLDERS, "model": model, "moe": moe}))
    config = FAMILIES["olmoe"].config(values)
    plan = {}
    for rule in FAMILIES["olmoe"].rules(values):
        ours = torch.empty(shape_of(rule.ours), dtype=torch.bfloat16, device="meta")
        plan.update(zip(rule.theirs, rule.transform.split(ours), strict=True))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    start = header(plan)
    size = sum(tensor.nbytes for tensor in plan.values())
    with (folder / SINGLE).open("wb") as file:
        file.write(start)
        file.truncate(len(start) + size)
    return size


def shape_of(name: str) -> tuple[int, ...]:
    """Return the shape of one of our tensors in OLMoE-1B-7B."""
    hidden, ffn, experts, vocabulary = 2048, 1024, 64, 50304
    shapes = {
        "word_embeddings.weight": (vocabulary, hidden),
        "output_layer.weight": (vocabulary, hidden),
        "linear_qkv.weight": (3 * hidden, hidden),
        "linear_proj.weight": (hidden, hidden),
        "router.weight": (experts, hidden),
        "experts.linear_fc1.weight": (experts, 2 * ffn, hidden),
        "experts.linear_fc2.weight": (experts, hidden, ffn),
    }
    return next((shape for end, shape in shapes.items() if name.endswith(end)), (hidden,))


def timed(*arguments: str) -> tuple[float, float, float]:
    """Run the tool; return (wall seconds, CPU seconds, peak resident GB)."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(TOOL), *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments[0]} failed")
    seconds = time.perf_counter() - started
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / GB


def disk_speed(folder: Path) -> float:
    """Return GB/s of writing 2 GB of zeros with fsync."""
    block, path = bytes(10**8), folder / "speed"
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(20):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return 2 / seconds


def main() -> None:
    """Print one line per direction."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=16)
    arguments = parser.parse_args()
    scratch = arguments.folder / "bench_convert"
    scratch.mkdir(parents=True)
    try:
        size = make_folder(scratch / "hf", arguments.layers) / GB
        print(
            f"{size:.1f} GB of weights; the disk takes {disk_speed(scratch):.2f} GB/s", flush=True
        )
        paths = {"from-hf": ("hf", "run"), "to-hf": ("run", "back")}
        for command, (source, target) in paths.items():
            seconds, busy, peak = timed(
                *(command, "--load", str(scratch / source), "--output", str(scratch / target))
            )
            print(
                f"{command}: {seconds:.0f} s ({busy:.0f} s of processor), "
                f"{size / seconds:.2f} GB/s, peak {peak:.2f} GB",
                flush=True,
            )
        print(f"files: {len(list((scratch / 'back').glob('*.safetensors')))}")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
