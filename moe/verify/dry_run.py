"""Build one rank's share of any layout on the meta device, among ranks that do not exist.

Nothing is allocated and nothing is sent: the process group is torch's fake one, and every tensor is
a shape. What comes out is what a real rank would hold, by megatron-core's own constructors.
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
class Share:
    """What a rank holds, as built."""

    parameters: RankParameters
    optimizer_bytes: int
    """Moments, and main parameters where they lie apart from the model's."""
    groups: dict[str, list[int]]
    """Ranks of each process group that the rank belongs to, in the group's order."""


def build_share(settings: Settings, vocab_size: int, world_size: int, rank: int) -> Share:
    """Build the model, its buffers and its optimizer as ``rank`` of ``world_size`` would.

    Raises:
        UserError: a GPU is visible, which megatron-core would allocate on.
        RunError: the parameters built are not those that ``moe/plan`` counts.
    """
    if torch.cuda.is_available():
        raise UserError(
            "--build: a CUDA device is visible and megatron-core would allocate on it; "
            "hide it with CUDA_VISIBLE_DEVICES="
        )
    with _alone_among(settings, world_size, rank) as runtime, torch.device("meta"):
        trainer = build_trainer(settings, runtime, vocab_size)
        return Share(
            count_built(trainer.chunks),
            sum(_state_bytes(leaf, settings) for leaf in leaves(trainer.optimizer)),
            {
                name: dist.get_process_group_ranks(getattr(runtime.groups, attribute))
                for name, attribute in GROUPS.items()
            },
        )


def render_share(settings: Settings, vocab_size: int, world_size: int, rank: int) -> str:
    """``build_share`` as a section of the plan, for ``--dry-run --build``."""
    share = build_share(settings, vocab_size, world_size, rank)
    held = share.parameters
    rows = [
        ("parameters", f"{held.dense + held.expert:,}, as planned"),
        ("of experts", f"{held.expert:,}"),
        ("optimizer", f"{share.optimizer_bytes:,} bytes ({gib(share.optimizer_bytes)})"),
        *((f"{name} group", _ranks_text(ranks)) for name, ranks in share.groups.items()),
    ]
    return section(f"rank {rank} as built", rows)


@contextmanager
def _alone_among(settings: Settings, world_size: int, rank: int) -> Iterator[Runtime]:
    """A runtime on the meta device among imagined ranks."""
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
    """Names of parameter types, which ``adapt_host`` has made those of the CPU."""
    distributed = distrib_optimizer.DistributedOptimizer
    return [
        with_constants(optimizer.Float16OptimizerWithFloat16Params.__init__, _NAMES),
        with_constants(distributed._build_model_and_main_param_groups, _NAMES),
        with_constants(distributed.__init__, _HALF_NAMES),
    ]


def _state_bytes(leaf: MegatronOptimizer, settings: Settings) -> int:
    """Bytes beside the model's parameters once ``leaf`` has stepped, from the tensors it steps."""
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
