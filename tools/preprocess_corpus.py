#!/usr/bin/env python
"""Turn text into token shards: .bin/.idx as Megatron reads them, and a manifest.

The command is in moetron/commands/preprocess_corpus.py; ``--help`` describes it.
"""

import sys

from moetron.commands.preprocess_corpus import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
