"""tools/build_docs.sh builds the site without a warning; its links lead somewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "docs" / "_build" / "html"


class Page(HTMLParser):
    """What a page links to, and the anchors it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.links += [value for key in ("href", "src") if (value := named.get(key))]
        self.anchors |= {value for key in ("id", "name") if (value := named.get(key))}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_site() -> None:
    done = subprocess.run(
        ["bash", "tools/build_docs.sh"],
        cwd=ROOT,
        env={**os.environ, "MOETRON_VENV": sys.prefix},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sources = [p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts]
    for source in sources:
        page = SITE / source.relative_to(ROOT / "docs").with_suffix(".html")
        assert page.is_file(), page
    pages = {path.resolve(): Page(path) for path in SITE.rglob("*.html")}
    broken, count = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            count += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = target in pages and not parts.fragment
            found = target.is_file() and not parts.fragment
            anchored = target in pages and unquote(parts.fragment) in pages[target].anchors
            if not (known or found or anchored):
                broken.append(f"{path.relative_to(SITE)}: {link}")
    assert not broken, "\n".join(broken)
    assert count > 1000
    print(f"{len(pages)} pages, {count} links inside the site")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pages_do_not_call_home() -> None:
    """Nothing is loaded from elsewhere, so that the site works without a network."""
    assert SITE.is_dir(), "test_site builds it"
    for path in SITE.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="https?://[^"]*"', text), path
