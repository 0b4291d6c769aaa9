#!/usr/bin/env python
"""Convert checkpoints to and from HuggingFace folders, without a GPU, one tensor at a time.

The command is in moetron/commands/convert_checkpoint.py; ``--help`` describes it.
"""

import sys

from moetron.commands.convert_checkpoint import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
