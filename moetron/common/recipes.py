"""Location of recipes: examples/ of a checkout, or the copy inside an installed package."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """Return the folder with one folder for each recipe."""
    checkout = _PACKAGE.parent
    if (checkout / "pretrain_moe.py").is_file() and (checkout / "examples").is_dir():
        return checkout / "examples"
    return _PACKAGE / "recipes"


def recipe_names() -> list[str]:
    """Return the names that ``--config`` takes in place of a file."""
    files = recipes_folder().glob("*/*.yaml")
    names = [file.relative_to(recipes_folder()).with_suffix("").as_posix() for file in files]
    return sorted(name.removesuffix("/pretrain") for name in names)


def recipe_path(name: str) -> Path:
    """Return the file that ``--config name`` means.

    An existing file; else a shipped recipe: ``olmoe_1b_7b`` (its pretrain.yaml) or
    ``olmoe_1b_7b/tiny``; else ``name`` itself, which does not exist.
    """
    given = Path(name)
    if given.exists() or not name:
        return given
    for path in (recipes_folder() / name / "pretrain.yaml", recipes_folder() / f"{name}.yaml"):
        if path.is_file():
            return path
    return given
