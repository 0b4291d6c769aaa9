"""Train the small models of the references on a GPU and compare with the CPU's losses.

    CUDA_VISIBLE_DEVICES= python -m tests.gpu.references FOLDER      # or on a machine without GPU
    python -m tests.gpu.compare --references FOLDER [--only REGEX] [--kinds K,K] [--json FILE]

One process runs every case of `tests/gpu/gpu_cases.py` in every kind (implementation and
precision) from the references' weights, for five steps. Bounds are in `gpu_cases.KINDS`; a case
with dropout may in addition differ by `SPREADS` times the largest distance of three seeds on the
CPU from their mean, at any step. A kind or case that the machine lacks is skipped with the reason.
Exit code 1: a run failed or is outside its bound.

FILE gets a JSON line before and after each run. With --resume a run that FILE holds is not
repeated, and one that ended its process (a fault of CUDA, `RUN_LIMIT_S`) counts as failed: repeat
the command until it prints its table.
"""

import argparse
import faulthandler
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moetron.common.errors import ConfigError
from moetron.moe.config.command import load
from moetron.moe.config.schema.implementation import beyond_transformer_engine
from moetron.moe.host.usable import cuda_fault
from tests.gpu.devices import kind_fault
from tests.gpu.gpu_cases import KINDS, STEPS, Case, cases
from tests.gpu.in_process import train
from tests.gpu.references import one_line, read, weights_folder

SPREADS = 4
RUN_LIMIT_S = 120
EXACT_METRICS = 1e-3
"""Bound of the other metrics of the first step, of local fp32 runs."""
_NEEDS = ("needs the package", "needs Transformer Engine on a GPU", "needs a CUDA device")
"""In problems of flags that this machine cannot run."""
_WIDTH = 18


@dataclass(frozen=True)
class Outcome:
    """Result of one run, a line of the JSON file."""

    case: str
    kind: str
    status: str
    """``ok``, ``outside`` a bound, ``failed``, ``skipped``; ``started`` before the run."""
    reason: str = ""
    first_loss: float = 0.0
    """Relative difference of the first step's loss, before any update."""
    worst_loss: float = 0.0
    grad_norm: float = 0.0
    """Of the first step, relative."""
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        """Return whether the run is to be looked at."""
        return self.status in ("outside", "failed")


def main() -> int:
    """Compare; return 1 if a run failed or is outside its bound."""
    arguments = _arguments()
    device = "CPU" if cuda_fault() else torch.cuda.get_device_name()
    print(
        f"{device}, torch {torch.__version__}, bounds are relative to the CPU in fp32", flush=True
    )
    references, known = read(arguments.references), _known(arguments.json, arguments.resume)
    outcomes, start_s = [], time.perf_counter()
    for case in cases():
        for kind in arguments.kinds:
            if kind not in case.kinds or not re.search(arguments.only, case.name):
                continue
            outcome = known.get((case.name, kind))
            if outcome is None:
                reference = references.get(case.like or case.name)
                outcome = _outcome(case, kind, reference, arguments)
                print(_line(outcome), flush=True)
            outcomes.append(outcome)
    print("\n".join(_table(outcomes)))
    print(f"{time.perf_counter() - start_s:.0f} s", flush=True)
    return int(any(outcome.bad for outcome in outcomes))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--references", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases to run")
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a line for each run")
    parser.add_argument("--resume", action="store_true", help="leave out the runs of FILE")
    arguments = parser.parse_args()
    arguments.kinds = arguments.kinds.split(",")
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"--kinds: no {', '.join(sorted(unknown))}; choose from {', '.join(KINDS)}")
    if arguments.resume and arguments.json is None:
        parser.error("--resume needs --json FILE")
    if not read(arguments.references):
        parser.error(f"--references {arguments.references}: none; see tests.gpu.references")
    return arguments


def _known(path: Path | None, resume: bool) -> dict[tuple[str, str], Outcome]:
    """Return the outcomes of earlier processes; start the file anew without ``resume``."""
    if path is None or not path.exists():
        return {}
    if not resume:
        path.unlink()
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        outcome = Outcome(**json.loads(line))
        if outcome.status == "started":
            outcome = Outcome(outcome.case, outcome.kind, "failed", "the process ended")
        found[outcome.case, outcome.kind] = outcome
    return found


def _outcome(
    case: Case, kind: str, reference: dict[str, Any] | None, arguments: argparse.Namespace
) -> Outcome:
    """Run a case in a kind, or say why not."""
    reason = _lacking(case, kind)
    if reason is None and reference is None:
        reason = "no reference"
    if reason is not None or reference is None:
        return _noted(Outcome(case.name, kind, "skipped", reason or ""), arguments.json)
    _noted(Outcome(case.name, kind, "started"), arguments.json)
    start_s = time.perf_counter()
    signal.alarm(RUN_LIMIT_S)
    try:
        weights = weights_folder(arguments.references, reference)
        rows = train(load(case.argv(kind)).settings, STEPS, case.samples, weights)
        outcome = _compared(case, kind, rows, reference, time.perf_counter() - start_s)
    except Exception as error:
        outcome = Outcome(case.name, kind, "failed", one_line(error))
        if not isinstance(error, ConfigError):
            traceback.print_exception(error, file=sys.stdout)
    signal.alarm(0)
    _noted(outcome, arguments.json)
    if outcome.status == "failed":
        _restart_if_lost(arguments)
    return outcome


def _lacking(case: Case, name: str) -> str | None:
    """Return what the machine or this version lacks for a run of kind ``name``, or None."""
    kind = KINDS[name]
    if unknown := case.unknown_flags():
        return unknown[0]
    if fault := kind_fault(kind.te, kind.capability):
        return fault
    try:
        settings = load(case.reference_argv()).settings
        if beyond := beyond_transformer_engine(settings) if kind.te else []:
            return f"Transformer Engine's layers lack {', '.join(beyond)}"
        load(case.argv(name))
    except ConfigError as error:  # other problems are the run's failure
        lacks = (line for line in error.problems if any(need in line for need in _NEEDS))
        return next(lacks, None)
    return None


def _compared(
    case: Case, kind: str, rows: list[dict[str, Any]], reference: dict[str, Any], seconds: float
) -> Outcome:
    """Compare the rows of a run with the reference."""
    losses = _differences(rows, reference, "lm_loss")
    norms = _differences(rows, reference, "grad_norm")
    used, outside = KINDS[kind], list[str]()
    bound = used.bound if "--fp32" in used.flags else used.bound.times(case.noise)
    spread = SPREADS * max(reference["lm_loss_spread"])  # that of one step is a poor estimate
    bounds = [bound.first_loss, *[bound.loss] * (STEPS - 1)]
    for step, loss in enumerate(losses):
        if not loss <= bounds[step] + spread:  # NaN is outside too
            outside.append(f"loss of step {step + 1}: {loss:.1e}")
    if not norms[0] <= bound.grad_norm + SPREADS * reference["grad_norm_spread"][0]:
        outside.append(f"gradient norm: {norms[0]:.1e}")
    if kind == "local" and not case.is_noisy:
        for name, value in reference["first_step"].items():
            if not abs(rows[0][name] - value) <= EXACT_METRICS * abs(value):
                outside.append(f"{name}: {rows[0][name]:.6g} instead of {value:.6g}")
    status, reason = "outside" if outside else "ok", "; ".join(outside)
    return Outcome(case.name, kind, status, reason, losses[0], max(losses), norms[0], seconds)


def _differences(rows: list[dict[str, Any]], reference: dict[str, Any], metric: str) -> list[float]:
    pairs = zip(rows, reference[metric], strict=True)
    return [abs(row[metric] - value) / abs(value) for row, value in pairs]


def _noted(outcome: Outcome, path: Path | None) -> Outcome:
    """Append the outcome to the JSON file."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
    return outcome


def _restart_if_lost(arguments: argparse.Namespace) -> None:
    """After a fault that CUDA does not recover from, continue in a new process."""
    if cuda_fault() is not None:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if arguments.json is None:
            raise
        again = [] if arguments.resume else ["--resume"]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "tests.gpu.compare", *sys.argv[1:], *again])


def _line(outcome: Outcome) -> str:
    text = f"{outcome.status:<8}{outcome.case:<24}{outcome.kind:<{_WIDTH}}"
    if outcome.status in ("ok", "outside"):
        text += (
            f"loss first {outcome.first_loss:.1e} worst {outcome.worst_loss:.1e}  "
            f"gradient norm {outcome.grad_norm:.1e}  {outcome.seconds:.1f} s"
        )
    return f"{text}  {outcome.reason}".rstrip()


def _table(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield a row for each case, a column for each kind: the worst loss, or what happened."""
    kinds = [kind for kind in KINDS if any(outcome.kind == kind for outcome in outcomes)]
    yield "\n" + f"{'worst loss difference':<24}" + "".join(f"{kind:>{_WIDTH}}" for kind in kinds)
    cells = {(outcome.case, outcome.kind): outcome for outcome in outcomes}
    for case in dict.fromkeys(outcome.case for outcome in outcomes):
        row = [cells.get((case, kind)) for kind in kinds]
        yield f"{case:<24}" + "".join(f"{_cell(outcome):>{_WIDTH}}" for outcome in row)
    for kind in kinds:
        mine = [outcome for outcome in outcomes if outcome.kind == kind]
        counts = [
            f"{count} {status}"
            for status in ("ok", "outside", "failed", "skipped")
            if (count := sum(outcome.status == status for outcome in mine))
        ]
        run = [outcome.worst_loss for outcome in mine if outcome.status in ("ok", "outside")]
        worst = f"; worst loss difference {max(run):.1e}" if run else ""
        yield f"{kind:<{_WIDTH}} {', '.join(counts)}{worst}; bound {KINDS[kind].bound.loss:.0e}"
    reasons = [f"{one.kind}: {one.reason}" for one in outcomes if one.status == "skipped"]
    for reason in dict.fromkeys(reasons):
        yield f"skipped, {reasons.count(reason)}: {reason}"
    for outcome in outcomes:
        if outcome.bad:
            yield _line(outcome)


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    if outcome.status in ("failed", "skipped"):
        return "FAILED" if outcome.bad else "-"
    return f"{'! ' if outcome.bad else ''}{outcome.worst_loss:.1e}"


if __name__ == "__main__":
    faulthandler.register(signal.SIGALRM, chain=True)  # where a run hangs; then the signal ends it
    sys.exit(main())
