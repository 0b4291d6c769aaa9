"""Collected corpora: no duplicates, within the budget, deterministic."""

import importlib
import os
from pathlib import Path
from types import ModuleType

import orjson
import pytest

from moetron.common.errors import UserError
from moetron.data.corpora import debian, system_text
from moetron.data.corpora.collect import MANIFEST, Task, documents_of, is_current, write_corpus
from moetron.data.corpora.formats import plain
from moetron.data.corpora.labels import labelled_texts
from moetron.data.readers.input_files import find_files

ROOT = Path(__file__).resolve().parents[4]


def text(number: int, characters: int = 1000) -> str:
    return (f"Line {number} of a text.\n" * characters)[:characters]


def tasks_in(folder: Path, per_source: int = 30) -> list[Task]:
    """Return the tasks of two sources whose files 0..9 are the same."""
    tasks = []
    for source in ("first", "second"):
        (folder / source).mkdir(parents=True)
        for number in range(per_source):
            path = folder / source / f"{number}.txt"
            path.write_text(text(number + 1000 * (number >= 10 and source == "second")))
            tasks.append(Task(source, f"{source}/{number}", path, plain))
    return tasks


def rows(output: Path) -> list[dict[str, str]]:
    return [orjson.loads(line) for path in sorted(output.glob("*.jsonl")) for line in path.open()]


def test_every_text_is_kept_once_by_the_first_source(tmp_path: Path) -> None:
    tasks = tasks_in(tmp_path / "in")
    counts = write_corpus(tasks, tmp_path / "out", 10**6, 1, lambda *_: None)
    found = rows(tmp_path / "out")
    assert {source: (count.documents, count.duplicates) for source, count in counts.items()} == {
        "first": (30, 0),
        "second": (20, 10),
    }
    assert len({row["text"] for row in found}) == len(found) == 50
    assert len({row["id"] for row in found}) == 50
    assert {row["source"] for row in found} == {"first", "second"}


def test_the_budget_is_divided_and_not_exceeded(tmp_path: Path) -> None:
    tasks = tasks_in(tmp_path / "in")
    counts = write_corpus(tasks, tmp_path / "out", 20_000, 1, lambda *_: None)
    assert 9_000 < counts["first"].bytes <= 10_000
    assert 18_000 < counts["first"].bytes + counts["second"].bytes <= 20_000
    assert sum(len(row["text"].encode()) for row in rows(tmp_path / "out")) == sum(
        count.bytes for count in counts.values()
    )


def test_workers_do_not_change_the_bytes(tmp_path: Path) -> None:
    tasks = tasks_in(tmp_path / "in")
    for workers in (1, 2):
        write_corpus(tasks, tmp_path / str(workers), 20_000, workers, lambda *_: None)
    for name in ("first.jsonl", "second.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_long_documents_are_split_without_loss(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(text(1, 450_000).strip() + "\n")
    parts = documents_of(Task("s", "long", path, plain))
    assert len(parts) == 3
    assert "".join(parts) == path.read_text()
    assert documents_of(Task("s", "gone", tmp_path / "gone", plain)) == []


def collector() -> ModuleType:
    return importlib.import_module("moetron.commands.collect_corpus")


def test_the_tool_reuses_a_complete_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, tasks, output = collector(), tasks_in(tmp_path / "in"), tmp_path / "out"
    monkeypatch.setattr(module, "gather", lambda *_: (tasks, {"first": "MIT"}))
    arguments = ["--output", str(output), "--workers", "1"]
    assert module.main(arguments) == 0
    manifest = orjson.loads((output / MANIFEST).read_bytes())
    assert manifest["sources"]["first"]["licence"] == "MIT"
    assert is_current(output, manifest["made_from"])
    assert not is_current(output, {**manifest["made_from"], "max_mb": 1})
    capsys.readouterr()
    module.main(arguments)
    assert capsys.readouterr().out == f"{output} is current\n"
    with (output / "second.jsonl").open("ab") as file:
        file.write(b"{}\n")
    module.main(arguments)
    assert "second" in capsys.readouterr().out
    assert is_current(output, manifest["made_from"])


def test_the_folder_can_be_an_input(tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_corpus(tasks_in(tmp_path / "in"), output, 10**6, 1, lambda *_: None)
    (output / MANIFEST).write_text("{}")
    found = list(labelled_texts(find_files([str(output)]), "text"))
    assert [source for source, _ in found] == ["first"] * 30 + ["second"] * 20
    folders = list(labelled_texts(find_files([str(tmp_path / "in" / "first")]), "text"))
    assert [source for source, _ in folders] == ["first"] * 30


def test_a_system_without_documentation_gives_nothing(tmp_path: Path) -> None:
    assert system_text.documentation(tmp_path) == system_text.manuals(tmp_path) == []


def test_documentation_is_found_and_legal_text_skipped(tmp_path: Path) -> None:
    for name in (
        "doc/a/README.gz", "doc/a/copyright", "doc/a/changelog.gz", "doc/a/guide.html",
        "doc/a/picture.png", "perl/5/pod/perl.pod", "info/a.info.gz", "man/man1/ls.1.gz",
        "man/de/man1/ls.1.gz",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "doc/a/link.html").symlink_to(tmp_path / "doc/a/guide.html")
    found = [task.id for task in system_text.documentation(tmp_path)]
    assert found == [
        "doc/a/README.gz", "doc/a/guide.html", "perl/5/pod/perl.pod", "info/a.info.gz",
    ]  # fmt: skip
    assert [task.source for task in system_text.manuals(tmp_path)] == [
        "manuals.translated",
        "manuals.english",
    ]


def test_unpacked_debian_packages_are_read_with_their_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = tmp_path / "jargon" / "usr" / "share" / "doc" / "jargon"
    share.mkdir(parents=True)
    (share / "copyright").write_text("Files: *\nLicense: GPL-2\n\nLicense: BSD\n long text\n")
    for name in ("a.txt", "b.txt", "skip.txt"):
        (share / name).write_text(name)
    package = debian.Package("jargon", "wiki.jargon", "usr/**/*.txt", plain, "skip")
    monkeypatch.setattr(debian, "PACKAGES", (package,))
    tasks, licences = debian.gather(tmp_path, print)
    assert [task.id.split("/")[-1] for task in tasks] == ["a.txt", "b.txt"]
    assert licences == {"wiki.jargon": "jargon: BSD, GPL-2"}


def test_a_system_without_apt_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get: not found; this corpus needs a Debian system"):
        debian.gather(tmp_path / "packages", lambda _: None)


def test_a_failing_download_reports_the_message_of_apt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "apt-get"
    fake.write_text("#!/bin/sh\necho 'E: no network' >&2\nexit 100\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"apt-get .* failed: E: no network"):
        debian.gather(tmp_path / "packages", lambda _: None)
