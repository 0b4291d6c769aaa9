"""Analyze routing: saturation, co-activation, specialisation, drops, similarity.

    python tools/analyze_routing.py RUN [--data NAME=PREFIX ...] [--checkpoints latest]
    python tools/analyze_routing.py HF_FOLDER --data code=PREFIX prose=PREFIX

RUN is a --save folder. Its latest checkpoint is analysed on equally many tokens of each class of
text, and earlier checkpoints are compared with it. HF_FOLDER is a HuggingFace MoE model. PREFIX is
a token shard, NAME its domain, language or task. Writes analysis.json and pictures. Exit codes: 0
done, 2 user error, 1 internal error.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetron.common import threads
from moetron.common.errors import UserError
from moetron.common.files import atomic_file
from moetron.data.chat.text_to_text_stream import open_text_to_text
from moetron.data.inspect.even_windows import Sources, named_sources, spread_windows
from moetron.data.stream.open_streams import open_validation
from moetron.moe.analysis import figures, specialization
from moetron.moe.analysis import routing_study as study
from moetron.moe.analysis.routing_trace import Windows
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.config.schema.paths import ToolParser
from moetron.moe.config.schema.settings import Settings
from moetron.moe.monitoring.library_warnings import quieten_libraries
from moetron.moe.training.sample_stream import SampleStream
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer
from moetron.tokenizers.run_copy import load_run_tokenizer


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("model", type=Path, metavar="RUN|HF_FOLDER", help="run folder or HuggingFace model")
    add("--data", nargs="+", metavar="NAME=PREFIX", help="default: the run's validation shards")
    add("--checkpoints", choices=("all", "latest"), default="all", help="(default: all)")
    add("--tokens-per-class", dest="tokens", type=int, default=16_384, help="(default: 16384)")
    add("--seq-length", type=int, help="window length (default: the run's, else 1024)")
    add("--token-class", type=str, nargs="+", default=[], metavar="NAME=REGEX", help="of tokens")
    add("--layers", type=int, nargs="+", help="layers, from 0 (default: all MoE layers)")
    add("--adjacent-pairs", action="store_true", help="count co-activation as OLMoE's script does")
    add("--save-choices", action="store_true", help="each token's experts, to DIR/choices.npz")
    add("--tokenizer-model", metavar="PATH", help="(default: the model's)")
    add("--output", type=Path, metavar="DIR", help="(default: RUN/analysis)")
    return threads.add_option(parser)


def require_one(tokenizer: Tokenizer, sources: Sources) -> None:
    """Raise ``UserError`` for shards of a tokenizer other than the model's."""
    for name, source in sources.items():
        for manifest in filter(None, (shard.manifest for shard in source.shards)):
            if manifest.tokenizer.fingerprint != tokenizer.fingerprint:
                raise UserError(f"{name}, {source.prefix}: not of the model's tokenizer")


def open_text(
    sources: Sources, tokenizer: Tokenizer, tokens: int, token_class: Sequence[str]
) -> study.Text:
    """Return about ``tokens`` tokens of every class in windows, and how to show token ids.

    A model may have ids that no piece of the tokenizer uses. ``token_class``: NAME=REGEX.
    """
    require_one(tokenizer, sources)
    rows = [(n.removesuffix(".valid"), spread_windows(s, tokens)) for n, s in sources.items()]
    return study.Text(
        [Windows(name, row[:, :-1], row[:, 1:]) for name, row in rows],
        lambda id: tokenizer.decode([id]) if id < tokenizer.vocab_size else f"<{id}>",
        specialization.token_classes(token_class) or study.TOKEN_CLASSES,
    )


def analyze_folder(given: argparse.Namespace) -> study.Result:
    """Return the analyses of a HuggingFace folder."""
    from moetron.moe.analysis.hf_model import HuggingFaceModel

    sources = named_sources(given.data or [], given.seq_length or 1024)
    tokenizer = load_tokenizer(given.tokenizer_model or given.model)
    text = open_text(sources, tokenizer, given.tokens, given.token_class)
    threads.use_threads(given.cpu_threads)
    model = HuggingFaceModel(given.model, given.layers)
    found, choices = study.study(model, text, given.adjacent_pairs)
    if given.save_choices:
        save_choices(given, study.token_choices(model, text, choices))
    return study.summary(model, text) | found


def analyze_run(given: argparse.Namespace) -> study.Result:
    """Return the analyses of the latest checkpoint and its comparison with earlier ones."""
    from moetron.moe.analysis.own_model import OwnModel
    from moetron.moe.checkpoint.compatibility import tokenizer_fingerprints
    from moetron.moe.checkpoint.vocabulary import vocabulary_of
    from moetron.moe.training import runtime

    record = checkpoint_folder.read(given.model).record
    settings = checkpoint_folder.one_rank_settings(record, given.cpu_threads)
    if settings.model.encoder_num_layers is not None:
        return analyze_stacks(given, record, settings)
    held_out = settings.data.rooted(settings.data.valid_data_path or [])
    length = given.seq_length or settings.model.seq_length
    sources = named_sources(given.data or held_out, length)
    names = given.tokenizer_model, settings.data.tokenizer_model
    tokenizer = load_run_tokenizer(given.model, *names, tokenizer_fingerprints(record.stream))
    text = open_text(sources, tokenizer, given.tokens, given.token_class)
    vocab_size = vocabulary_of(given.model, settings, tokenizer.vocab_size)
    with runtime.running(settings) as ranks:
        model = OwnModel(given.model, settings, vocab_size, ranks, given.layers)
        found, choices = study.study(model, text, given.adjacent_pairs)
        if given.save_choices:
            save_choices(given, study.token_choices(model, text, choices))
        if given.checkpoints == "all":
            steps = model.each_checkpoint(given.model, record.progress.step)
            found["checkpoints"] = study.compare(model, text, choices, steps)
    return study.summary(model, text) | {"step": record.progress.step} | found


def output_folder(given: argparse.Namespace) -> Path:
    """Return the folder of the results."""
    return given.output or given.model / "analysis"


def require_place(given: argparse.Namespace) -> None:
    """Raise UserError, before the work, if the results cannot be written, as in another's run."""
    folder = output_folder(given)
    if given.output is not None or folder.exists():
        checkpoint_folder.make_run_folder(folder, "--output")
    elif given.model.is_dir() and not os.access(given.model, os.W_OK | os.X_OK):
        raise UserError(f"{given.model}: cannot write there; give another folder with --output")


def save_choices(given: argparse.Namespace, arrays: Mapping[str, Any]) -> None:
    """Write every token's choices beside the results."""
    folder = output_folder(given)
    checkpoint_folder.make_run_folder(folder, "--output")
    with atomic_file(folder / "choices.npz") as file:
        np.savez_compressed(file, **arrays)


def open_held_out(settings: Settings, tokenizer: Tokenizer) -> SampleStream:
    """Return an encoder-decoder's validation samples, in the form of its training samples."""
    data, chosen = settings.data, settings.adaptation
    length, encoder = settings.model.seq_length, data.encoder_seq_length
    assert data.valid_data_path is not None and encoder is not None
    if not chosen.sft:
        return open_validation(data, data.valid_data_path, length, tokenizer)
    parts, known = (encoder, length - encoder), tokenizer.fingerprint
    prefixes = data.rooted(data.valid_data_path)
    return open_text_to_text(prefixes, parts, known, tokenizer.pad, None, chosen.sft_packing)


def analyze_stacks(
    given: argparse.Namespace, record: checkpoint_folder.Record, settings: Settings
) -> study.Result:
    """Return the analysis of an encoder-decoder's latest checkpoint on held-out samples."""
    from moetron.moe.analysis import stack_study
    from moetron.moe.checkpoint.compatibility import tokenizer_fingerprints
    from moetron.moe.checkpoint.vocabulary import vocabulary_of
    from moetron.moe.inference.generation import load_model
    from moetron.moe.training import batches, runtime

    if given.data or given.seq_length or given.layers or given.save_choices:
        raise UserError(
            "--data, --seq-length, --layers, --save-choices: an encoder-decoder is analysed in all "
            "layers, on the run's own validation samples; leave them out"
        )
    if settings.data.valid_data_path is None:
        raise UserError(f"{given.model}: the run has no --valid-data-path to analyse")
    names = given.tokenizer_model, settings.data.tokenizer_model
    tokenizer = load_run_tokenizer(given.model, *names, tokenizer_fingerprints(record.stream))
    length, stream = settings.model.seq_length, open_held_out(settings, tokenizer)
    vocabulary = stack_study.Vocabulary(
        vocabulary_of(given.model, settings, tokenizer.vocab_size),
        lambda id: tokenizer.decode([id]) if id < tokenizer.vocab_size else f"<{id}>",
        specialization.token_classes(given.token_class) or study.TOKEN_CLASSES,
    )
    # Evenly over all sources, which follow one another.
    count = min(len(stream), max(1, given.tokens * len(stream.source_names) // length))
    places = [n * len(stream) // count for n in range(count)]
    size = settings.training.micro_batch_size
    numbers = [places[first : first + size] for first in range(0, count, size)]
    with runtime.running(settings) as ranks:
        model = load_model(given.model, settings, vocabulary.size, ranks, limited=True)
        found = batches.micro_batches(stream, length, numbers, device=ranks.device)
        result = stack_study.study_stacks(model, settings, found, vocabulary)
    print(stack_study.entropy_table(result))
    return result | {"step": record.progress.step}


def main() -> int:
    """Analyze the model that the command line names; return the exit code."""
    arguments = parser().parse_args()
    quieten_libraries()
    folder = (arguments.model / "config.json").is_file()
    require_place(arguments)
    result = analyze_folder(arguments) if folder else analyze_run(arguments)
    print(*figures.write(result, output_folder(arguments)), sep="\n")
    return 0
