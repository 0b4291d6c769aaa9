#!/usr/bin/env python
"""Show token shards, a blend of them, or the stages of a recipe; check shards in full.

The command is in moetron/commands/inspect_data.py; ``--help`` describes it.
"""

import sys

from moetron.commands.inspect_data import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
