"""Run an ablation: variants of a recipe, each with several seeds, compared in one table.

    python tools/ablate.py SWEEP.yaml --output DIR [--jobs N] [-- --flag value ...]
    python tools/ablate.py SWEEP.yaml --dry-run           # check every variant, list the runs
    python tools/ablate.py SWEEP.yaml --output DIR --slurm > submit.sh

SWEEP is a file such as those of examples/ablations, or the name of one. Flags after ``--`` are
flags of pretrain_moe.py and apply to all variants. Every run has a folder DIR/VARIANT/seed_N.
Repeating the command skips finished runs and resumes the others. DIR/table.md and table.png are
written at the end; --table-only writes them for the finished runs. docs/ablations.md defines a
stable run. Exit codes: 0 done, 1 a run failed (see its log.txt), 2 user error, 75 stopped by a
signal.
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
    """Return the parser of the arguments before ``--``."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("sweep", metavar="SWEEP", help="a file, or a name in examples/ablations")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for all runs")
    parser.add_argument("--jobs", type=int, help="parallel runs (default: one per core)")
    parser.add_argument(
        "--run",
        nargs="?",
        const=os.environ.get("SLURM_ARRAY_TASK_ID", "-1"),
        metavar="N",
        help="only the run with this number in --dry-run (default: SLURM_ARRAY_TASK_ID)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and list the runs")
    parser.add_argument("--slurm", action="store_true", help="print a script that submits arrays")
    parser.add_argument("--table-only", action="store_true", help="only write the table")
    return parser


def find(name: str) -> Path:
    """Return the file of a sweep."""
    known = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
    path = SWEEPS / f"{name}.yaml" if name in known else Path(name)
    if not path.is_file():
        raise UserError(f"{name}: no such file or sweep; the sweeps are {', '.join(known)}")
    return path


def listing(runs: list[sweep.Run]) -> str:
    """Return a numbered list of the runs."""
    starts = [f" from {run.upcycle.variant}, upcycled" if run.upcycle else "" for run in runs]
    return "\n".join(f"{n:4}  {run.name}{starts[n]}" for n, run in enumerate(runs))


def run_one(plan: sweep.Sweep, number: int, output: Path, threads: int) -> None:
    """Replace this process with the training of one run, unless the run is finished."""
    if not 0 <= number < len(plan.runs):
        raise UserError(f"--run {number}: the runs are 0 to {len(plan.runs) - 1}")
    run = plan.runs[number]
    if execute.ended(run, output):
        print(f"{run.name} is finished")
        return
    execute.exec_training(plan, run, output, TRAIN, threads)


def main() -> int:
    """Run the sweep that the command line names; return the exit code."""
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, words = parser().parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    given = flags.parse(words)
    problems = given.problems + [f"--{name} is not allowed after --" for name in given.options]
    if problems:
        raise ConfigError(problems)
    path = find(options.sweep)
    plan = sweep.read(path, given.settings)
    if options.dry_run:
        print(listing(plan.runs))
        return 0
    if options.output is None:
        raise UserError("--output: required; give the folder for all runs")
    execute.refuse_others(plan.runs, options.output)
    jobs = options.jobs or (1 if options.slurm else max(1, usable_cores() // plan.ranks))

    def command(*number: str) -> list[str]:
        own = ("--output", str(options.output), "--jobs", str(jobs), "--run", *number)
        return [sys.executable, "-m", "moetron", "ablate", str(path), *own, "--", *words]

    if options.slurm:
        print(execute.slurm_script(plan, command()))
        return 0
    if options.run is not None:
        run_one(plan, int(options.run), options.output, cpu_threads(0, jobs * plan.ranks))
        return 0
    code = 0
    if not options.table_only:
        with StopSignal() as stop:
            codes = execute.run_all(plan, options.output, jobs, command, stop)
            code = EXIT_STOPPED if stop() else int(any(codes.values()))
    from moetron.moe.analysis.ablation.table import write  # imports matplotlib: one second

    print(write(plan, options.output), end="")
    return code
