"""Pretrain a Mixture-of-Experts language model.

    moetron launch --nproc-per-node 2 pretrain_moe.py --config RECIPE.yaml [--flag value ...]
    python pretrain_moe.py --config RECIPE.yaml --mock-data     # one rank
    python pretrain_moe.py --config RECIPE.yaml --dry-run --world-size 1024 [--build --rank 17]
    python pretrain_moe.py --config RECIPE.yaml --check --world-size 2    # as launchers do first

``--help`` lists every setting. Exit codes: 0 done, 2 user error, 1 internal or machine error, 16
and 17 after a step was run again (docs/health.md), 75 stopped by a signal after a complete save
(the same command resumes), 76 a rank hangs, 128 + n by signal n before the first step or by a
second signal.
"""

import sys
from typing import TYPE_CHECKING

from moetron.common.stop_signal import EndAtOnce

if TYPE_CHECKING:
    from moetron.moe.config.command import Command


def main() -> int:
    """Parse and check, then plan or pretrain; return the exit code."""
    with EndAtOnce() as early:
        return run(early)


def run(early: EndAtOnce) -> int:
    """Do what the command line asks for; ``early`` ends it on a signal before the first step."""
    # Imported here, where a signal during the half second that they take prints no traceback.
    from moetron.assembly import open_tokenizer, train, vocabulary_size
    from moetron.moe.config.command import load

    command = load(sys.argv[1:])
    for note in command.notes if command.rank == 0 or command.dry_run else []:
        print(f"note: {note}", file=sys.stderr)
    tokenizer = open_tokenizer(command.settings)
    vocab_size = vocabulary_size(command.settings, tokenizer)
    if command.dry_run:
        return plan(command, vocab_size)
    return train(command.settings, tokenizer, vocab_size, check_only=command.check, early=early)


def plan(command: "Command", vocab_size: int) -> int:
    """Print the plan of the run; build one rank with --build."""
    from moetron.moe.monitoring.library_warnings import quieten_libraries
    from moetron.moe.plan.render import render

    print(render(command.settings, vocab_size, command.world_size, command.rank))
    if command.build:
        quieten_libraries()
        from moetron.moe.verify.dry_run import render_rank  # torch: seconds

        print(render_rank(command.settings, vocab_size, command.world_size, command.rank))
    return 0


if __name__ == "__main__":  # megatron-core's checkpoint writer spawns processes
    from moetron.common.process import run_guarded

    sys.exit(run_guarded(main))
