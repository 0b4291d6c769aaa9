"""The programs to measure, by name."""

import ast
import gc
import importlib
import os
import shlex
import traceback
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from moetron.moe.config.command import load
from moetron.moe.config.schema.settings import Settings
from moetron.moe.host.usable import transformer_engine_fault
from moetron.moe.routing.losses import forget_auxiliary_losses

Found = TypeVar("Found")
RECIPE = Path(__file__).parents[1] / "bench_gpu.yaml"
SMOKE = shlex.split(
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --num-experts 8 "
    "--moe-ffn-hidden-size 32 --moe-router-topk 2 --vocab-size 256 --micro-batch-size 1 "
    "--global-batch-size 2 --lr-warmup-iters 1"
)
"""Flags of a shape that a CPU trains in milliseconds."""
_TE = "--transformer-impl transformer_engine"
_FP8 = f"{_TE} --fp8-format hybrid --fp8-recipe"
VARIANTS = {
    "local": "--transformer-impl local",
    "fp8-tensorwise-local": "--transformer-impl local --fp8-format hybrid --fp8-recipe tensorwise",
    "te-experts-grouped_mm": f"{_TE} --moe-experts-impl grouped_mm",
    "transformers": "transformers:",
    "megatron-core": "megatron:",
    "fp8-tensorwise-grouped_mm": f"{_FP8} tensorwise --moe-experts-impl grouped_mm",
    "te-experts-te": f"{_TE} --moe-experts-impl te",
    "megatron-core-fused-wgrad": "megatron: gradient_accumulation_fusion=True",
    "te-all-fusions": (
        f"{_TE} --moe-experts-impl te --moe-permute-fusion --moe-router-fusion "
        "--cross-entropy-loss-fusion --cross-entropy-fusion-impl te"
    ),
    "fp8-tensorwise": f"{_FP8} tensorwise --moe-experts-impl te",
    "fp8-delayed": f"{_FP8} delayed --moe-experts-impl te",
    "fp8-blockwise": f"{_FP8} blockwise --moe-experts-impl te",
}
"""Name -> flags of ours, or ``megatron:`` or ``transformers:`` and fields of their configuration.

In the order of measurement.
"""
_DISTRIBUTED = "--use-distributed-optimizer --use-precision-aware-optimizer"
_CROSS_ENTROPY = "--cross-entropy-loss-fusion --cross-entropy-fusion-impl"
_FLAGS = (
    ("te", f"{_TE} --moe-experts-impl te", (
        "--no-gradient-accumulation-fusion",
        "--moe-permute-fusion",
        "--moe-router-fusion",
        f"{_CROSS_ENTROPY} te",
        f"{_CROSS_ENTROPY} native",
        "--no-bias-swiglu-fusion",
        "--no-bias-dropout-fusion",
        "--no-rope-fusion",
        f"{_DISTRIBUTED} --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
        f"{_DISTRIBUTED} --optimizer-cpu-offload",
    )),
    ("graphs", f"{_TE} --moe-experts-impl grouped_mm", (
        "--cuda-graph-impl transformer_engine --cuda-graph-warmup-steps 1",
    )),
    ("fp8", f"{_FP8} delayed --moe-experts-impl te", ("--moe-router-padding-for-quantization",)),
    ("local", "--transformer-impl local", ("--deterministic-mode",)),
    ("te", f"{_TE} --moe-experts-impl te", ("--deterministic-mode",)),
)  # fmt: skip
"""A base's name, its flags, and what is added to it, each alone.

Deterministic ones come last: variables of the process remain set after them.
"""
EACH_FLAG = {
    name: flags
    for base, given, added in _FLAGS
    for name, flags in ((base, given), *((f"{base} {text}", f"{given} {text}") for text in added))
}
"""Variants that show what one flag of docs/gpu.md gives: ``BASE`` and ``BASE FLAGS``."""
_KINDS = {
    "ours": ("tests.bench.gpu.our_step", "our_program"),
    "megatron": ("tests.bench.gpu.megatron_step", "megatron_program"),
    "transformers": ("tests.bench.gpu.transformers_step", "transformers_program"),
}
"""Kind -> module and function that builds it."""


@dataclass(frozen=True)
class Variant:
    """A program to measure."""

    name: str
    text: str

    @property
    def kind(self) -> str:
        """Return ``ours``, ``megatron`` or ``transformers``."""
        head, colon, _ = self.text.partition(":")
        return head if colon and head in _KINDS else "ours"

    @property
    def flags(self) -> list[str]:
        """Return the flags of ours; opponents take their shape from ours in bf16."""
        return shlex.split(self.text) if self.kind == "ours" else ["--transformer-impl", "local"]

    @property
    def options(self) -> dict[str, Any]:
        """Return fields of an opponent's configuration, ``name=value`` with a Python value."""
        if self.kind == "ours":
            return {}
        words = shlex.split(self.text.partition(":")[2])
        pairs = (word.partition("=") for word in words)
        return {name: _value(text) for name, _, text in pairs}

    def why_not(self) -> str | None:
        """Return why it cannot run on this machine, or None."""
        words = ("transformer_engine", "gradient_accumulation_fusion")
        if not any(word in self.text for word in words):
            return None
        fault = transformer_engine_fault()
        return None if fault is None else f"needs Transformer Engine: {fault}"


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def settings_of(variant: Variant, steps: int, flags: Sequence[str]) -> Settings:
    """Return the settings of a run of ``steps`` steps; ``flags`` apply to all variants."""
    given = ["--config", str(RECIPE), *flags, "--train-iters", str(steps), *variant.flags]
    return load(given).settings


def run_program(
    variant: Variant, settings: Settings, use: Callable[[Any], Found], stream: Any = None
) -> Found:
    """Build a variant's program, return ``use(program)``, and free all that it held.

    ``stream``: samples for ours, in place of synthetic ones.
    """
    module, function = _KINDS[variant.kind]
    build: Callable[..., Any] = getattr(importlib.import_module(module), function)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    program = None
    try:
        with build(settings, variant.options, stream) as program:
            return use(program)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold tensors
        raise
    finally:
        program = None
        free()
        drop_parameters()


def drop_parameters() -> None:
    """Free the memory of all parameters that are left on the device, and of what belongs to them.

    Modules with grouped products of Transformer Engine outlive their program: something outside
    Python's objects refers to them, so that the next program would not fit.
    """
    left = [
        thing
        for thing in gc.get_objects()
        if isinstance(thing, torch.nn.Parameter) and thing.is_cuda
    ]
    for parameter in left:
        for tensor in (
            parameter,
            *(getattr(parameter, name, None) for name in ("main_grad", "main_param", "grad")),
        ):
            if isinstance(tensor, torch.Tensor):
                tensor.untyped_storage().resize_(0)
    if left:
        torch.cuda.empty_cache()


def holders(least_bytes: int = 1 << 26) -> list[str]:
    """Return who refers to some large tensors that are left on the device, up to five steps."""
    found: Counter[str] = Counter()
    large = [
        thing
        for thing in gc.get_objects()
        if isinstance(thing, torch.Tensor) and thing.is_cuda and thing.nbytes >= least_bytes
    ]
    for tensor in large[:3]:  # each step looks at all objects of the process
        chain, thing = [], tensor
        for _ in range(5):
            owners = [o for o in gc.get_referrers(thing) if o is not large and _is_owner(o)]
            if not owners:
                break
            thing = owners[0]
            chain.append(f"{type(thing).__module__}.{type(thing).__qualname__}")
        found[f"{tuple(tensor.shape)} {tensor.dtype} <- {' <- '.join(chain)}"] += 1
    return [f"{count} x {text}" for text, count in found.most_common(12)]


def _is_owner(thing: object) -> bool:
    return not isinstance(thing, types.FrameType | types.GeneratorType | enumerate)


def free() -> None:
    """Drop what megatron-core and Transformer Engine keep for the process, and unused memory."""
    forget_auxiliary_losses()
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)  # megatron-core sets them and refuses others later
    if torch.cuda.is_available():
        if transformer_engine_fault() is None:
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager

            FP8GlobalStateManager.reset()
        torch.cuda.synchronize()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
