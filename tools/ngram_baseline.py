#!/usr/bin/env python
"""Cross-entropies, in nats per token, of a unigram and an interpolated bigram model.

The command is in moetron/commands/ngram_baseline.py; ``--help`` describes it.
"""

import sys

from moetron.commands.ngram_baseline import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
