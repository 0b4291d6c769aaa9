#!/usr/bin/env python
"""Collect real text into JSONL, one file a source, with .manifest.json beside.

The command is in moetron/commands/collect_corpus.py; ``--help`` describes it.
"""

import sys

from moetron.commands.collect_corpus import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
