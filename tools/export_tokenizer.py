#!/usr/bin/env python
"""Write a tokenizer as a folder that HuggingFace's AutoTokenizer loads; compare the ids.

The command is in moetron/commands/export_tokenizer.py; ``--help`` describes it.
"""

import sys

from moetron.commands.export_tokenizer import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
