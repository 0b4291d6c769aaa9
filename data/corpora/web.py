"""Reader of HTML pages."""

import re
from html.parser import HTMLParser
from pathlib import Path

from moetron.data.corpora.formats import read_text, tidy


class _Text(HTMLParser):
    """Parser that collects the text of a page, or of its main part if marked."""

    SKIPPED = frozenset({"script", "style", "head", "nav", "header", "footer", "svg", "noscript"})
    BLOCKS = frozenset({
        "p", "div", "br", "li", "ul", "ol", "dl", "dt", "dd", "tr", "table", "pre", "h1", "h2",
        "h3", "h4", "h5", "h6", "section", "article", "blockquote",
    })  # fmt: skip
    SPACED = frozenset({"p", "pre", "h1", "h2", "h3", "h4"})
    MAIN = frozenset({"DisplayArea", "mw-content-text", "content", "docContent", "main-content"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.main: list[int] = []  # start and end of the main part in parts
        self._main_tag = ""
        self._main_depth = 0
        self._skipping: list[str] = []
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SKIPPED:
            self._skipping.append(tag)
        elif tag in self.BLOCKS:
            self.parts.append("\n\n" if tag in self.SPACED else "\n")
            self._preformatted += tag == "pre"
        named = dict(attrs)
        is_main = tag == "main" or named.get("role") == "main" or named.get("id") in self.MAIN
        if is_main and not self.main:
            self.main = [len(self.parts)]
            self._main_tag = tag
        self._main_depth += tag == self._main_tag

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipping:
            while self._skipping.pop() != tag:
                pass
        elif tag in self.BLOCKS:
            self.parts.append("\n")
            self._preformatted -= tag == "pre" and self._preformatted > 0
        self._main_depth -= tag == self._main_tag
        if len(self.main) == 1 and self._main_depth == 0:
            self.main.append(len(self.parts))

    def handle_data(self, data: str) -> None:
        if self._skipping:
            return
        if not self._preformatted:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith(("\n", " ")):
                data = data.lstrip(" ")
        self.parts.append(data)


def html(path: Path) -> list[str]:
    """Read a page's text: block elements end lines; scripts, styles and navigation are skipped."""
    parser = _Text()
    parser.feed(read_text(path))
    parser.close()
    return [tidy("".join(parser.parts[slice(*parser.main)] if parser.main else parser.parts))]
