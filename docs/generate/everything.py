"""All generated pages and figures, by path."""

from pathlib import Path

from docs.generate import concept_figures, migration_page, modules_page, recipe_table, rooms_figure
from moetron.moe.config import recipe_schema

ROOT = Path(__file__).resolve().parents[2]
GENERATORS = (migration_page, modules_page, recipe_table, rooms_figure, concept_figures)


def documents() -> dict[str, str]:
    """Return path from the checkout's root -> text."""
    found = {"examples/recipe.schema.json": recipe_schema.document()}
    for generator in GENERATORS:
        found.update(generator.pages())
    return found
