#!/usr/bin/env python
"""Train an umT5-style tokenizer (SentencePiece unigram, byte fallback) on JSONL.

The command is in moetron/commands/train_tokenizer.py; ``--help`` describes it.
"""

import sys

from moetron.commands.train_tokenizer import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
