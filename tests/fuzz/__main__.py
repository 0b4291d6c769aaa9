"""Mutate recipes and files, and run the commands that read them.

    python -m tests.fuzz --seed 1 --count 1000               # of each kind
    python -m tests.fuzz --seed 1 --only 'file 17'           # one case again, with its message
    python -m tests.fuzz --seed 1 --count 500 --thorough     # also generate, train, analyze

A good end is success, or exit code 2 with a message. Faults are printed; the exit code is 1 if
there is one.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.fuzz.campaign import Faults, campaign
from tests.fuzz.seeds import make_elsewhere


def main() -> int:
    """Run cases as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500, help="of recipes and of files")
    parser.add_argument("--only", help="the case, as printed")
    parser.add_argument("--thorough", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        seeds = Path(name) / "seeds"
        make_elsewhere(seeds)
        found: list[Faults] = [
            campaign(
                kind, seeds, Path(name) / kind, given.seed, given.count, given.thorough, given.only
            )
            for kind in ("recipe", "file")
        ]
    for faults in found:
        print(faults.text())
    return 1 if any(faults.faults for faults in found) else 0


if __name__ == "__main__":
    sys.exit(main())
