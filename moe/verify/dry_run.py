"""Build one rank of any layout on the meta device, without the other ranks.

Nothing is allocated or sent: the process group is torch's fake one, tensors have only shapes. The
result is what a real rank would hold, built by megatron-core's own constructors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer, distrib_optimizer, optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from moetron.common.errors import UserError
from moetron.moe.checkpoint.optimizer_state import MOMENTS, leaves
from moetron.moe.config.schema.settings import Settings
from moetron.moe.host.patching import Patch, with_constants
from moetron.moe.layers.build_model import count_built
from moetron.moe.optim.adafactor import Adafactor
from moetron.moe.optim.muon import Muon
from moetron.moe.plan.parameters import RankParameters
from moetron.moe.plan.render import gib, section
from moetron.moe.training.build_trainer import build_trainer
from moetron.moe.training.runtime import Runtime, divide

GROUPS = {
    "tensor": "tp",
    "context": "cp",
    "data": "dp",
    "pipeline": "pp",
    "expert": "ep",
    "expert tensor": "expt_tp",
    "expert data": "expt_dp",
}
"""Our names of megatron-core's process groups (process_groups_config.py)."""
RANKS_SHOWN = 4
_HALF_NAMES = {
    "torch.HalfTensor": "torch.meta.HalfTensor",
    "torch.BFloat16Tensor": "torch.meta.BFloat16Tensor",
}
_NAMES = {"torch.FloatTensor": "torch.meta.FloatTensor", **_HALF_NAMES}


@dataclass(frozen=True)
class BuiltRank:
    """Parameters, optimizer state and groups of a rank, as built."""

    parameters: RankParameters
    optimizer_bytes: int
    """Moments, and main parameters if they are separate from the model's."""
    groups: dict[str, list[int]]
    """Ranks of each process group of the rank, in the group's order."""


def build_rank(settings: Settings, vocab_size: int, world_size: int, rank: int) -> BuiltRank:
    """Build the model, its buffers and its optimizer as ``rank`` of ``world_size`` would.

    Raises:
        UserError: a GPU is visible, on which megatron-core would allocate.
        RunError: the parameter counts differ from those of ``moe/plan``.
    """
    if torch.cuda.is_available():
        raise UserError(
            "--build: a CUDA device is visible and megatron-core would allocate on it; "
            "hide it with CUDA_VISIBLE_DEVICES="
        )
    with _fake_world(settings, world_size, rank) as runtime, torch.device("meta"):
        trainer = build_trainer(settings, runtime, vocab_size)
        return BuiltRank(
            count_built(trainer.chunks),
            sum(_state_bytes(leaf, settings) for leaf in leaves(trainer.optimizer)),
            {
                name: dist.get_process_group_ranks(getattr(runtime.groups, attribute))
                for name, attribute in GROUPS.items()
            },
        )


def render_rank(settings: Settings, vocab_size: int, world_size: int, rank: int) -> str:
    """Render `build_rank` as a section of the plan, for ``--dry-run --build``."""
    built = build_rank(settings, vocab_size, world_size, rank)
    held = built.parameters
    rows = [
        ("parameters", f"{held.dense + held.expert:,}, as planned"),
        ("of experts", f"{held.expert:,}"),
        ("optimizer", f"{built.optimizer_bytes:,} bytes ({gib(built.optimizer_bytes)})"),
        *((f"{name} group", _ranks_text(ranks)) for name, ranks in built.groups.items()),
    ]
    return section(f"rank {rank} as built", rows)


@contextmanager
def _fake_world(settings: Settings, world_size: int, rank: int) -> Iterator[Runtime]:
    """Provide a runtime on the meta device in a fake process group."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    undo: list[Patch] = []
    try:
        runtime = divide(settings, torch.device("meta"))
        undo = [patch.apply() for patch in _meta_parameters()]
        yield runtime
    finally:
        for patch in reversed(undo):
            patch.apply()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _meta_parameters() -> list[Patch]:
    """Return patches of parameter type names, which ``adapt_host`` has set to those of the CPU."""
    distributed = distrib_optimizer.DistributedOptimizer
    return [
        with_constants(optimizer.Float16OptimizerWithFloat16Params.__init__, _NAMES),
        with_constants(distributed._build_model_and_main_param_groups, _NAMES),
        with_constants(distributed.__init__, _HALF_NAMES),
    ]


def _state_bytes(leaf: MegatronOptimizer, settings: Settings) -> int:
    """Return the bytes of ``leaf``'s state after a step: moments and separate main parameters."""
    chosen = settings.optimizer
    mains = [main for group in leaf.optimizer.param_groups for main in group["params"]]
    if isinstance(leaf.optimizer, Adafactor | Muon):
        main_copies = sum(main.nbytes for main in mains) * int(settings.precision.bf16)
        return main_copies + 4 * sum(map(leaf.optimizer.state_numel, mains))
    moments = len(MOMENTS[chosen.optimizer])
    if chosen.optimizer == "sgd" and chosen.sgd_momentum == 0:
        moments = 0
    copies = moments + int(settings.precision.bf16)
    return sum(main.numel() * main.element_size() * copies for main in mains)


def _ranks_text(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:RANKS_SHOWN]))
    if len(ranks) <= RANKS_SHOWN:
        return shown
    return f"{shown} ... {ranks[-1]} ({len(ranks):,} ranks)"
