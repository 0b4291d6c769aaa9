#!/usr/bin/env python
"""Start the ranks of a run on this node.

The command is in moetron/commands/launch.py; ``--help`` describes it.
"""

import sys

from moetron.commands.launch import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
