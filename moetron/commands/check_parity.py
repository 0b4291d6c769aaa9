"""Check that parallel layouts train the same model, on this machine's ranks.

    python tools/check_parity.py --config RECIPE.yaml --layouts ep2,tp2,pp2vpp2 [-- --flag value]
    python tools/check_parity.py --config RECIPE.yaml --ranks 4 --load RUN

Every layout trains the same few steps from one checkpoint (RUN's, or one that a single rank writes
first) with a fresh optimizer, one layout after the other. The table gives the largest relative
differences from one rank: of losses, of gradient norms, and of a parameter's gradient at step 1;
and the milliseconds per step. If settings of the recipe depend on the layout, a second table
repeats all runs with layout-independent settings and shows their effect and cost. Runs are fp32
whatever the recipe says, since bf16 rounding hides bugs; flags after -- override the recipe.

Exit codes: 0 all layouts within tolerance, 1 a layout differs or a run failed, 2 user error.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from moetron.common.errors import UserError
from moetron.common.process import TRAIN
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.config.command import load
from moetron.moe.config.schema.paths import ToolParser
from moetron.moe.config.schema.settings import Settings
from moetron.moe.monitoring.library_warnings import quieten_libraries
from moetron.moe.plan.named_layouts import layouts_of, parse
from moetron.tokenizers.load import load_tokenizer


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="RECIPE.yaml", help="recipe to train")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--layouts", metavar="A,B,...", help="such as tp2,pp2vpp2,ep2zero1")
    which.add_argument("--ranks", type=int, metavar="N", help="all layouts that fill N ranks")
    add("--load", type=Path, metavar="RUN", help="start from this run's weights")
    add("--steps", type=int, default=3, help="steps of each run (default: 3)")
    add("--loss-tolerance", type=float, default=1e-5, help="relative, of losses (default: 1e-5)")
    add("--norm-tolerance", type=float, default=1e-4, help="of gradient norms (default: 1e-4)")
    add("--gradient-tolerance", type=float, default=1e-4, help="per parameter (default: 1e-4)")
    add("--timeout-s", type=float, default=1800.0, help="limit of a run in s (default: 1800)")
    add("flags", type=str, nargs="*", metavar="-- FLAGS", help="flags of pretrain_moe.py")
    return parser


def refuse(options: argparse.Namespace, settings: Settings) -> None:
    """Raise ``UserError`` if the runs cannot be compared."""
    problems = []
    if not 1 <= options.steps <= settings.training.train_iters:
        problems.append(f"--steps {options.steps}: must be 1 to --train-iters of the recipe")
    if options.load is not None:
        checkpoint_folder.find(options.load)
    if options.ranks is not None and options.ranks < 1:
        problems.append(f"--ranks {options.ranks}: must be at least 1")
    chosen = settings.optimizer.optimizer
    if chosen not in ("adam", "sgd"):
        problems.append(
            f"--optimizer {chosen}: gradients are read from the first moment, which only adam and "
            "sgd keep unchanged; add --optimizer adam after --"
        )
    if chosen == "sgd" and settings.optimizer.sgd_momentum == 0:
        problems.append("--sgd-momentum 0: gradients are read from the momentum; set it above 0")
    if problems:
        raise UserError("\n".join(problems))


def check(options: argparse.Namespace, folder: Path) -> int:
    """Train every layout below ``folder``, print the comparison, return the exit code."""
    flags = ["--config", options.config, "--fp32", *options.flags]
    settings = load([*flags, "--dry-run"]).settings
    refuse(options, settings)
    tokenizer = settings.data.tokenizer_model
    vocab_size = settings.model.vocab_size or load_tokenizer(str(tokenizer)).vocab_size
    quieten_libraries()
    from moetron.moe.verify import parity, parity_runs  # torch: seconds, after the checks

    if options.layouts is not None:
        named = map(parse, options.layouts.split(","))
        layouts = [one for name in named for one in parity_runs.fitting([name], flags, settings)]
    else:
        layouts = parity_runs.fitting(layouts_of(options.ranks), flags, settings)
    sizes = [1, *(layout.tp for layout in layouts)]
    dependent = parity.layout_dependent(settings, vocab_size, sizes)
    for one in dependent:
        print(f"depends on the layout: {one.setting}: {one.effect}")
    tolerance = parity.Tolerance(
        options.loss_tolerance, options.norm_tolerance, options.gradient_tolerance
    )
    runs = parity_runs.Runs(TRAIN, flags, settings, folder, options.steps, options.timeout_s)
    instead = [flag for one in dependent for flag in one.instead]
    try:
        start = options.load or runs.write_start()
        reference, found = parity_runs.train_all(runs, layouts, start)
        print("\n".join(parity.table(reference, found, tolerance)))
        if instead:
            steady = parity_runs.train_all(runs.changed(instead), layouts, start)
            print(f"\nwith {' '.join(instead)}", *parity.table(*steady, tolerance), sep="\n")
    except parity_runs.RunFailed as error:
        print(f"check_parity: {error}", file=sys.stderr)
        return 1
    return 0 if all(one.within(tolerance) for one in found.values()) else 1


def main() -> int:
    """Check the layouts that the command line names; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        return check(parser().parse_args(), Path(folder))
