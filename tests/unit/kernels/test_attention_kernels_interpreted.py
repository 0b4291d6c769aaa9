"""Kernels of norms, attention and loss in Triton's interpreter."""

from pathlib import Path

import pytest

from tests.unit.kernels.interpreter import rerun_interpreted


@pytest.mark.parametrize("name", ["cross_entropy", "query_key", "rotary"])
def test_in_the_interpreter(name: str) -> None:
    rerun_interpreted(str(Path(__file__).with_name(f"test_{name}.py")))
