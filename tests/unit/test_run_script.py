"""tests/run.sh runs all its parts whatever fails, and says which did; with stand-in commands."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    ".venv/bin/ruff format --check --quiet .",
    ".venv/bin/ruff check --quiet .",
    ".venv/bin/shellcheck tests/run.sh",
    "tools/typecheck.sh",
    "tools/build_docs.sh",
    ".venv/bin/pytest tests -m not slow and not parallel_full and not gpu",
)
STAND_IN = """#!/usr/bin/env bash
echo "$0 $*" >>log
case "$0 $*" in {failing}) exit 3 ;; esac
"""


def run_script(folder: Path, failing: str, *arguments: str) -> tuple[int, str, list[str]]:
    """(exit code, last line, commands run) of tests/run.sh where what matches ``failing`` fails."""
    for name in ("tests", "tools", ".venv/bin", ".venv-newest/bin"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "run.sh", folder / "tests")
    programs = [
        f"{venv}/bin/{name}" for venv in (".venv", ".venv-newest") for name in ("ruff", "pytest")
    ]
    programs += [".venv/bin/shellcheck"]
    programs += [f"tools/{name}.sh" for name in ("typecheck", "setup_env", "build_docs")]
    for name in programs:
        (folder / name).write_text(STAND_IN.format(failing=failing))
        (folder / name).chmod(0o755)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "tests/run.sh"], cwd=folder, check=True)
    done = subprocess.run(
        ["bash", "tests/run.sh", *arguments],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = (done.stdout + done.stderr).splitlines()
    return done.returncode, lines[-1] if lines else "", (folder / "log").read_text().splitlines()


@pytest.mark.parametrize(
    ("failing", "code", "last"),
    [
        ("nothing", 0, "tests/run.sh: all parts passed"),
        ("*'ruff format'*", 1, "tests/run.sh: FAILED: format"),
        ("*typecheck*", 1, "tests/run.sh: FAILED: types"),
        ("*ruff*|*shellcheck*|*pytest*", 1, "tests/run.sh: FAILED: format lint shellcheck tests"),
    ],
)
def test_no_failure_hides_another_part(tmp_path: Path, failing: str, code: int, last: str) -> None:
    found_code, found_last, commands = run_script(tmp_path, failing)
    assert (found_code, found_last) == (code, last)
    setup, *parts = commands
    assert setup == "tools/setup_env.sh --dev"
    assert len(parts) == len(PARTS)
    assert all(found.startswith(part) for found, part in zip(parts, PARTS, strict=True))


def test_the_newest_versions_have_an_environment_of_their_own(tmp_path: Path) -> None:
    code, last, commands = run_script(tmp_path, "*pytest*", "--newest", "--only", "tests/unit")
    assert commands == ["tools/setup_env.sh --newest", ".venv-newest/bin/pytest tests/unit"]
    assert (code, last) == (1, "tests/run.sh: FAILED: tests")


def test_no_tests_without_an_environment(tmp_path: Path) -> None:
    code, last, commands = run_script(tmp_path, "*setup_env*")
    assert (code, last, commands) == (3, "", ["tools/setup_env.sh --dev"])
