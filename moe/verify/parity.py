"""Comparison of two layouts by losses, gradient norms and gradients of their runs.

The gradient of a parameter is read from a checkpoint after the first step of a fresh optimizer, as
a global tensor under the parameter's name, independent of the layout. Adam's first moment is then
(1 - beta1) times the clipped gradient, SGD's momentum the clipped gradient (and its weight decay);
a common factor of all parameters is no difference.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.optimizer_state import MOMENTS, PREFIX
from moetron.moe.config.schema.derived import padded_vocab_size
from moetron.moe.config.schema.experts import MoESettings
from moetron.moe.config.schema.settings import Settings

NEGLIGIBLE = 1e-4
"""Minimum norm of a parameter's gradient in a comparison, as a fraction of the full gradient's: a
gradient that cancels (a shift of all keys) is only the fp32 rounding of larger terms."""


@dataclass(frozen=True)
class Result:
    """Metrics and gradients of a run in one layout from the common checkpoint."""

    losses: list[float]
    """``lm_loss`` of each step (nats per token)."""
    grad_norms: list[float]
    """Norm of each step, before clipping."""
    gradients: dict[str, torch.Tensor]
    """Global fp32 tensors of the first step by parameter, up to one common positive factor."""
    step_times_s: list[float] = field(default_factory=list)
    """Wall time of each step; not compared."""

    @property
    def step_ms(self) -> float:
        """Median over the steps, without the first if there are several; nan: none was timed."""
        times_s = self.step_times_s[1:] or self.step_times_s
        return 1e3 * median(times_s) if times_s else math.nan


@dataclass(frozen=True)
class Difference:
    """Largest relative differences of a run from the reference."""

    loss: float
    grad_norm: float
    gradient: float
    """Largest norm of a parameter's difference over the norm of its gradient."""
    parameter: str
    """Parameter with this difference."""
    step_ms: float
    """Time of a step of the run (see `Result`)."""

    def within(self, tolerance: "Tolerance") -> bool:
        """Return whether all differences are within ``tolerance``; NaN is not."""
        return (
            self.loss <= tolerance.loss
            and self.grad_norm <= tolerance.grad_norm
            and self.gradient <= tolerance.gradient
        )


@dataclass(frozen=True)
class Tolerance:
    """Relative differences explained by another order of fp32 additions."""

    loss: float = 1e-5
    grad_norm: float = 1e-4
    gradient: float = 1e-4


def read_result(folder: Path, settings: Settings) -> Result:
    """Read a run's --save folder: its metrics and its checkpoint of step 1.

    Raises:
        UserError: the checkpoint is missing or damaged.
    """
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    moment = f"{PREFIX}.{MOMENTS[settings.optimizer.optimizer][0]}."
    checkpoint = checkpoint_folder.read(checkpoint_folder.step_folder(folder, 1))
    reader = FileSystemReader(checkpoint.folder)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size)
        for key, entry in stored.items()
        if key.startswith(moment) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=reader, no_dist=True)
    return Result(
        [row["lm_loss"] for row in rows],
        [row["grad_norm"] for row in rows],
        {key.removeprefix(moment): tensor for key, tensor in tensors.items()},
        [row["step_time_s"] for row in rows],
    )


def compare(reference: Result, other: Result) -> Difference:
    """Return the differences of ``other`` from ``reference``; infinite if something is missing."""
    worst, parameter = 0.0, "-"
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in reference.gradients.values()))
    for name in sorted(reference.gradients.keys() | other.gradients.keys()):
        ours, theirs = reference.gradients.get(name), other.gradients.get(name)
        apart = math.inf
        if ours is not None and theirs is not None and ours.shape == theirs.shape:
            scale = max(float(ours.double().norm()), NEGLIGIBLE * norm)
            gap = float((ours.double() - theirs.double()).norm())
            apart = gap / scale if gap else 0.0
            apart = math.inf if math.isnan(apart) else apart
        if apart > worst:
            worst, parameter = apart, name
    return Difference(
        _relative(reference.losses, other.losses),
        _relative(reference.grad_norms, other.grad_norms),
        worst,
        parameter,
        other.step_ms,
    )


def _relative(ours: Sequence[float], theirs: Sequence[float]) -> float:
    if len(ours) != len(theirs):
        return math.inf
    apart = [abs(a - b) / abs(a) if a != b else 0.0 for a, b in zip(ours, theirs, strict=True)]
    return math.nan if any(map(math.isnan, apart)) else max(apart, default=math.inf)


def table(
    reference: Result, differences: Mapping[str, Difference], tolerance: Tolerance
) -> list[str]:
    """Return lines of text: the reference's metrics, then a line for each layout."""
    width = max(len("layout"), *map(len, differences))
    lines = [
        f"one rank: loss {reference.losses[0]:.6f} to {reference.losses[-1]:.6f}, gradient norm "
        f"{reference.grad_norms[0]:.6f} to {reference.grad_norms[-1]:.6f}, "
        f"{len(reference.losses)} steps of {reference.step_ms:.1f} ms",
        f"{'layout':<{width}}  {'loss':>8}  {'norm':>8}  {'gradient':>8}  {'ms/step':>8}  "
        f"{'':<7}  worst parameter",
    ]
    lines += [line(f"{name:<{width}}", found, tolerance) for name, found in differences.items()]
    bounds = f"{tolerance.loss:8.1e}  {tolerance.grad_norm:8.1e}  {tolerance.gradient:8.1e}"
    return [*lines, f"{'allowed':<{width}}  {bounds}"]


def line(name: str, found: Difference, tolerance: Tolerance) -> str:
    """Return one layout's line of the table."""
    verdict = "same" if found.within(tolerance) else "DIFFERS"
    return (
        f"{name}  {found.loss:8.1e}  {found.grad_norm:8.1e}  {found.gradient:8.1e}  "
        f"{found.step_ms:8.1f}  {verdict:<7}  {found.parameter}"
    )


@dataclass(frozen=True)
class Dependence:
    """A setting in use whose meaning depends on the layout."""

    setting: str
    effect: str
    instead: Sequence[str] = ()
    """Flags of a layout-independent alternative, if there is one."""


def layout_dependent(
    settings: Settings, vocab_size: int, tensor_sizes: Sequence[int]
) -> list[Dependence]:
    """Return every setting in use whose meaning depends on the layout.

    Args:
        settings: of the runs.
        vocab_size: before padding.
        tensor_sizes: tensor-parallel sizes of the layouts compared.
    """
    model = settings.model
    rows = sorted({_padded_rows(settings, vocab_size, size) for size in tensor_sizes})
    cases = [
        (
            model.hidden_dropout > 0 or model.attention_dropout > 0,
            Dependence(
                "--hidden-dropout, --attention-dropout",
                "ranks draw their own masks: losses differ as between two seeds",
                ["--hidden-dropout=0", "--attention-dropout=0"],
            ),
        ),
        (
            len(rows) > 1,
            Dependence(
                "--make-vocab-size-divisible-by",
                f"the vocabulary is padded to {' or '.join(f'{n:,}' for n in rows)} rows, "
                "which share the softmax: choose it so that all are equal",
            ),
        ),
        (
            settings.precision.bf16,
            Dependence("--bf16", "rounds to 2^-9: losses agree to about 1e-3", ["--fp32"]),
        ),
    ]
    return _of_routing(settings.moe) + [dependence for used, dependence in cases if used]


def _of_routing(moe: MoESettings) -> list[Dependence]:
    unpadded = ["--no-moe-pad-expert-input-to-capacity"] * moe.moe_pad_expert_input_to_capacity
    cases = [
        (
            moe.moe_expert_capacity_factor is not None and moe.moe_capacity_scope == "rank",
            Dependence(
                "--moe-capacity-scope rank",
                "capacity counts one rank's tokens: TP and CP drop others",
                ["--moe-capacity-scope=micro_batch", *unpadded],
            ),
        ),
        (
            moe.moe_router_load_balancing_type == "global_aux_loss"
            and moe.moe_global_aux_loss_counts == "running",
            Dependence(
                "--moe-global-aux-loss-counts running",
                "shares run over the micro-batches that a rank saw",
                ["--moe-global-aux-loss-counts=previous_step"],
            ),
        ),
    ]
    return [dependence for used, dependence in cases if used]


def _padded_rows(settings: Settings, vocab_size: int, tensor_ranks: int) -> int:
    parallel = settings.parallel.model_copy(update={"tensor_model_parallel_size": tensor_ranks})
    return padded_vocab_size(vocab_size, settings.model_copy(update={"parallel": parallel}))
