"""What is mutated, and the commands that then read it."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moetron.assembly import open_tokenizer, vocabulary_size
from moetron.common.errors import ConfigError
from moetron.common.run_owner import claim
from moetron.moe.checkpoint.checksums import SUMS, write_sums
from moetron.moe.config.command import check, read_recipes
from moetron.moe.plan.render import render
from moetron.tokenizers.load import load_tokenizer
from tests.fuzz import mutations
from tests.fuzz.cases import Outcome, run
from tests.fuzz.seeds import EXPERTS, PREPARE, RECIPE, TINY

ROOT = Path(__file__).resolve().parents[2]
STEP = "run/step_0000002"
Change = Callable[[bytes, random.Random], bytes]
Words = tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """A file, how to mutate it, and the commands of which one then reads it."""

    file: str
    change: Change
    commands: tuple[Words, ...]
    copied: tuple[str, ...]
    """Files and folders of the seeds that a command needs."""
    share: int = 1
    """How often it is drawn, relative to the others."""


INSPECT: Words = ("convert", "inspect", "--load", "run", "--verify")
TO_HF: Words = ("convert", "to-hf", "--load", "run", "--output", "out")
GENERATE: Words = (
    "generate",
    "--load",
    "run",
    "--tokenizer-model",
    "bytes",
    "--prompt",
    "a",
    "--max-new-tokens",
    "2",
)
RESUME: Words = (
    "train",
    "--config",
    RECIPE,
    *TINY,
    *EXPERTS,
    "--load",
    "run",
)
FINETUNE: Words = (*RESUME, "--finetune")
ANALYZE: Words = (
    "analyze",
    "run",
    "--data",
    "x=a",
    "--tokens-per-class",
    "64",
    "--tokenizer-model",
    "bytes",
    "--output",
    "out",
)
UPCYCLE: Words = (
    "upcycle",
    "--load",
    "dense",
    "--output",
    "out",
    "--num-experts",
    "4",
    "--moe-router-topk",
    "2",
)
FROM_HF: Words = ("convert", "from-hf", "--load", "hf", "--output", "out")
PAGE: Words = ("report", "run", "--output", "page.html")
CURVES: Words = ("report", "run", "--output", "curves.svg")
SHARD: Words = ("inspect", "a", "--tokenizer", "bytes", "--verify", "--seq-length", "16")
BASELINE: Words = (
    "baseline",
    "--train-data-path",
    "a",
    "--valid-data-path",
    "a",
    "--seq-length",
    "16",
)
TRAIN: Words = (
    "train",
    "--config",
    RECIPE,
    *TINY,
    *EXPERTS,
    "--check",
)
CONTINUE: Words = (*PREPARE, "--output-prefix", "half/b")
OWNER: Words = ("owner",)
TOKENIZER: Words = ("tokenizer",)


def _target(
    file: str, change: Change, *commands: Words, share: int = 1, copied: str = ""
) -> Target:
    return Target(file, change, commands, tuple(copied.split()) or (file.split("/")[0],), share)


TARGETS = (
    _target("a.bin", mutations.of_bytes, SHARD, BASELINE, copied="a.bin a.idx a.json"),
    _target(
        "a.idx", mutations.of_bytes, SHARD, BASELINE, TRAIN, copied="a.bin a.idx a.json", share=3
    ),
    _target(
        "a.json", mutations.of_json, SHARD, BASELINE, TRAIN, copied="a.bin a.idx a.json", share=3
    ),
    _target("half/b.progress.json", mutations.of_json, CONTINUE, copied="half text.jsonl", share=3),
    _target("half/b.lengths.tmp", mutations.of_bytes, CONTINUE, copied="half text.jsonl"),
    _target("half/b.bin.tmp", mutations.of_bytes, CONTINUE, copied="half text.jsonl"),
    _target(f"{STEP}/.metadata", mutations.of_bytes, INSPECT, TO_HF, share=5),
    _target(f"{STEP}/run.json", mutations.of_json, INSPECT, INSPECT, TO_HF, PAGE, share=5),
    _target(f"{STEP}/settings.yaml", mutations.of_yaml, INSPECT),
    _target(f"{STEP}/metadata.json", mutations.of_json, INSPECT),
    _target(f"{STEP}/common.pt", mutations.of_bytes, INSPECT),
    _target(f"{STEP}/__0_0.distcp", mutations.of_bytes, TO_HF, share=2),
    _target(f"{STEP}/{SUMS}", mutations.of_text, INSPECT),
    _target("run/latest", mutations.of_text, INSPECT),
    _target("run/owner.json", mutations.of_json, OWNER, share=2),
    _target("run/metrics.jsonl", mutations.of_json_lines, PAGE, CURVES, CURVES, CURVES, share=3),
    _target("run/validation.jsonl", mutations.of_json_lines, PAGE, CURVES, CURVES, CURVES, share=2),
    _target("run/starts.jsonl", mutations.of_json_lines, PAGE),
    _target("run/analysis/analysis.json", mutations.of_json, PAGE, share=2),
    _target("bpe/tokenizer.json", mutations.of_json, TOKENIZER, share=3),
    _target("bpe/tokenizer_config.json", mutations.of_json, TOKENIZER),
    _target("spm/umt5.model", mutations.of_bytes, TOKENIZER, share=3),
    _target("hf/config.json", mutations.of_json, FROM_HF, share=4),
    _target("hf/model.safetensors", mutations.of_bytes, FROM_HF, share=2),
    _target("hf/tokenizer.json", mutations.of_json, FROM_HF),
)
"""Files; a command of some seconds stands beside quick ones."""
SLOW = (GENERATE, RESUME, FINETUNE, ANALYZE)
"""Commands that build a model, for checkpoints: only with ``--thorough``."""


def reseal(step: Path, sizes: bool = True) -> None:
    """Write sizes, unless told not to, and sums of a step folder again, as an attacker does."""
    record = step / "run.json"
    try:
        if not sizes:
            raise ValueError
        tree = json.loads(record.read_text(encoding="utf-8"))
        tree["files"] = {
            path.name: path.stat().st_size
            for path in sorted(step.iterdir())
            if path.is_file() and path.name not in ("run.json", SUMS)
        }
        record.write_text(json.dumps(tree), encoding="utf-8")
    except (ValueError, TypeError, RecursionError):
        pass
    write_sums(step, {})


def copy(seeds: Path, names: Sequence[str], work: Path) -> None:
    """Make ``work`` hold copies of these files and folders, with their times, and nothing else."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name in names:
        place = seeds / name
        (shutil.copytree if place.is_dir() else shutil.copy2)(place, work / name)
    os.chdir(work)


def execute(words: Words) -> Outcome:
    """Run one of the commands in the current folder."""
    if words == OWNER:
        return run(words, _claim)
    if words == TOKENIZER:
        return run(words, _encode)
    return run(words)


def _claim() -> int:
    claim(Path("run")).release()
    return 0


def _encode() -> int:
    source = next(name for name in ("bpe", "spm/umt5.model") if Path(name).exists())
    tokenizer = load_tokenizer(source)
    tokenizer.decode(tokenizer.encode("the quick <b>fox</b> \u00e9\u2581 </s>"))
    tokenizer.encode_flat(["one", "", "two"])
    return 0


def file_cases(
    seeds: Path, work: Path, seed: int, count: int, thorough: bool = False
) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """Yield the name of each case and the function that mutates and reads.

    Args:
        seeds: see seeds.py.
        work: a folder of this campaign's own.
        seed: case n of a seed is always the same.
        count: cases.
        thorough: also read checkpoints with the commands that build models.
    """
    for words in dict.fromkeys(words for target in TARGETS for words in target.commands):
        target = next(target for target in TARGETS if words in target.commands)

        def unchanged(target: Target = target, words: Words = words) -> Outcome:
            copy(seeds, target.copied, work)
            outcome = execute(words)  # imports what the command needs: its time is no measure
            fault = outcome.message or outcome.fault if outcome.code else None
            return replace(outcome, fault=fault, seconds=0.0)

        yield f"{seed} unchanged: {' '.join(words[:2])}", unchanged
    for number in range(count):
        rng = random.Random(f"file {seed} {number}")
        target = rng.choices(TARGETS, [target.share for target in TARGETS])[0]
        words = rng.choice(
            target.commands + (SLOW if thorough and target.file.startswith(STEP) else ())
        )

        def case(
            rng: random.Random = rng, target: Target = target, words: Words = words
        ) -> Outcome:
            needed = ("a.bin", "a.idx", "a.json") if words in SLOW else ()
            copy(seeds, (*target.copied, *needed), work)
            path = work / target.file
            path.write_bytes(target.change(path.read_bytes(), rng))
            if (
                target.file.startswith(STEP)
                and not target.file.endswith(SUMS)
                and rng.random() < 0.8
            ):
                reseal(work / STEP)
            return execute(words)

        yield f"{seed} file {number}: {target.file}, {words[0]}", case


def recipe_cases(work: Path, seed: int, count: int) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """Yield the name of each case and the function that mutates a recipe and plans its run.

    Every 20th case parses a whole command line, which takes as long as all the rest of a case.
    """
    recipes = sorted((ROOT / "examples").glob("*/*.yaml"))
    recipes = [path for path in recipes if path.parent.name != "evaluation"]
    for number in range(count):
        rng = random.Random(f"recipe {seed} {number}")
        recipe = rng.choice(recipes)

        def case(
            rng: random.Random = rng, recipe: Path = recipe, whole: bool = number % 20 == 0
        ) -> Outcome:
            file = work / "recipe.yaml"
            file.write_bytes(mutations.of_yaml(recipe.read_bytes(), rng))
            world = rng.choice((1, 8, 64))
            words = ("train", "--config", str(file), "--dry-run", "--world-size", str(world))
            return run(words, None if whole else partial(_plan, file, world))

        yield f"{seed} recipe {number}: {recipe.relative_to(ROOT / 'examples')}", case


def _plan(file: Path, world_size: int) -> int:
    """Do what ``train --dry-run`` does after it has parsed flags."""
    settings, problems = check(read_recipes([file]), world_size, dry_run=True)
    if problems or settings is None:
        raise ConfigError(problems)
    vocab_size = vocabulary_size(settings, open_tokenizer(settings))
    print(render(settings, vocab_size, world_size, rank=0))
    return 0
