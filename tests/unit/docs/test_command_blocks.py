"""Fenced blocks of README.md and docs/: each has a language; commands are run or say why not.

tests/e2e/test_documented_commands.py executes them.
"""

from pathlib import Path

import pytest

from tests import command_blocks as found

PAGES = found.pages()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(found.ROOT).as_posix())
def test_blocks_have_a_known_language(path: Path) -> None:
    wrong = [block.name for block in found.blocks(path) if block.language not in found.LANGUAGES]
    assert not wrong, (
        f"{wrong}: write ```bash for commands (with <!-- not run: REASON --> right above a block "
        "that cannot run here), ```yaml, ```python, ```json or ```text for the rest"
    )


def test_most_commands_are_executed() -> None:
    commands = [block for path in PAGES for block in found.blocks(path) if block.is_command]
    executed = [block for block in commands if block.reason is None]
    assert len(commands) > 15
    assert len(executed) * 2 > len(commands)


def test_executed_blocks_hold_no_placeholders() -> None:
    """``...`` and options in brackets are for readers."""
    wrong = [
        block.name
        for path in PAGES
        for block in found.commands(path)
        for line in block.text.splitlines()
        if " ... " in f"{line} " or " [-" in line
    ]
    assert not wrong, f"{wrong}: write a command that runs, or mark the block"


def test_a_mark_is_read_only_right_above_its_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    marked = "<!-- not run: no GPU -->\n```bash\na\n```\n"
    page.write_text(marked + "<!-- not run: x -->\n\n```bash\nb\n```\n", encoding="utf-8")
    monkeypatch.setattr(found, "ROOT", tmp_path)
    first, second = found.blocks(page)
    assert (first.reason, second.reason, second.line) == ("no GPU", None, 7)
