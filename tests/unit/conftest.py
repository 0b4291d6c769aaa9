"""What unit tests of several folders share."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OLDEST = "transformers>=4.57,<4.58"


@pytest.fixture(scope="session")
def transformers4(request: pytest.FixtureRequest) -> Path:
    """A folder with the oldest supported transformers and what it needs, but torch.

    Put it first on PYTHONPATH. It is made once, at $MOETRON_TRANSFORMERS4 or in pytest's cache.
    """
    if made := os.environ.get("MOETRON_TRANSFORMERS4"):
        folder = Path(made)
    else:
        cache = request.config.cache
        assert cache is not None
        folder = cache.mkdir("transformers4") / "packages"
    if not (folder / "transformers").is_dir():
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(temporary)]
        done = subprocess.run([*command, OLDEST], capture_output=True, text=True, timeout=900)
        if done.returncode:
            pytest.skip(f"{OLDEST} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        temporary.rename(folder)
    return folder
