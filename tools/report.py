"""Draw a run's curves: loss and expert load over tokens.

    python tools/report.py RUN [--output FILE.png]

RUN is a run's --save folder. Exit codes: 0 done, 2 something to mend, named in one message.
"""

import argparse
import sys
from pathlib import Path

from moetron.moe.analysis.curves import draw
from moetron.moe.config.errors import UserError


def main() -> int:
    """Draw, and say where."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--output", type=Path, help="default: RUN/curves.png")
    options = parser.parse_args()
    output = options.output or options.run / "curves.png"
    try:
        draw(options.run, output)
    except (UserError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"curves: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
