"""tools/setup_env.sh: which build of torch it installs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/usr/bin/env bash
if [ "$1 $2" = "-m pip" ]; then shift 2; echo "$*" >>{log}; exit 0; fi
PYTHONPATH={packages} exec {python} "$@"
"""


@pytest.mark.parametrize(
    ("wanted", "has", "gpu", "installs"),
    [
        ("", None, False, "torch==2.13.0+cpu"),
        ("", None, True, "torch==2.13.0"),
        ("cuda", None, False, "torch==2.13.0"),  # a login node
        ("cuda", "2.13.0+cpu", False, "torch==2.13.0"),
        ("cuda", "2.13.0", False, None),
        ("cpu", "2.13.0+cu130", True, "torch==2.13.0+cpu"),
        ("cpu", None, True, "torch==2.13.0+cpu"),
        ("", "2.13.0+cu130", False, None),
        ("", "2.12.0", False, "torch==2.13.0+cpu"),
    ],
)
def test_the_build_of_torch(
    tmp_path: Path, wanted: str, has: str | None, gpu: bool, installs: str | None
) -> None:
    log, programs = tmp_path / "log", tmp_path / "bin"
    for folder in (tmp_path / "venv" / "bin", programs, tmp_path / "packages"):
        folder.mkdir(parents=True)
    if has is not None:
        information = tmp_path / "packages" / f"torch-{has}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Name: torch\nVersion: {has}\n")
    else:
        (tmp_path / "packages" / "importlib").mkdir()  # hides the module: no torch is found
        (tmp_path / "packages" / "importlib" / "__init__.py").write_text("raise ImportError")
    text = PYTHON.format(log=log, packages=tmp_path / "packages", python=sys.executable)
    for path, content in (
        (tmp_path / "venv" / "bin" / "python", text),
        (programs / "nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 9}\n"),
    ):
        path.write_text(content)
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    environment |= {"MOETRON_VENV": str(tmp_path / "venv"), "MOETRON_TORCH": wanted}
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "setup_env.sh")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    asked = [line.split()[-1] for line in log.read_text().splitlines() if " torch==" in line]
    assert asked == ([] if installs is None else [installs])


def test_an_unknown_build_is_refused() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "setup_env.sh")],
        env={**os.environ, "MOETRON_TORCH": "rocm"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "MOETRON_TORCH=rocm" in done.stderr
