#!/usr/bin/env python
"""Turn chats and preferences into shards for fine-tuning.

The command is in moetron/commands/prepare_chats.py; ``--help`` describes it.
"""

import sys

from moetron.commands.prepare_chats import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
