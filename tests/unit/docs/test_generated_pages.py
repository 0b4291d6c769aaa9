"""Generated pages and figures follow the code, and Megatron-LM's flags are all answered."""

from pathlib import Path

import pytest

from docs.generate import migration_page
from docs.generate.everything import ROOT, documents

DOCUMENTS = documents()


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_document_is_current(name: str) -> None:
    path = ROOT / name
    assert path.is_file(), "run: python -m docs.generate"
    assert path.read_text(encoding="utf-8") == DOCUMENTS[name], "run: python -m docs.generate"


def test_every_flag_of_megatron_is_on_the_page() -> None:
    page = DOCUMENTS[migration_page.PAGE]
    flags = migration_page.megatron()["flags"]
    assert len(flags) > 600
    absent = [name for flag in flags for name in flag["flags"] if f"`{name}`" not in page]
    assert not absent


def _theirs() -> set[str]:
    return {name for flag in migration_page.megatron()["flags"] for name in flag["flags"]}


@pytest.mark.parametrize("section", ["same_name", "other_name", "built_in", "refused"])
def test_notes_are_about_flags_of_megatron(section: str) -> None:
    assert set(migration_page.notes()[section]) <= _theirs()


def test_reasons_are_about_flags_that_are_not_there() -> None:
    named = [name for names in migration_page.notes()["not_there"].values() for name in names]
    absent = {
        name
        for row in migration_page.rows()
        if row.status == "not there"
        for name in row.flag["flags"]
    }
    assert len(set(named)) == len(named)
    assert set(named) <= absent


def test_notes_of_the_same_name_are_about_flags_of_both() -> None:
    assert set(migration_page.notes()["same_name"]) <= set(migration_page.our_flags())


@pytest.mark.parametrize("section", ["other_name", "built_in", "refused"])
def test_other_notes_are_about_flags_that_we_lack(section: str) -> None:
    assert not set(migration_page.notes()[section]) & set(migration_page.our_flags())


def test_other_names_exist() -> None:
    ours = {*migration_page.our_flags(), "--config", "--dry-run", "--build"}
    for entry in migration_page.notes()["other_name"].values():
        program, *flags = entry["ours"].split()
        if program.startswith("--"):
            assert {program, *flags} <= ours, entry
            continue
        assert (ROOT / program).is_file(), entry
        text = "".join(path.read_text("utf-8") for path in _sources_of(program))
        assert all(flag in text or flag in ours for flag in flags), entry


def _sources_of(program: str) -> list[Path]:
    """A tool, and the module with its flags."""
    others = [ROOT / "data" / "prepare" / "options.py"] if "preprocess" in program else []
    return [ROOT / program, *others]


@pytest.mark.parametrize(
    ("flag", "status", "ours"),
    [
        ("--tensor-model-parallel-size", "same", "1"),
        ("--adam-beta2", "other default", "0.95"),
        ("--disable-bias-linear", "other default", "off"),
        ("--use-rope-scaling", "other name", "`--rope-type`"),
        ("--ckpt-format", "built in", ""),
        ("--fp16", "refused", ""),
        ("--img-h", "not there", ""),
        ("--lr-warmup-iters", "same", "unset"),
    ],
)
def test_answers(flag: str, status: str, ours: str) -> None:
    (row,) = (row for row in migration_page.rows() if flag in row.flag["flags"])
    assert (row.status, row.ours) == (status, ours)
