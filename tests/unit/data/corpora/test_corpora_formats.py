"""Readers of system files: one worked example per format."""

import ast
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetron.data.corpora.formats import bundle, dictd, fortunes, info, plain, read_text, tidy
from moetron.data.corpora.manuals import man, pod
from moetron.data.corpora.python_text import code, documentation, topics
from moetron.data.corpora.web import html

ROFF = r"""'\" t
.\" a comment
.TH LS 1 "May 2024"
.SH NAME
ls \- list \fIdirectory\fR contents
.PP
.B ls
takes \(aq\-\-all\(aq and
.BR sort (1).
.TS
tab(:); l l. a:b
.TE
\(dqquoted\(dq, 1\e2 \(bu \*(Aqx\*(Aq
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix in (".gz", ".dz") else content)
    return path


def test_manual_page(tmp_path: Path) -> None:
    (text,) = man(write(tmp_path, "ls.1.gz", ROFF))
    assert text == (
        "NAME\nls - list directory contents\n\nls\ntakes '--all' and\nsort (1).\n"
        "\"quoted\", 1\\2 * 'x'\n"
    )
    assert man(write(tmp_path, "dir.1", ".so man1/ls.1\n")) == []


def test_perl_documentation(tmp_path: Path) -> None:
    source = (
        "=head1 NAME\n\nC<open> - see L<the manual|perlfunc> or L<perlio>, B<C<x>> E<lt>y>\n\n"
        "=begin html\n\n<b>\n\n=end html\n\n=over 4\n\n=item one\n\ntext\n\n=back\n\n=cut\n"
    )
    (text,) = pod(write(tmp_path, "a.pod", source))
    assert text == "NAME\n\nopen - see the manual or perlio, x <y>\n\none\n\ntext\n"


def test_page_without_its_frame(tmp_path: Path) -> None:
    source = (
        "<html><head><title>T</title><style>x{}</style></head><body><nav>menu</nav>"
        "<div id='Contents'>frame</div><div id='content'><h1>Head</h1><div>in\n  side</div>"
        "<p>a &lt; b,\n   <em>so</em> c</p><pre>  two\n  lines</pre><script>x()</script></div>"
        "<div>donate</div></body></html>"
    )
    (text,) = html(write(tmp_path, "a.html", source))
    assert text == "Head\n\nin side\n\na < b, so c\n\n  two\n  lines\n"


def test_page_that_marks_no_main_part(tmp_path: Path) -> None:
    (text,) = html(write(tmp_path, "a.html", "<p>one<br>two</p><ul><li>three</ul>"))
    assert text == "one\ntwo\n\nthree\n"


def test_info_nodes(tmp_path: Path) -> None:
    source = "intro\n\x1f\nFile: a.info,  Node: Top\n\nFirst.\n\x1f\nTag Table:\nNode: Top\x7f1\n"
    assert info(write(tmp_path, "a.info.gz", source)) == ["First.\n"]


def test_fortunes_are_bundled(tmp_path: Path) -> None:
    assert fortunes(write(tmp_path, "f", "one\n%\ntwo\n")) == ["one\n\ntwo\n"]


def test_dictionary_entries_in_the_order_of_the_text(tmp_path: Path) -> None:
    path = write(tmp_path, "d.dict.dz", "00-database-info\napple\n  a fruit\nbee\n  an insect\n")
    index = "00-database-info\tA\tR\nbee\th\tQ\nBees\th\tQ\napple\tR\tQ\n"
    (tmp_path / "d.index").write_text(index)
    (text,) = dictd(path)
    assert text == "apple\n  a fruit\n\nbee\n  an insect\n"


def test_unreadable_content_is_empty(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "broken.gz").write_bytes(b"\x1f\x8bnonsense")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    assert read_text(tmp_path / "binary") == read_text(tmp_path / "broken.gz") == ""
    assert plain(tmp_path / "latin") == ["é\n"]


@given(parts=st.lists(st.text("ab", max_size=9)), size=st.integers(1, 20))
def test_bundles_lose_nothing(parts: list[str], size: int) -> None:
    found = bundle(parts, size)
    assert "\n".join(found) == "\n".join(parts)
    assert all(len(text.replace("\n", "")) >= size for text in found[:-1])


def test_tidy_keeps_one_blank_line() -> None:
    assert tidy("\n a \r\n\n \n\t\n\nb\n\n") == " a\n\nb\n"


LONG = "A sentence that is long enough to be a document of its own, written at some length. " * 2
SOURCE = f'''"""{LONG}"""

import os


class Only:
    """{LONG}"""


def short():
    """Short."""
    if os.name:

        async def nested():
            """é {LONG}

                Indented.
            Not indented.
            """
            return 1
'''


def test_python_is_split_and_no_text_counts_twice(tmp_path: Path) -> None:
    path = write(tmp_path, "a.py", SOURCE)
    (kept,) = code(path)
    assert LONG not in kept
    assert '"""Short."""' in kept
    tree = ast.parse(kept)
    assert isinstance(tree.body[1], ast.ClassDef)
    assert isinstance(tree.body[1].body[0], ast.Pass)
    module, only, nested = documentation(path)
    assert module == LONG.strip() + "\n"
    assert only == f"Only\n\n{LONG.strip()}\n"
    assert nested == f"nested\n\né {LONG.strip()}\n\n    Indented.\nNot indented.\n"


@pytest.mark.parametrize("name", ["__init__.py", "decoder.py", "encoder.py"])
def test_the_standard_librarys_code_still_parses(name: str) -> None:
    path = Path(json.__file__).with_name(name)
    (kept,) = code(path)
    before = [type(node) for node in ast.walk(ast.parse(path.read_text()))]
    after = [type(node) for node in ast.walk(ast.parse(kept))]
    assert before.count(ast.FunctionDef) == after.count(ast.FunctionDef)
    assert before.count(ast.Call) == after.count(ast.Call)
    assert len(documentation(path)) == before.count(ast.Expr) - after.count(ast.Expr)


def test_topics_are_read_without_running_them(tmp_path: Path) -> None:
    path = write(tmp_path, "topics.py", "topics = {'if': 'The if statement', 'for': 'Loops'}\n")
    assert topics(path) == ["The if statement\n", "Loops\n"]
