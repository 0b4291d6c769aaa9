"""Installation into an environment that brings torch and Transformer Engine, as containers do.

Both are stand-ins: only their metadata, which is all that pip reads. The environment sees the other
packages of this interpreter.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BROUGHT = {"torch": "2.11.0a0+nv26.2", "transformer-engine": "2.11.0+c188b53"}
"""Versions as NVIDIA's builds spell them: pre-releases, local."""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Return the interpreter of an environment with `BROUGHT`."""
    environment = tmp_path / "container"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    found = environment / "bin" / "python"
    site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([found, "-c", site], text=True).strip())
    for name, version in BROUGHT.items():
        metadata = packages / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nProvides-Extra: pytorch\n"
        metadata.write_text(text)
        (metadata.parent / "INSTALLER").write_text("container\n")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return found


def pip(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--python", str(python), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def versions(python: Path) -> dict[str, str]:
    listed = json.loads(pip(python, "list", "--format", "json").stdout)
    return {row["name"]: row["version"] for row in listed}


@pytest.mark.parametrize("extra", ["", "[te]"])
def test_torch_and_transformer_engine_stay(python: Path, tmp_path: Path, extra: str) -> None:
    """Nothing but Moetron is installed; with --no-index pip could not hide a download."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", "tests", "docs")
    shutil.copytree(ROOT, source, ignore=ignored)
    before = versions(python)
    assert {name: before[name] for name in BROUGHT} == BROUGHT
    options = ("--no-index", "--no-build-isolation", "--ignore-installed", "--no-deps")
    plain = ("install", "--no-index", "--no-build-isolation")
    done = pip(python, *plain, f"{source}{extra}")
    assert done.returncode == 0, done.stderr
    after = versions(python)
    assert {name: after[name] for name in before if name != "moetron"} == {
        name: version for name, version in before.items() if name != "moetron"
    }
    assert "moetron" in after and not done.stdout.count("Uninstalling")
    done = pip(python, "install", *options, str(source))  # as the guide says for containers
    assert done.returncode == 0, done.stderr
    assert {name: versions(python)[name] for name in BROUGHT} == BROUGHT
