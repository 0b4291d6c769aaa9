"""A run of the other megatron-core resumes with this one; see across_versions.py.

MOETRON_REFERENCE_PYTHON names the interpreter of the other environment (tests/run.sh --python).
"""

import os
import sys

import pytest

from tests.golden.across_versions import (
    DROPOUT,
    ENDS,
    RESUMED,
    TOLERANCE,
    largest_difference,
    resumed,
)
from tests.golden.losses import train

OTHER = os.environ.get("MOETRON_REFERENCE_PYTHON", "")


def test_the_largest_difference_is_relative() -> None:
    found = {"lm_loss": [1.0, 2.0], "grad_norm": [10.0, 10.1], "other": [0.0, 5.0]}
    expected = {"lm_loss": [1.0, 2.1], "grad_norm": [10.0, 10.0], "other": [0.0, 1.0]}
    difference, place = largest_difference(found, expected)
    assert difference == pytest.approx(0.1 / 2.1) and place == "lm_loss at step 2"
    assert largest_difference(expected, expected)[0] == 0


@pytest.mark.skipif(not OTHER, reason="needs MOETRON_REFERENCE_PYTHON")
@pytest.mark.parametrize("recipe", RESUMED)
def test_a_run_of_the_other_version_resumes_identically(recipe: str) -> None:
    """With dropout, so that the states of random numbers count."""
    expected = train(recipe, OTHER, 1, (*DROPOUT, *ENDS))
    difference, place = largest_difference(resumed(recipe, OTHER, sys.executable), expected)
    assert difference <= TOLERANCE, place
