#!/usr/bin/env python
"""Run tasks of lm-evaluation-harness on a checkpoint, on one rank; needs moetron[eval].

The command is in moetron/commands/evaluate.py; ``--help`` describes it.
"""

import sys

from moetron.commands.evaluate import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
