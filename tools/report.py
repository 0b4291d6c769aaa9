#!/usr/bin/env python
"""Write the report page of one or several runs, or the curves of one run as a picture.

The command is in moetron/commands/report.py; ``--help`` describes it.
"""

import sys

from moetron.commands.report import main
from moetron.common.process import run_guarded

if __name__ == "__main__":
    sys.exit(run_guarded(main))
