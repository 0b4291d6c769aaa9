#!/usr/bin/env python
"""Analyze routing: saturation, co-activation, specialisation, drops, similarity.

The command is in moetron/commands/analyze_routing.py; ``--help`` describes it.
"""

import sys

from moetron.commands.analyze_routing import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
