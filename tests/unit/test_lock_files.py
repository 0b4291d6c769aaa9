"""The lock files hold what setup.py asks for: `bash tools/lock.sh` writes them."""

import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "requirements"
ENTRY = re.compile(
    r"^([a-z0-9._-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.M
)
PYTHONS = sorted(int(path.name[2:].removesuffix("-dev.lock")) for path in FOLDER.glob("*-dev.lock"))
"""310, 311, ..."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of setup.py's call of ``setup``."""
    import setuptools

    found: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **words: found.update(words))
    file = ROOT / "setup.py"
    exec(compile(file.read_text(encoding="utf-8"), file, "exec"), {"__file__": file})
    return found


def locked(python: int, suffix: str) -> dict[str, str]:
    """Package -> version; every entry has hashes."""
    text = (FOLDER / f"py{python}{suffix}.lock").read_text(encoding="utf-8")
    entries = {name: version for name, version, _ in ENTRY.findall(text)}
    assert len(entries) == len(re.findall(r"^[^\s#]", text, re.M)), "an entry without hashes"
    return entries


def torch_version() -> str:
    text = (ROOT / "tools" / "setup_env.sh").read_text(encoding="utf-8")
    match = re.search(r"^readonly TORCH_VERSION=(\S+)$", text, re.M)
    assert match is not None
    return match[1]


def test_every_supported_python_has_its_files(asked: dict[str, Any]) -> None:
    supported = SpecifierSet(asked["python_requires"])
    minors = [minor for minor in range(40) if supported.contains(f"3.{minor}.0")]
    assert [300 + minor for minor in minors] == PYTHONS
    names = {f"py{python}{suffix}.lock" for python in PYTHONS for suffix in ("", "-dev")}
    assert {path.name for path in FOLDER.glob("*.lock")} == names


@pytest.mark.parametrize("python", PYTHONS)
def test_versions_are_inside_the_ranges(python: int, asked: dict[str, Any]) -> None:
    base, dev = locked(python, ""), locked(python, "-dev")
    assert base.items() <= dev.items()
    environment = (FOLDER / "environment.in").read_text().splitlines()
    needed = [line for line in environment if not line.startswith("#")] + asked["install_requires"]
    for lines, lock in ((needed, base), (asked["extras_require"]["dev"], dev)):
        for requirement in map(Requirement, lines):
            where = {"python_version": f"3.{python - 300}"}
            if requirement.marker is not None and not requirement.marker.evaluate(where):
                continue
            name = canonicalize_name(requirement.name)
            version = torch_version() if name == "torch" else lock.get(name)
            assert version is not None, f"{name} is not locked; run tools/lock.sh"
            assert requirement.specifier.contains(version), f"{name} {version}; run tools/lock.sh"


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_files_name_no_place_and_no_build_of_torch(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) < 500 * 1024
    assert not re.search(r"://|^-|index-url|find-links|(?<!\w)/\w", text, re.M)
    assert not re.search(r"^(torch|triton|nvidia-.*|cuda-.*)==", text, re.M)
