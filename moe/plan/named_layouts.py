"""Layouts by name, such as ``tp2ep2`` or ``pp2vpp2``: sizes in any order, 1 by default."""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from moetron.common.errors import UserError
from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.settings import Settings

_SIZE = re.compile(r"(etp|ep|tp|vpp|pp|cp|dp|zero)([1-9]\d*)")
_GRAMMAR = "sizes such as tp2, pp2, vpp2, ep2, etp1, cp2, dp2 and zero1, concatenated"


@dataclass(frozen=True)
class Layout:
    """Parallel sizes of a run."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Virtual stages per pipeline rank."""
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    """None: as ``tp``."""
    zero: int = 0
    """1: distributed optimizer."""
    dp: int = 1
    """Minimum data-parallel ranks; experts may need more."""

    @property
    def name(self) -> str:
        """Name that `parse` reads as this layout."""
        plain = vars(Layout())
        named = (f"{key}{size}" for key, size in vars(self).items() if size != plain[key])
        return "".join(named) or "dp1"

    @property
    def smallest_world_size(self) -> int:
        """Smallest world size for both the dense and the expert side."""
        etp = self.tp if self.etp is None else self.etp
        return math.lcm(self.tp * self.pp * self.cp * self.dp, etp * self.ep * self.pp)

    def values(self, num_layers: int) -> dict[str, Any]:
        """Return the parallel settings for a model of ``num_layers``, without overlaps."""
        chunk = max(1, num_layers // (self.pp * self.vpp)) if self.vpp > 1 else None
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "num_layers_per_virtual_pipeline_stage": chunk,
            "pipeline_model_parallel_layout": None,
            "decoder_first_pipeline_num_layers": None,
            "decoder_last_pipeline_num_layers": None,
            "account_for_embedding_in_pipeline_split": False,
            "account_for_loss_in_pipeline_split": False,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
            "sequence_parallel": self.tp > 1,
            "use_distributed_optimizer": self.zero > 0,
            "overlap_grad_reduce": False,
            "overlap_param_gather": False,
        }

    def flags(self, settings: Settings) -> list[str]:
        """Return flags that override the layout of a run of ``settings``."""
        words = []
        for name, value in self.values(settings.model.num_layers).items():
            if isinstance(value, bool):
                words.append(flag_name(name if value else f"no_{name}"))
            else:
                words.append(f"{flag_name(name)}={'none' if value is None else value}")
        return words


def parse(name: str) -> Layout:
    """Return the layout of a name.

    Raises:
        UserError: the name is not a layout or repeats a size.
    """
    sizes = _SIZE.findall(name)
    keys = [key for key, _ in sizes]
    if not sizes or "".join(map("".join, sizes)) != name or len(set(keys)) < len(keys):
        raise UserError(f"--layouts {name!r}: must be {_GRAMMAR}")
    layout = Layout(**{key: int(size) for key, size in sizes})
    if layout.zero > 1:
        raise UserError(f"--layouts {name!r}: only zero1 is supported, the distributed optimizer")
    return layout


def layouts_of(world_size: int) -> Iterator[Layout]:
    """Yield layouts of exactly ``world_size`` ranks; data parallelism takes the remaining ranks.

    Sizes are divisors of ``world_size``; layouts are not yet checked against settings.
    """
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    for tp, pp, cp, ep in itertools.product(sizes, repeat=4):
        if world_size % (tp * pp * cp):
            continue
        base = Layout(tp=tp, pp=pp, cp=cp, ep=ep, dp=world_size // (tp * pp * cp))
        for vpp, etp, zero in itertools.product((1, 2), (None, 1), (0, 1)):
            layout = replace(base, vpp=vpp, etp=etp, zero=zero)
            redundant = (vpp > 1 and pp == 1) or (etp == 1 and tp == 1) or (zero and base.dp == 1)
            if not redundant and layout.smallest_world_size == world_size:
                yield layout
