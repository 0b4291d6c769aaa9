"""Run tasks of lm-evaluation-harness on a checkpoint, on one rank; needs moetron[eval].

    python tools/evaluate.py --load RUN --tasks closing_brackets --include-path examples/evaluation
    python tools/evaluate.py --load RUN --tasks arc_easy,hellaswag --output results.json

RUN is a run folder (its latest checkpoint) or one step_* folder, written in any layout. Tasks are
the harness's own, if their data are available, and those of --include-path. Experts have no
capacity limit: no token is dropped. After --bidirectional-prefix, attention over the context is
bidirectional if the objective at the checkpoint was prefix_lm or ul2. Exit codes: 0 done, 2 user
error, 1 internal error.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from moetron.common import threads
from moetron.common.errors import UserError
from moetron.common.files import write_text
from moetron.common.packages import installed_version
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.compatibility import tokenizer_fingerprints
from moetron.moe.checkpoint.vocabulary import vocabulary_of
from moetron.moe.config.schema.derived import reads_prefix
from moetron.moe.config.schema.paths import ToolParser
from moetron.moe.monitoring.library_warnings import quieten_libraries
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.run_copy import load_run_tokenizer


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="RUN", help="a run or a step_* folder")
    add("--tasks", required=True, help="comma-separated names")
    add("--include-path", type=Path, help="folder with your own task files")
    add("--num-fewshot", type=int, help="examples before each question (default: the task's)")
    add("--limit", type=int, help="questions per task (default: all)")
    add("--batch-size", type=int, default=8, help="sequences per batch (default: 8)")
    add("--output", type=Path, metavar="FILE", help="write the results as JSON")
    add("--tokenizer-model", metavar="PATH", help="tokenizer (default: the copy in the run folder)")
    return threads.add_option(parser)


def require_harness() -> None:
    """Refuse to start without the harness."""
    if installed_version("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed: pip install moetron[eval]")


def run(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Return the results of the harness."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if arguments.include_path is not None and not arguments.include_path.is_dir():
        raise UserError(f"--include-path {arguments.include_path}: no such folder")
    manager = TaskManager(include_path=arguments.include_path)
    names = arguments.tasks.split(",")
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise UserError(f"--tasks {','.join(unknown)}: unknown; --include-path adds your own")
    results: dict[str, Any] = simple_evaluate(
        model,
        tasks=names,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        task_manager=manager,
        log_samples=False,
    )
    return results


def open_tokenizer(arguments: argparse.Namespace, record: checkpoint_folder.Record) -> Tokenizer:
    """Return the tokenizer of the run."""
    given, saved = arguments.tokenizer_model, record.settings["data"]["tokenizer_model"]
    known = tokenizer_fingerprints(record.stream)
    return load_run_tokenizer(arguments.load, given, saved, known)


def main() -> int:
    """Evaluate the tasks that the command line names; return the exit code."""
    arguments = parser().parse_args()
    require_harness()
    quieten_libraries()
    record = checkpoint_folder.read(arguments.load).record
    settings = checkpoint_folder.one_rank_settings(record, arguments.cpu_threads)
    tokenizer = open_tokenizer(arguments, record)
    if arguments.output is not None:
        checkpoint_folder.make_run_folder(arguments.output.parent, "--output")
    from lm_eval.utils import make_table

    from moetron.moe.analysis.lm_eval_model import HarnessModel
    from moetron.moe.inference import generation as generate
    from moetron.moe.training import runtime

    vocab_size = vocabulary_of(arguments.load, settings, tokenizer.vocab_size)
    both_ways = reads_prefix(settings, record.progress.consumed_samples, has_mode=False)
    generate.refuse_encoder(arguments.load, settings)
    with runtime.running(settings) as ranks:
        model = generate.load_model(arguments.load, settings, vocab_size, ranks)
        harness = HarnessModel(model, tokenizer, arguments.batch_size, both_ways)
        results = run(arguments, harness)
    print(make_table(results))
    if arguments.output is not None:
        kept = {name: results[name] for name in ("results", "versions", "n-shot", "n-samples")}
        write_text(arguments.output, json.dumps(kept, indent=2, default=str) + "\n")
    return 0
