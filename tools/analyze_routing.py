#!/usr/bin/env python
"""Watch how a model routes: saturation, co-activation, specialisation, drops, similarity.

    python tools/analyze_routing.py RUN [--data NAME=PREFIX ...] [--checkpoints latest]
    python tools/analyze_routing.py HF_FOLDER --data code=PREFIX prose=PREFIX

RUN is a run's --save folder: its latest checkpoint is analysed on equal parts of each class of
text, and the earlier checkpoints are compared with it. HF_FOLDER is a HuggingFace MoE model. PREFIX
is a token shard, NAME its domain, language or task. Writes analysis.json and a picture for each
analysis. Exit codes: 0 done, 2 something for the user to change, 1 our fault.
"""

import argparse
import sys
from pathlib import Path

from moetron.data.blend import open_blend
from moetron.data.errors import DataError
from moetron.data.shard import Shard
from moetron.data.windows import spread_windows
from moetron.moe.analysis import figures, study
from moetron.moe.analysis.routed import Windows
from moetron.moe.config.errors import UserError
from moetron.moe.training import checkpoint_folder
from moetron.moe.training.quiet import quieten_libraries
from moetron.tokenizers.interface import TokenizerError
from moetron.tokenizers.load import load_tokenizer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, metavar="RUN|HF_FOLDER", help="a run's folder or a HuggingFace model")
    add("--data", nargs="+", metavar="NAME=PREFIX", help="default: the run's validation shards")
    add("--checkpoints", choices=("all", "latest"), default="all", help="to compare (default: all)")
    add("--tokens-per-class", type=int, default=16_384, help="default: 16384")
    add("--seq-length", type=int, help="tokens of a window; default: the run's, else 1024")
    add("--layers", type=int, nargs="+", help="to watch, from 0; default: all with experts")
    add("--adjacent-pairs", action="store_true", help="count co-activation as OLMoE's script did")
    add("--tokenizer-model", metavar="PATH", help="default: the run's, or the folder's")
    add("--output", type=Path, metavar="DIR", help="default: RUN/analysis")
    return parser


def shards(named: list[str] | None, validation: list[str] | None) -> dict[str, Shard]:
    """The text of each class."""
    if named is None and validation is None:
        raise UserError("no validation shards in this run: give --data NAME=PREFIX ...")
    if named is None:
        return {source.name: source.shard for source in open_blend(validation or [], 1).sources}
    wrong = [item for item in named if "=" not in item]
    if wrong:
        raise UserError(f"--data {' '.join(wrong)}: write NAME=PREFIX, such as code=data/code")
    return {name: Shard(prefix) for name, _, prefix in (item.partition("=") for item in named)}


def text_of(arguments: argparse.Namespace, run: checkpoint_folder.Record | None) -> study.Text:
    """Windows of every class, and the tokenizer that shows their ids."""
    data = {} if run is None else run.settings["data"]
    length = arguments.seq_length or (run.settings["model"]["seq_length"] if run else 1024)
    parts, fingerprints = [], set()
    for name, shard in shards(arguments.data, data.get("valid_data_path")).items():
        rows = spread_windows(shard, length, arguments.tokens_per_class)
        parts.append(Windows(name, rows[:, :-1], rows[:, 1:]))
        fingerprints |= {shard.manifest.tokenizer.fingerprint} if shard.manifest else set()
    tokenizer = load_tokenizer(
        arguments.tokenizer_model or data.get("tokenizer_model") or arguments.model
    )
    if fingerprints - {tokenizer.fingerprint}:
        raise UserError("--data: the shards were made with another tokenizer than the model's")
    return study.Text(parts, tokenizer.vocab_size, lambda token: tokenizer.decode([token]))


def watch_folder(arguments: argparse.Namespace) -> study.Result:
    """The analyses of a HuggingFace folder."""
    from moetron.moe.analysis.huggingface import HuggingFaceModel

    text, model = text_of(arguments, None), HuggingFaceModel(arguments.model, arguments.layers)
    return study.summary(model, text) | study.study(model, text, arguments.adjacent_pairs)[0]


def watch_run(arguments: argparse.Namespace) -> study.Result:
    """The analyses of a run's latest checkpoint, and how the earlier ones differ from it."""
    from moetron.moe.analysis.own_model import OwnModel
    from moetron.moe.training import runtime

    record = checkpoint_folder.read(arguments.model).record
    settings, text = checkpoint_folder.one_rank_settings(record), text_of(arguments, record)
    vocab_size = settings.model.vocab_size or text.vocab_size
    with runtime.running(settings) as ranks:
        model = OwnModel(arguments.model, settings, vocab_size, ranks, arguments.layers)
        result = study.summary(model, text) | {"step": record.progress.step}
        found, choices = study.study(model, text, arguments.adjacent_pairs)
        if arguments.checkpoints == "all":
            steps = model.each_checkpoint(arguments.model, record.progress.step)
            found["checkpoints"] = study.compare(model, text, choices, steps)
    return result | found


def main() -> int:
    """Analyse what the command line names; the exit code."""
    arguments = parser().parse_args()
    quieten_libraries()
    folder = (arguments.model / "config.json").is_file()
    try:
        result = watch_folder(arguments) if folder else watch_run(arguments)
    except (DataError, TokenizerError) as error:
        raise UserError(str(error)) from error
    output = arguments.output or arguments.model / "analysis"
    for path in figures.write(result, output):
        print(path)
    return 0


if __name__ == "__main__":
    from moetron.moe.training.resilience import run_guarded

    sys.exit(run_guarded(main))
