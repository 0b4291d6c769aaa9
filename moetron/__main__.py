"""The command ``moetron``, also ``python -m moetron`` and ``torchrun -m moetron``."""

import sys
from importlib import import_module, metadata

from moetron import __version__
from moetron.common.errors import UserError
from moetron.common.process import run_guarded

COMMANDS = {
    "train": ("pretrain_moe", "pretrain a model; under launch for several ranks"),
    "launch": ("moetron.commands.launch", "start the ranks of a run on this node"),
    "tokenize": ("moetron.commands.train_tokenizer", "train a SentencePiece tokenizer"),
    "prepare": ("moetron.commands.preprocess_corpus", "tokenize raw text into shards"),
    "collect-chats": ("moetron.commands.collect_chats", "make demonstration chats from local docs"),
    "prepare-chats": ("moetron.commands.prepare_chats", "turn chats into shards for fine-tuning"),
    "inspect": ("moetron.commands.inspect_data", "print shards and samples"),
    "plan": ("moetron.commands.plan", "print parameters, memory and cost of a recipe"),
    "convert": ("moetron.commands.convert_checkpoint", "convert to and from HuggingFace; inspect"),
    "upcycle": ("moetron.commands.upcycle", "turn a dense checkpoint into a mixture of experts"),
    "generate": ("moetron.commands.generate", "continue prompts"),
    "evaluate": ("moetron.commands.evaluate", "run tasks of lm-evaluation-harness"),
    "analyze": ("moetron.commands.analyze_routing", "analyze how experts are used"),
    "report": ("moetron.commands.report", "write the report page of a run"),
    "ablate": ("moetron.commands.ablate", "compare variants of a recipe over seeds"),
    "parity": ("moetron.commands.check_parity", "compare parallel layouts with one rank"),
    "collect": ("moetron.commands.collect_corpus", "collect a corpus from texts on this machine"),
    "baseline": ("moetron.commands.ngram_baseline", "compute unigram and bigram losses of shards"),
    "export-tokenizer": ("moetron.commands.export_tokenizer", "write a transformers tokenizer"),
    "doctor": ("moetron.commands.doctor", "check what this machine can run"),
}
"""Name -> (module with ``main()``, description)."""


def usage() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    head = f"Moetron {__version__}: pretraining of Mixture-of-Experts language models"
    tail = "moetron COMMAND --help describes a command."
    return "\n".join([head, "", "usage: moetron COMMAND ...", "", *lines, "", tail])


def dispatch() -> int:
    """Run the command that ``sys.argv`` names; return its exit code."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"moetron {__version__}, megatron-core {metadata.version('megatron-core')}")
        return 0
    if words[0] not in COMMANDS:
        raise UserError(f"moetron {words[0]}: no such command\n\n{usage()}")
    sys.argv = [f"moetron {words[0]}", *words[1:]]
    code: int = import_module(COMMANDS[words[0]][0]).main()
    return code


def main() -> int:
    """Run a command; turn errors into exit codes."""
    return run_guarded(dispatch)


if __name__ == "__main__":  # megatron-core's checkpoint writer spawns processes
    sys.exit(main())
