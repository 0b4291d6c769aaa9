#!/usr/bin/env python
"""Upcycle a dense checkpoint to a mixture of experts, without a GPU, one tensor at a time.

The command is in moetron/commands/upcycle.py; ``--help`` describes it.
"""

import sys

from moetron.commands.upcycle import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
