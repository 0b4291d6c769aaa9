"""Hostile checkpoints run no code in any command that reads them, and hang none.

``pytest tests/e2e/test_hostile_checkpoints.py -m slow -s`` prints the table of all kinds.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from moetron.moe.checkpoint import run_folder
from tests.e2e.hostile_folders import DATA, KINDS, RECORDS, SEALED, UNREAD, UNSEALED
from tests.fuzz import targets
from tests.fuzz.cases import Outcome, in_child, run
from tests.fuzz.seeds import make_elsewhere
from tests.fuzz.targets import Words, copy, reseal

COMMANDS: dict[str, Words] = {
    "inspect": targets.INSPECT[:-1],
    "inspect --verify": targets.INSPECT,
    "to-hf": targets.TO_HF,
    "generate": targets.GENERATE,
    "evaluate": ("evaluate",),
    "analyze": targets.ANALYZE,
    "upcycle": targets.UPCYCLE,
    "resume": targets.RESUME,
    "finetune": targets.FINETUNE,
    "report": targets.PAGE,
}
QUICK = ("inspect --verify", "to-hf", "upcycle", "report")
"""Commands that build no model."""


def accepts(command: str, kind: str) -> bool:
    """Return whether a command does not read what a kind changes."""
    if kind in UNREAD:
        return True
    if kind == "2^60 layers" and command == "report":  # which shows the settings
        return True
    if kind in DATA:
        return command in ("inspect", "inspect --verify", "report")
    return (
        command == "report"
        and kind not in RECORDS
        and "run.json" not in kind
        and "SHA256SUMS" not in kind
        and not kind.startswith("sums")
    )


def _evaluate() -> int:
    """Load as tools/evaluate.py does, which itself needs lm-evaluation-harness."""
    from moetron.moe.inference.generation import load_model
    from moetron.moe.training import runtime

    record = run_folder.read(Path("run")).record
    settings = run_folder.one_rank_settings(record, 1)
    with runtime.running(settings) as ranks:
        load_model(Path("run"), settings, 384, ranks)
    return 0


def _case(seeds: Path, work: Path, command: str, kind: str) -> Outcome:
    """Make a run hostile and read it."""
    name = "dense" if command == "upcycle" else "run"
    copy(seeds, ("a.bin", "a.idx", "a.json", name), work)
    step = work / name / "step_0000002"
    KINDS[kind](step)
    if kind not in UNSEALED:
        reseal(step, sizes=kind not in RECORDS and not kind.startswith("files"))
    outcome = run(COMMANDS[command], _evaluate if command == "evaluate" else None)
    ran = [str(path) for path in work.rglob("pwned")]
    fault = outcome.fault
    if ran:
        fault = f"ran code: {ran}"
    elif fault is None and outcome.code == 0 and not accepts(command, kind):
        fault = "is accepted"
    return Outcome(outcome.code, outcome.message, fault, outcome.seconds)


def _table(
    seeds: Path, work: Path, commands: Sequence[str], kinds: Sequence[str]
) -> dict[tuple[str, str], Outcome]:
    pairs = [(command, kind) for command in commands for kind in kinds]
    together = 8 if {*commands} - {*QUICK} else len(pairs)
    cases: list[Callable[[], Outcome]] = [partial(_case, seeds, work, *pair) for pair in pairs]
    return dict(zip(pairs, in_child(cases, together), strict=True))


def _require_good(found: dict[tuple[str, str], Outcome]) -> None:
    faults = [
        f"{command}, {kind}: {end.fault}" for (command, kind), end in found.items() if end.fault
    ]
    assert not faults, "\n".join(faults)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "seeds"
    make_elsewhere(folder)
    return folder


def test_there_are_enough_kinds() -> None:
    assert len(KINDS) >= 30


def test_commands_that_build_no_model(seeds: Path, tmp_path: Path) -> None:
    """Of the pickles, some: test_unpickling.py reads all of them."""
    kinds = [
        kind
        for number, kind in enumerate(SEALED)
        if not kind.startswith("pickle") or number % 6 == 0
    ]
    _require_good(
        _table(seeds, tmp_path / "work", QUICK, [*kinds, *DATA, *RECORDS, *UNSEALED, *UNREAD])
    )


def test_training_reads_as_carefully(seeds: Path, tmp_path: Path) -> None:
    kinds = (
        "pickle: reduce os.system",
        "archives in place of tensors",
        "FIFO in place of .metadata",
    )
    _require_good(_table(seeds, tmp_path / "work", ("resume",), kinds))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_kind_with_every_command(seeds: Path, tmp_path: Path) -> None:
    found = _table(seeds, tmp_path / "work", list(COMMANDS), list(KINDS))
    width = max(map(len, KINDS))
    print("\n" + " " * width, *COMMANDS, sep="  ")
    for kind in KINDS:
        ends = ["FAULT" if found[c, kind].fault else str(found[c, kind].code) for c in COMMANDS]
        cells = [end.rjust(len(command)) for end, command in zip(ends, COMMANDS, strict=True)]
        print(kind.ljust(width), *cells, sep="  ")
    refused = sum(end.code == 2 for end in found.values())
    print(
        f"{len(KINDS)} kinds, {len(found)} uses: {refused} refused, {len(found) - refused} not read"
    )
    _require_good(found)


def test_a_recipe_of_aliases_is_refused(tmp_path: Path) -> None:
    """Aliases of aliases, aliases inside themselves, and merges of merges."""
    names = "abcdefghijklmnopqrstuvwxyz"
    pairs = list(pairwise(names))
    lists = "model:\n a: &a [x, x]\n" + "".join(f" {b}: &{b} [*{a}, *{a}]\n" for a, b in pairs)
    merges = "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: [*{a}, *{a}]}}\n" for a, b in pairs)
    words = "aliases stand for more", "unknown section", "inside of what it stands for"
    texts = lists, merges, "model: &m\n  num_layers: [*m]\n"
    for text, expected in zip(texts, words, strict=True):
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        [end] = in_child([partial(run, ("train", "--config", str(file), "--dry-run"))])
        assert (end.fault, end.code) == (None, 2)
        assert expected in end.message
