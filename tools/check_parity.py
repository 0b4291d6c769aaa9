#!/usr/bin/env python
"""Check that parallel layouts train the same model, on this machine's ranks.

The command is in moetron/commands/check_parity.py; ``--help`` describes it.
"""

import sys

from moetron.commands.check_parity import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
