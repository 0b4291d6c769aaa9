"""Every cross-check on a whole configuration, answered before anything heavy starts.

megatron-core enforces many of these rules late, by assert, or not at all.
"""

from pathlib import Path

from moetron.moe.config.rules import experts, layout, model, run
from moetron.moe.config.rules.case import Case
from moetron.moe.config.settings import Settings


def problems(settings: Settings, world_size: int, *, device: str, te: bool) -> list[str]:
    """One line for every broken rule: flags, values, rule, remedy.

    ``device`` is 'cpu' or 'cuda'; ``te`` says whether Transformer Engine is installed. Looks at no
    file: see ``file_problems``.
    """
    case = Case(settings, world_size, device, te)
    rules = (*model.RULES, *experts.RULES, *layout.RULES, *run.RULES)
    return [problem for rule in rules for problem in rule(case)]


def file_problems(settings: Settings) -> list[str]:
    """One line for every path in the settings that is not there or cannot be written."""
    found = []
    for flag, prefixes in (
        ("--data-path", settings.data.data_path),
        ("--valid-data-path", settings.data.valid_data_path),
    ):
        for prefix in (prefixes or []) if len(prefixes or []) == 1 else (prefixes or [])[1::2]:
            absent = [end for end in (".bin", ".idx") if not Path(prefix + end).is_file()]
            if absent:
                found.append(f"{flag} {prefix}: no file {prefix}{absent[0]}")
    tokenizer = settings.data.tokenizer_model
    if tokenizer is not None and tokenizer != "bytes" and not Path(tokenizer).exists():
        found.append(f"--tokenizer-model {tokenizer}: no such file")
    load = settings.checkpoint.load
    if load is not None and not Path(load).is_dir():
        found.append(f"--load {load}: no such folder")
    save = settings.checkpoint.save
    if save is not None and Path(save).exists() and not Path(save).is_dir():
        found.append(f"--save {save}: is a file, not a folder")
    return found
