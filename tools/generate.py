#!/usr/bin/env python
"""Continue prompts with a trained model, on one rank; text is printed as it is generated.

The command is in moetron/commands/generate.py; ``--help`` describes it.
"""

import sys

from moetron.commands.generate import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
