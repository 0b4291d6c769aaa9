"""Readers of manual pages (roff) and Perl documentation (pod)."""

import re
from pathlib import Path

from moetron.data.corpora.formats import read_text, tidy

ROFF_ESCAPES = {
    r"\-": "-", r"\e": "\\", r"\ ": " ", r"\~": " ", r"\&": "", r"\|": "", r"\^": "", r"\:": "",
    r"\%": "", r"\/": "", r"\,": "", r"\(aq": "'", r"\(dq": '"', r"\(bu": "*", r"\(em": "\u2014",
    r"\(en": "\u2013", r"\(lq": "\u201c", r"\(rq": "\u201d", r"\(oq": "\u2018", r"\(cq": "\u2019",
    r"\(co": "\u00a9", r"\(mu": "\u00d7", r"\(+-": "\u00b1", r"\(ti": "~", r"\(ha": "^",
    r"\(ga": "`", r"\`": "`", r"\'": "'", r"\*(Aq": "'", r"\*(C`": '"', r"\*(C'": '"',
    r"\*(--": "\u2014", r"\*(L\"": '"', r"\*(R\"": '"', r"\.": ".",
}  # fmt: skip
ROFF_ESCAPE = re.compile(
    r"\\f(?:\[[^]]*\]|\([A-Za-z]{2}|.)|\\s[-+]?\d|\\[*]?(?:\(..|\[[^]]*\])|\\[hvwzn]'[^']*'|\\."
)
ROFF_HEADING = frozenset({"SH", "SS", "Sh", "Ss"})
ROFF_TEXT = frozenset({
    "B", "I", "R", "BR", "BI", "RB", "RI", "IB", "IR", "SM", "SB", "Nm", "Nd", "Fl", "Ar", "Op",
    "Pa", "Cm", "Xr", "Ic", "Em", "Sy", "Li", "Dv", "Ev", "Va", "Fn", "Ft", "Fa", "Sq", "Dq", "Ql",
})  # fmt: skip
ROFF_PARAGRAPH = frozenset({"PP", "P", "LP", "TP", "IP", "HP", "Pp", "It", "sp"})
ROFF_TABLES = re.compile(r"^\.TS.*?^\.TE.*?$\n?|^\.(?:ig|de).*?^\.\.$\n?", re.M | re.S)


def _roff_line(line: str) -> str:
    """Return the text of one line of roff; requests that set no text give nothing."""
    if line.startswith(('.\\"', "'\\\"", '.\\"')):
        return ""
    if line[:1] in (".", "'"):
        request, _, rest = line[1:].strip().partition(" ")
        rest = rest.replace('"', "")
        if request in ROFF_HEADING:
            return f"\n\n{rest.strip()}\n"
        if request in ROFF_PARAGRAPH:
            return f"\n\n{rest.strip()}\n" if request == "It" else "\n\n"
        return f"{rest.strip()}\n" if request in ROFF_TEXT else ""
    return line + "\n"


def man(path: Path) -> list[str]:
    """Read a manual page without its requests, escapes and tables."""
    source = ROFF_TABLES.sub("", read_text(path))
    if source.startswith(".so "):
        return []
    text = "".join(map(_roff_line, source.split("\n")))
    return [tidy(ROFF_ESCAPE.sub(lambda found: ROFF_ESCAPES.get(found[0], ""), text))]


POD_BLOCK = re.compile(r"^=begin\b.*?^=end\b.*?$", re.M | re.S)
POD_COMMAND = re.compile(
    r"^=(?:head\d|item)[ \t]+(.*)$|^=(?:over|back|cut|pod|encoding|for)\b.*$", re.M
)
POD_LINK = re.compile(r"L<(?:([^|<>]*)\|)?([^<>]*)>")
POD_CODE = re.compile(r"[BCFISX]<([^<>]*)>|[BCFISX]<< (.*?) >>")
POD_ESCAPES = {"E<lt>": "<", "E<gt>": ">", "E<verbar>": "|", "E<sol>": "/"}


def pod(path: Path) -> list[str]:
    """Read Perl's plain old documentation without its commands and formatting codes."""
    text = POD_BLOCK.sub("", read_text(path))
    text = POD_COMMAND.sub(lambda found: found[1] or "", text)
    text = POD_LINK.sub(lambda found: found[1] or found[2], text)
    for _ in range(3):  # codes nest: B<C<x>>
        text = POD_CODE.sub(lambda found: found[1] if found[1] is not None else found[2], text)
    for escape, character in POD_ESCAPES.items():
        text = text.replace(escape, character)
    return [tidy(text)]
