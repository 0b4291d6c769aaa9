"""Losses of the installed megatron-core against those of another environment.

    python -m tests.golden.across_versions --reference .venv/bin/python [RECIPE ...]

Trains the tiny form of every recipe (or those named), and of OLMoE in layouts of two ranks, with
both interpreters on this machine. Prints the largest relative difference of each and returns 1 if
one exceeds the tolerance.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.golden.losses import ROOT, Curve, train

ENDS = ("--exit-interval", "10")
TOLERANCE = 1e-6
"""Relative, of each metric at each step. Versions of torch round sums differently."""
COMPARED = ("lm_loss", "grad_norm", "aux_loss", "z_loss")
LAYOUTS = {
    "EP2": ("--expert-model-parallel-size", "2"),
    "TP2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "PP2": ("--pipeline-model-parallel-size", "2"),
}
LAYOUT_RECIPE = "olmoe_1b_7b"
RESUMED = ("olmoe_1b_7b", "deepseek_v3")
"""Of test_across_versions.py."""
DROPOUT = ("--hidden-dropout", "0.1")


def largest_difference(found: Curve, expected: Curve) -> tuple[float, str]:
    """Return the largest relative difference, and where it is."""
    worst = (0.0, "no difference")
    assert found.keys() == expected.keys(), (sorted(found), sorted(expected))
    for name in (name for name in COMPARED if name in found):
        for step, (a, b) in enumerate(zip(found[name], expected[name], strict=True), 1):
            difference = abs(a - b) / max(abs(b), 1e-30)
            if difference > worst[0]:
                worst = (difference, f"{name} at step {step}")
    return worst


def resumed(recipe: str, first: str, second: str) -> Curve:
    """Train with one interpreter, resume with another; return the metrics of both parts."""
    with tempfile.TemporaryDirectory(prefix="resumed-") as folder:
        train(recipe, first, 1, (*DROPOUT, "--exit-interval", "5"), Path(folder))
        flags = (*DROPOUT, *ENDS, "--load", folder)
        return train(recipe, second, 1, flags, Path(folder))


def versions(python: str) -> str:
    """Return the versions that an interpreter imports."""
    program = (
        "import platform, importlib.metadata as m; print('Python', platform.python_version(), "
        "*(f'{n} {m.version(n)}' for n in ('torch', 'megatron-core')))"
    )
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> int:
    """Compare; return 1 if a metric differs."""
    recipes = sorted(path.parent.name for path in ROOT.glob("examples/*/tiny.yaml"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipes", nargs="*", default=recipes, metavar="RECIPE")
    parser.add_argument("--reference", required=True, type=Path, help="the other interpreter")
    arguments = parser.parse_args()
    ours, theirs = sys.executable, str(arguments.reference.absolute())
    print(f"{versions(ours)} against {versions(theirs)}")
    runs = [(recipe, recipe, 1, ()) for recipe in arguments.recipes]
    if LAYOUT_RECIPE in arguments.recipes:
        runs += [(f"{LAYOUT_RECIPE} {n}", LAYOUT_RECIPE, 2, flags) for n, flags in LAYOUTS.items()]
    failed = []
    for name, recipe, ranks, flags in runs:
        found, expected = (
            train(recipe, python, ranks, (*ENDS, *flags)) for python in (ours, theirs)
        )
        difference, place = largest_difference(found, expected)
        print(f"{name}: {difference:.1e} ({place})", flush=True)
        if difference > TOLERANCE:
            failed.append(name)
    print(f"{len(failed)} differ by more than {TOLERANCE:.0e}: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
