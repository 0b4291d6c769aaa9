#!/usr/bin/env python
"""Run an ablation: variants of a recipe, each with several seeds, compared in one table.

The command is in moetron/commands/ablate.py; ``--help`` describes it.
"""

import sys

from moetron.commands.ablate import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
