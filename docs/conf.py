"""Sphinx configuration of the documentation site: ``bash tools/build_docs.sh`` builds it."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

project = "Moetron"
author = "the Moetron authors"
project_copyright = author
version_line = (ROOT / "moetron" / "__init__.py").read_text(encoding="utf-8")
found = re.search(r'__version__ = "([^"]+)"', version_line)
assert found is not None
release = version = found.group(1)

extensions = ["myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["generate", "_build"]
root_doc = "index"

myst_heading_anchors = 3
"""Headings that links such as page.md#section reach."""
myst_enable_extensions = ["dollarmath"]

nitpicky = True  # a broken reference is a warning, and a warning fails the build
smartquotes = False  # --flag would become a dash

html_theme = "furo"
html_title = f"Moetron {release}"
html_static_path = ["_static"]
html_css_files = ["moetron.css"]
html_show_sourcelink = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp"
linkcheck_timeout = 20
