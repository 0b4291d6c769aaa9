#!/usr/bin/env python
"""Make small chats and preferences from documentation on this machine.

The command is in moetron/commands/collect_chats.py; ``--help`` describes it.
"""

import sys

from moetron.commands.collect_chats import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
