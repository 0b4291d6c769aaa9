"""checks.py runs every rule of moe/config/rules."""

import ast
from pathlib import Path

import pytest

from moetron.moe.config import checks

FOLDER = Path(__file__).parents[4] / "moe" / "config" / "rules"
ASKED = {(r.__module__.split(".")[-1], r.__name__) for r in checks.SETTINGS_RULES}
ASKED |= {(r.__module__.split(".")[-1], r.__name__) for r in checks.INPUT_RULES}


def rules_of(path: Path) -> set[str]:
    """Return public functions that take only a case and yield problems."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and [ast.unparse(a.annotation or ast.Name("")) for a in node.args.args] == ["Case"]
    }


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_rule_of_a_module_runs(path: Path) -> None:
    written = {(path.stem, name) for name in rules_of(path)}
    assert written <= ASKED, f"never asked: {sorted(written - ASKED)}"


def test_no_rule_runs_twice_and_all_modules_are_found() -> None:
    assert len(ASKED) == len(checks.SETTINGS_RULES) + len(checks.INPUT_RULES) >= 37
    assert {(path.stem, name) for path in FOLDER.glob("*.py") for name in rules_of(path)} == ASKED
