"""Run an ablation as papers do: variants of a recipe, each with several seeds, side by side.

    python tools/ablate.py SWEEP.yaml --output DIR [--jobs N] [-- --flag value ...]
    python tools/ablate.py SWEEP.yaml --dry-run           # check every variant, list the runs
    python tools/ablate.py SWEEP.yaml --output DIR --slurm > submit.sh

SWEEP is a file such as those of examples/ablations, or the name of one. Flags after ``--`` are
pretrain_moe.py's and hold for all variants. Every run has a folder DIR/VARIANT/seed_N; the same
command skips those that are finished and goes on with others. At the end, and with --table-only of
what is there, DIR/table.md and table.png. docs/ablations.md says what counts as stable. Exit codes:
0 done, 1 a run failed (its log.txt says why), 2 something to mend, 75 stopped by a signal.
"""

import argparse
import os
import sys
from pathlib import Path

from moetron.common.cores import usable_cores
from moetron.common.errors import ConfigError, UserError
from moetron.common.process import EXIT_STOPPED, TRAIN
from moetron.common.recipes import recipes_folder
from moetron.common.stop_signal import StopSignal
from moetron.common.threads import cpu_threads
from moetron.moe.analysis.ablation import execute, sweep
from moetron.moe.config import flags
from moetron.moe.config.schema.paths import ToolParser

SWEEPS = recipes_folder() / "ablations"


def parser() -> argparse.ArgumentParser:
    """The command line up to ``--``."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("sweep", metavar="SWEEP", help="a file, or a name in examples/ablations")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of all runs")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one a core)")
    parser.add_argument(
        "--run",
        nargs="?",
        const=os.environ.get("SLURM_ARRAY_TASK_ID", "-1"),
        metavar="N",
        help="one run alone, as --dry-run counts (default: SLURM_ARRAY_TASK_ID)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and list the runs")
    parser.add_argument("--slurm", action="store_true", help="print a script that submits arrays")
    parser.add_argument("--table-only", action="store_true", help="of the runs that are finished")
    return parser


def find(name: str) -> Path:
    """The file of a sweep."""
    known = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
    path = SWEEPS / f"{name}.yaml" if name in known else Path(name)
    if not path.is_file():
        raise UserError(f"{name}: no such file, and no sweep: these are {', '.join(known)}")
    return path


def listing(runs: list[sweep.Run]) -> str:
    """The runs by number."""
    starts = [f" from {run.upcycle.variant}, upcycled" if run.upcycle else "" for run in runs]
    return "\n".join(f"{n:4}  {run.name}{starts[n]}" for n, run in enumerate(runs))


def alone(plan: sweep.Sweep, number: int, output: Path, threads: int) -> None:
    """Become one run's training, unless it is finished."""
    if not 0 <= number < len(plan.runs):
        raise UserError(f"--run {number}: the runs are 0 to {len(plan.runs) - 1}")
    run = plan.runs[number]
    if execute.ended(run, output):
        print(f"{run.name} is finished")
        return
    execute.run_alone(plan, run, output, TRAIN, threads)


def main() -> int:
    """Run what the command line asks for; the exit code."""
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, words = parser().parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    given = flags.parse(words)
    problems = given.problems + [f"--{name} has no place after --" for name in given.options]
    if problems:
        raise ConfigError(problems)
    path = find(options.sweep)
    plan = sweep.read(path, given.settings)
    if options.dry_run:
        print(listing(plan.runs))
        return 0
    if options.output is None:
        raise UserError("--output is missing: the folder of all runs")
    jobs = options.jobs or (1 if options.slurm else max(1, usable_cores() // plan.ranks))

    def command(*number: str) -> list[str]:
        own = ("--output", str(options.output), "--jobs", str(jobs), "--run", *number)
        return [sys.executable, "-m", "moetron", "ablate", str(path), *own, "--", *words]

    if options.slurm:
        print(execute.slurm_script(plan, command()))
        return 0
    if options.run is not None:
        alone(plan, int(options.run), options.output, cpu_threads(0, jobs * plan.ranks))
        return 0
    code = 0
    if not options.table_only:
        with StopSignal() as stop:
            codes = execute.run_side_by_side(plan, options.output, jobs, command, stop)
            code = EXIT_STOPPED if stop() else int(any(codes.values()))
    from moetron.moe.analysis.ablation.table import write  # a second of imports

    print(write(plan, options.output), end="")
    return code
