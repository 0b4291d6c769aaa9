#!/usr/bin/env python
"""Plan a recipe of examples/ without data, weights or GPUs: parameters, memory, FLOPs, schedule.

The command is in moetron/commands/plan.py; ``--help`` describes it.
"""

import sys

from moetron.commands.plan import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
