"""State of the optimizers of --use-precision-aware-optimizer, as fp32 tensors.

Transformer Engine's AdamW holds moments in fp32, bf16, fp16 or FP8, the latter two with a scale for
each tensor, and main parameters in fp16 likewise or as the 16 bits of an fp32 number that its bf16
weight lacks. With --optimizer-cpu-offload megatron-core's optimizer holds everything in fp32, in
optimizers of its own for parameters on the CPU and on the device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

MAIN = "fp32_param"
"""Name of main parameters in checkpoints."""
_MAIN_STATE = "master_param"


@dataclass(frozen=True)
class ScaledState:
    """Access to the state of ``adam``, a ``transformer_engine.pytorch.optimizers.FusedAdam``."""

    adam: Any

    def read(self, weight: Tensor, name: str) -> Tensor:
        """Return main parameter or moment ``name`` of ``weight``, fp32, as it is or will be."""
        key = _MAIN_STATE if name == MAIN else name
        if key not in self.adam.state[weight]:  # before the first step
            return weight.detach().float() if name == MAIN else torch.zeros_like(weight).float()
        value: Tensor = self.adam.get_unscaled_state(weight, key)
        return joined(weight, value) if value.dtype == torch.int16 else value.float()

    def write(self, weight: Tensor, name: str, value: Tensor) -> None:
        """Set main parameter or moment ``name`` of ``weight``, which is already loaded, to fp32."""
        if name == MAIN and self.adam.store_param_remainders and weight.dtype == torch.bfloat16:
            self.adam.set_scaled_state(weight, _MAIN_STATE, remainder(weight, value))
        else:  # Transformer Engine scales in place
            self.adam.set_scaled_state(weight, _MAIN_STATE if name == MAIN else name, value.clone())


@dataclass(frozen=True)
class OffloadedState:
    """Access to the state of ``hybrid``, as that of `ScaledState`; tensors are on the CPU."""

    hybrid: HybridDeviceOptimizer
    owners: dict[Tensor, torch.optim.Optimizer]
    """Inner optimizer by main parameter."""

    @classmethod
    def of(cls, hybrid: HybridDeviceOptimizer) -> "OffloadedState":
        """Return access to the state of ``hybrid``, whose weights are narrower than fp32."""
        # Copies of fp32 weights are not refreshed after a load (update_fp32_param_by_new_param).
        assert hybrid.param_to_fp32_param.keys() == hybrid.param_to_inner_param.keys()
        owners = {
            main: inner
            for inner in hybrid.sub_optimizers
            for group in inner.param_groups
            for main in group["params"]
        }
        return cls(hybrid, owners)

    def read(self, weight: Tensor, name: str) -> Tensor:
        """Return main parameter or moment ``name`` of ``weight``, fp32, as it is or will be."""
        main: Tensor = self.hybrid.param_to_inner_param[weight]
        if name == MAIN:
            return main.detach().cpu()
        value = self.owners[main].state[main].get(name)
        return torch.zeros_like(main, device="cpu") if value is None else value.cpu()

    def write(self, weight: Tensor, name: str, value: Tensor) -> None:
        """Set main parameter or moment ``name`` of ``weight``, which is already loaded, to fp32."""
        main: Tensor = self.hybrid.param_to_inner_param[weight]
        if name == MAIN:
            main.data.copy_(value)
        else:
            self.owners[main].state[main][name] = value.to(main.device)


def joined(weight: Tensor, lower: Tensor) -> Tensor:
    """Return fp32 main parameters of bf16 ``weight`` and int16 ``lower`` bits.

    The weight is the main parameter rounded half away from zero, so that its bits are one above the
    upper bits where the lower ones, read as a signed number, are negative.
    """
    upper = weight.detach().view(torch.int16).int() - (lower < 0).int()
    return ((upper << 16) | (lower.int() & 0xFFFF)).view(torch.float32)


def remainder(weight: Tensor, main: Tensor) -> Tensor:
    """Return the int16 lower bits of fp32 ``main`` for the bf16 ``weight`` that it rounds to.

    torch rounds a tie to even, Transformer Engine away from zero: where such a weight is the lower
    neighbour, the tie becomes the number just below it.
    """
    bits, here = main.view(torch.int32), weight.detach().view(torch.int16).int()
    lower = ((bits & 0xFFFF) ^ 0x8000) - 0x8000  # as a signed number
    tie_below = (lower == -0x8000) & (here == bits >> 16)
    return torch.where(tie_below, 0x7FFF, lower).to(torch.int16)
