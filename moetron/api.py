"""Python API: settings, shards, streams, models, training, generation and routing analyses.

``tests/unit/test_api.py`` freezes the signatures. torch and megatron-core are imported by the
functions that run a model, not by this module. Mistakes of the caller raise `UserError`, whose
message names flags: ``--train-iters`` is the setting ``train_iters``.

A process holds one model at a time: leave the block of `build_model` or `load_run` before the next
`build_model`, `load_run` or `train`.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetron import assembly
from moetron.answers import Writer
from moetron.common.errors import ConfigError, UserError
from moetron.common.recipes import recipe_path
from moetron.common.threads import use_passive_waits
from moetron.data.inspect.even_windows import named_sources
from moetron.data.objectives.prompts import HOLE, Mode, filled, prompt_ids
from moetron.data.shards.shard import Shard
from moetron.moe.checkpoint import run_folder
from moetron.moe.checkpoint.compatibility import tokenizer_fingerprints
from moetron.moe.checkpoint.vocabulary import vocabulary_of
from moetron.moe.config import checks
from moetron.moe.config.command import check, merge, read_recipes
from moetron.moe.config.schema.derived import reads_prefix, smallest_world_size
from moetron.moe.config.schema.settings import Settings, fields
from moetron.moe.config.synonyms import key_answer
from moetron.moe.inference.sampling import Sampling
from moetron.moe.monitoring.library_warnings import quieten_libraries
from moetron.moe.monitoring.sinks import Loads, Row
from moetron.moe.training.sample_stream import SampleStream
from moetron.tokenizers.decoded_text import ends_of
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.run_copy import find_copy, load_run_tokenizer

if TYPE_CHECKING:  # torch: seconds
    from megatron.core.models.gpt import GPTModel

    from moetron.moe.layers.language_model import LanguageModel
    from moetron.moe.training.runtime import Runtime

_BATCH_SIZE = 8
"""Prompts of a forward pass in `generate`."""
__all__ = [
    "Run",
    "UserError",
    "analyze_routing",
    "build_model",
    "generate",
    "load_run",
    "load_settings",
    "open_shard",
    "open_stream",
    "train",
]


@dataclass(frozen=True)
class Run:
    """Checkpoint of a run, open for generation and analyses on one rank."""

    folder: Path
    """Run folder or step folder, as given to `load_run`."""
    settings: Settings
    """Settings of the run, for a single rank."""
    step: int
    """Optimizer steps done."""
    consumed_samples: int
    tokenizer: Tokenizer | None
    """None: a run on mock data without a tokenizer."""
    vocab_size: int
    """Token ids before padding."""
    model: "LanguageModel"
    """In evaluation mode; experts have no capacity, so that no token is dropped. Call
    ``model(ids, positions, None)`` with int64 [batch, sequence] for logits [batch, sequence, padded
    vocabulary]."""
    ranks: "Runtime"
    """Device and process groups of this process."""


def load_settings(
    recipe: str | Path, *, world_size: int | None = None, **overrides: Any
) -> Settings:
    """Read a recipe and check its settings; inputs such as shards are not looked at.

    Args:
        recipe: a YAML file, or a shipped recipe such as ``olmoe_1b_7b`` or ``olmoe_1b_7b/tiny``.
        world_size: ranks that the layout must fit; default: torchrun's, else 1.
        overrides: values by setting name, such as ``train_iters=100``; None unsets an optional one.

    Raises:
        UserError: names all problems at once.
    """
    home = {name: group for group, name, _ in fields()}
    given: dict[str, dict[str, Any]] = {}
    problems = []
    for name, value in overrides.items():
        if name in home:
            plain = os.fspath(value) if isinstance(value, os.PathLike) else value
            given.setdefault(home[name], {})[name] = plain
        else:
            problems.append(f"unknown setting {name}{key_answer(name, home)}")
    try:
        tree = read_recipes([recipe_path(os.fspath(recipe))])
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    ranks = _world_size() if world_size is None else world_size
    settings, found = check(merge(tree, given), ranks, dry_run=True)
    if settings is None or problems or found:
        raise ConfigError([*problems, *found])
    return settings


def open_shard(prefix: str | Path) -> Shard:
    """Open the token shard ``PREFIX.bin`` and ``PREFIX.idx``, memory-mapped.

    ``shard.tokens`` is uint16 or int32 [tokens], ``shard.document_lengths`` int32 [documents] and
    ``shard.document(n)`` [tokens of document n].

    Raises:
        UserError: it is missing, truncated or inconsistent.
    """
    return Shard(prefix)


def open_stream(settings: Settings) -> SampleStream:
    """Open the training samples of a run, without end and in order of use.

    ``stream[n]["tokens"]`` and ``["labels"]`` are int64 [seq_length], ``["loss_mask"]`` is float32
    [seq_length]: 1 where the label counts.

    Raises:
        UserError: a shard cannot be used or the tokenizer is missing.
    """
    _require_inputs(settings)
    tokenizer = assembly.open_tokenizer(settings)
    size = assembly.vocabulary_size(settings, tokenizer)
    return assembly.open_streams(settings, size, tokenizer).training


@contextmanager
def build_model(settings: Settings) -> "Iterator[GPTModel]":
    """Yield the model with freshly drawn weights on one rank; take the rank down afterwards.

    Call it as `Run.model`. Its weights follow ``settings.training.seed``.

    Raises:
        UserError: the layout needs several ranks, or the size of the vocabulary is unknown.
    """
    size = assembly.vocabulary_size(settings, assembly.open_tokenizer(settings))
    with _one_rank(settings) as ranks:
        from moetron.moe.config.bridge import transformer_config
        from moetron.moe.encoder_decoder.build_stacks import build
        from moetron.moe.host.device import uses_transformer_engine

        config = transformer_config(settings, uses_transformer_engine(settings))
        model = build(settings, config, size)
        yield model.to(ranks.device, config.params_dtype)


def train(settings: Settings) -> list[dict[str, Any]]:
    """Train as ``moetron train`` does and return a row of metrics for each step.

    Runs in this process, or as one of torchrun's ranks. A row holds what ``metrics.jsonl`` holds:
    ``step``, ``lm_loss`` (nats a token), ``grad_norm``, ``lr``, ``tokens_per_s`` and more. Ranks
    other than the main one return an empty list. After SIGINT or SIGTERM the run saves and returns
    the rows so far.

    Raises:
        UserError: an input is missing, or the checkpoint to load does not fit.
    """
    _require_inputs(settings)
    _require_no_model()
    use_passive_waits()
    tokenizer = assembly.open_tokenizer(settings)
    rows = _Rows()
    assembly.train(settings, tokenizer, assembly.vocabulary_size(settings, tokenizer), [rows])
    return rows.rows


@contextmanager
def load_run(folder: str | Path) -> Iterator[Run]:
    """Yield a checkpoint of any layout on one rank; take the rank down afterwards.

    Args:
        folder: a run's ``--save`` folder (its latest checkpoint) or one ``step_*`` folder.

    Raises:
        UserError: there is no sound checkpoint, or its tokenizer is missing.
    """
    path = Path(folder)
    record = run_folder.read(path).record
    settings = run_folder.one_rank_settings(record)
    named, tokenizer = settings.data.tokenizer_model, None
    if named is not None or find_copy(path) is not None:
        tokenizer = load_run_tokenizer(path, None, named, tokenizer_fingerprints(record.stream))
    size = vocabulary_of(path, settings, None if tokenizer is None else tokenizer.vocab_size)
    progress = record.progress
    with _one_rank(settings) as ranks:
        from moetron.moe.inference.generation import load_model

        model = load_model(path, settings, size, ranks)
        done = progress.step, progress.consumed_samples
        yield Run(path, settings, *done, tokenizer, size, model, ranks)


def generate(
    run: Run,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    mode: Mode = "causal",
) -> list[str]:
    """Return the text that follows each prompt, up to the end of the document.

    Args:
        run: from `load_run`.
        prompts: texts; in the modes nlu and nlg with holes ``<extra_id_0>``, ``<extra_id_1>``, ...,
            which are returned filled, with the text around them.
        max_new_tokens: tokens for each prompt, at least 1.
        temperature: divides the logits; 0: the most probable token.
        top_k: choose among this many tokens; 0: all.
        top_p: share of probability to choose from, in (0, 1].
        seed: of the draws; each prompt starts from it.
        mode: causal, or UL2's s2s, nlu or nlg.

    Raises:
        UserError: a value is out of range, or the run has no tokenizer.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: must be at least 1")
    from moetron.moe.inference.batch_generation import Request

    tokenizer = _tokenizer(run)
    sampling = Sampling(temperature, top_k, top_p, seed)
    both_ways = reads_prefix(run.settings, run.consumed_samples, mode != "causal")
    requests = [Request(prompt_ids(each, mode, tokenizer), seed, both_ways) for each in prompts]
    ends = ends_of([], tokenizer)
    writer = Writer(run.model, tokenizer, sampling, ends, max_new_tokens, _BATCH_SIZE)
    texts = dict(writer.answers(requests))
    return [
        filled(prompt, texts[number].ids, tokenizer) if HOLE.search(prompt) else texts[number].text
        for number, prompt in enumerate(prompts)
    ]


def analyze_routing(
    run: Run,
    shards: Mapping[str, str | Path],
    *,
    tokens_per_class: int = 16_384,
    seq_length: int | None = None,
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return what ``moetron analyze`` writes to analysis.json about one checkpoint.

    Keys include ``domain_specialization``, ``coactivation`` [layers][experts][experts], ``load``
    [layers][experts] (1.0: the mean) and ``dropped_by_position``; see docs/analysis.md. Experts
    have their capacity of evaluation here, so that drops are seen.

    Args:
        run: from `load_run`; a mixture of experts.
        shards: prefix of a token shard by the name of its domain, language or task.
        tokens_per_class: tokens to look at of each shard.
        seq_length: tokens of a window; None: the run's.
        layers: layers with experts, from 0; None: all.

    Raises:
        UserError: the model is dense, or a shard cannot be used or is of another tokenizer.
    """
    from moetron.commands.analyze_routing import open_text  # matplotlib, torch: seconds
    from moetron.moe.analysis.own_model import OwnModel
    from moetron.moe.analysis.routing_study import study, summary

    length = seq_length or run.settings.model.seq_length
    sources = named_sources([f"{name}={prefix}" for name, prefix in shards.items()], length)
    text = open_text(sources, _tokenizer(run), tokens_per_class, [])
    model = OwnModel(run.folder, run.settings, run.vocab_size, run.ranks, layers)
    return {**summary(model, text), "step": run.step, **study(model, text)[0]}


class _Rows:
    """Sink that keeps the rows of steps."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def step(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(dict(row))

    def validation(self, row: Row) -> None:
        """Ignore an evaluation."""

    def expert_load(self, step: int, loads: Loads) -> None:
        """Ignore the loads; the rows hold their maxima."""

    def event(self, row: Row) -> None:
        """Ignore an event: events.jsonl has it."""

    def rewind(self, step: int) -> None:
        """Drop the rows after a step."""
        self.rows = [row for row in self.rows if row["step"] <= step]

    def close(self) -> None:
        """Do nothing."""


@contextmanager
def _one_rank(settings: Settings) -> "Iterator[Runtime]":
    """Yield the runtime of a single rank, taken down afterwards."""
    needed = smallest_world_size(settings.parallel)
    if needed > 1 or _world_size() > 1:
        ranks = f"the layout needs {needed}" if needed > 1 else "torchrun started several"
        raise UserError(f"one rank holds the model here and {ranks}: set the parallel sizes to 1")
    _require_no_model()
    use_passive_waits()
    quieten_libraries()
    from moetron.moe.training import runtime

    with runtime.running(settings) as ranks_here:
        yield ranks_here


def _require_no_model() -> None:
    """Raise UserError where this process already holds a model."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        raise UserError("a model is open in this process: leave its `with` block first")


def _require_inputs(settings: Settings) -> None:
    """Raise ConfigError with every input that is missing."""
    if problems := checks.input_problems(settings):
        raise ConfigError(problems)


def _tokenizer(run: Run) -> Tokenizer:
    """Return the tokenizer of a run; UserError where it has none."""
    if run.tokenizer is None:
        raise UserError(f"{run.folder}: the run names no tokenizer (mock data?)")
    return run.tokenizer


def _world_size() -> int:
    """Return torchrun's number of ranks, else 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))
