"""tools/typecheck.sh sees the types of our own modules, from outside of them too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).resolve().parents[2]
RIGHT = """
from moetron.data.shards.indexed_format import index_bytes
from moetron.moe.config.schema.derived import padded_to
from moetron.tokenizers.load import load_tokenizer

size: int = index_bytes(2, 3) + padded_to(128, 1000)
name: str = load_tokenizer("bytes").name
"""


def check(tmp_path: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Type-check a file that is not in the tree."""
    file = tmp_path / "outside.py"
    file.write_text(program)
    return subprocess.run(
        ["bash", ROOT / "tools" / "typecheck.sh", file],
        env={**os.environ, "MOETRON_VENV": sys.prefix},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_right_file_passes(tmp_path: Path) -> None:
    done = check(tmp_path, RIGHT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wrong_uses_of_our_modules_are_found(tmp_path: Path) -> None:
    """Each of the three folders, a missing module of ours, and a misspelled one of others."""
    program = (
        RIGHT.replace("(2, 3)", "(2)").replace("1000", '"1000"').replace("name: str", "n: int")
    )
    program += "import moetron.moe.config.no_such_module\nimport no_such_library\n"
    done = check(tmp_path, program)
    assert done.returncode == 1, done.stdout + done.stderr
    for error in (
        'Missing positional argument "boundaries" in call to "index_bytes"',
        'Argument 2 to "padded_to" has incompatible type "str"; expected "int"',
        'expression has type "str", variable has type "int"',
        '"moetron.moe.config.no_such_module"',
        'named "no_such_library"',
    ):
        assert error in done.stdout
    assert "Found 5 errors in 1 file" in done.stdout
