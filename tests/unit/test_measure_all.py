"""tests/gpu/measure_all.sh: what it runs, limits and results; with a stand-in for Python."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "gpu" / "measure_all.sh"
STAND_IN = """#!/usr/bin/env bash
case " $* " in {slow}) sleep 60 ;; {failing}) exit 1 ;; *" pip "*) exit 0 ;; esac
echo "$*"
"""


def _run(
    folder: Path, limit_s: int, slow: str = "none", failing: str = "none", only: str = ""
) -> tuple[int, str]:
    """Return exit code and summary; arguments that match a pattern hang or fail."""
    python = folder / "python"
    python.write_text(STAND_IN.format(slow=slow, failing=failing))
    python.chmod(0o755)
    (folder / "references.jsonl").touch()
    done = subprocess.run(
        ["bash", str(SCRIPT), str(folder), str(folder / "out")],
        env={
            "PATH": os.environ["PATH"],
            "PYTHON": str(python),
            "LIMIT_S": str(limit_s),
            "ONLY": only,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, (folder / "out" / "summary.txt").read_text()


def test_every_part_runs_and_is_packed(tmp_path: Path) -> None:
    code, summary = _run(tmp_path, 590)
    parts = {line.split()[0] for line in summary.splitlines()}
    kinds = ("graphs", "local", "local16", "te32", "te16", "fp8", "fp8_blocks", "fp8_parameters")
    assert code == 0, summary
    assert parts == {*(f"compare_{kind}" for kind in kinds), "tests_gpu", "losses", "bench"}
    with tarfile.open(tmp_path / "out" / "figures.tar") as packed:
        names = {name.removeprefix("./") for name in packed.getnames()}
    assert {"summary.txt", "machine.txt", *(f"{part}.log" for part in parts)} <= names
    log = (tmp_path / "out" / "compare_te16.log").read_text()
    assert f"--references {tmp_path} --kinds te16 " in log and "compare_te16.jsonl" in log


def test_a_failure_is_reported(tmp_path: Path) -> None:
    code, summary = _run(tmp_path, 590, failing='*" --kinds te16 "*')
    assert code == 1
    failed = [line.split()[0] for line in summary.splitlines() if line.split()[1] != "0"]
    assert failed == ["compare_te16"]


def test_parts_are_chosen_by_name(tmp_path: Path) -> None:
    code, summary = _run(tmp_path, 590, only="graphs|bench")
    assert code == 0
    assert [line.split()[0] for line in summary.splitlines()] == ["compare_graphs", "bench"]


@pytest.mark.slow
def test_no_part_exceeds_the_time_that_is_left(tmp_path: Path) -> None:
    code, summary = _run(tmp_path, 6, slow='*" pytest "*')
    assert code == 1
    killed = next(line for line in summary.splitlines() if line.startswith("tests_gpu"))
    assert killed.split()[1] in ("124", "137")
    assert summary.count("not started") == 10  # all others


@pytest.mark.parametrize("made", [True, False])
def test_references_are_needed(tmp_path: Path, made: bool) -> None:
    if made:
        (tmp_path / "references.jsonl").touch()
    more = {"PATH": os.environ["PATH"], "PYTHON": "true"}
    command = ["bash", str(SCRIPT), str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, env=more, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if made else 2)
    assert made or "python -m tests.gpu.references" in done.stderr
