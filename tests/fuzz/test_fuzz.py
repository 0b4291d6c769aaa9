"""Mutated recipes and files end in success or in exit code 2 with a message, never otherwise.

``python -m tests.fuzz --seed N --count N`` runs more.
"""

import os
import signal
from pathlib import Path

import pytest

from tests.fuzz.campaign import campaign
from tests.fuzz.cases import in_child, run
from tests.fuzz.seeds import make_elsewhere

SEED, RECIPES, FILES = 20261126, 2_000, 500


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "seeds"
    make_elsewhere(folder)
    return folder


def test_mutated_recipes(tmp_path: Path) -> None:
    found = campaign("recipe", tmp_path, tmp_path / "work", SEED, RECIPES)
    assert not found.faults, found.text()
    assert found.codes[0] > RECIPES // 50, "some mutations are valid"
    assert found.codes[2] > RECIPES // 2


def test_mutated_files(seeds: Path, tmp_path: Path) -> None:
    found = campaign("file", seeds, tmp_path / "work", SEED, FILES)
    assert not found.faults, found.text()
    assert found.codes[0] > FILES // 10
    assert found.codes[2] > FILES // 4


def test_faults_are_found() -> None:
    """A traceback, silence, and the end of the process are faults."""

    def abort() -> int:
        raise SystemExit(2)

    def fail() -> int:
        raise KeyError("x")

    def die() -> int:
        os.kill(os.getpid(), signal.SIGKILL)

    cases = [lambda main=main: run(("train",), main) for main in (abort, fail, die, lambda: 0)]
    silent, traceback, dead, good = in_child(cases)
    assert silent.fault == "exit code 2 without a message"
    assert "KeyError" in (traceback.fault or "")
    assert "ends its process: status -9" in (dead.fault or "")
    assert good.fault is None
