"""Run of a test file in Triton's interpreter, which needs no GPU."""

import os
import subprocess
import sys

import pytest

from moetron.moe.kernels.availability import is_interpreted, triton_is_installed


def rerun_interpreted(file: str) -> None:
    """Run the tests of ``file`` with TRITON_INTERPRET=1 in another process, or skip."""
    if is_interpreted():
        pytest.skip("this is the run in the interpreter")
    if not triton_is_installed():
        pytest.skip("triton is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", file],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout
