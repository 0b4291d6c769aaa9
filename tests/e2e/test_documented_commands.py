"""Every command block of README.md and docs/ that is not marked, executed page by page."""

import shutil
from pathlib import Path

import pytest

from tests import command_blocks as found

PAGES = [path for path in found.pages() if found.commands(path)]
TIMEOUT_S = 1800.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("documented")
    done = found.prepare(made, TIMEOUT_S)
    assert done.returncode == 0, done.stdout[-3000:]
    return made


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(found.ROOT).as_posix())
def test_commands_of_a_page(path: Path, folder: Path, tmp_path: Path) -> None:
    here = tmp_path / "page"  # a page finds what was prepared, and nothing of other pages
    shutil.copytree(folder, here, symlinks=True)
    done = found.execute(found.script(found.commands(path)), here, TIMEOUT_S)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_failing_block_stops_the_page_and_is_named(tmp_path: Path) -> None:
    bad = found.Block("docs/x.md", 7, "bash", "false | cat", None)
    after = found.Block("docs/x.md", 9, "bash", "echo reached", None)
    done = found.execute(found.script([bad, after]), tmp_path, 60)
    assert done.returncode != 0
    assert done.stdout == "== docs/x.md:7\n"
