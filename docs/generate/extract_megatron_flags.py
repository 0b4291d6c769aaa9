"""Names, types, defaults and choices of Megatron-LM's flags, as docs/generate/megatron_flags.json.

    git clone --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM MEGATRON
    python -m docs.generate.extract_megatron_flags MEGATRON > docs/generate/megatron_flags.json

Builds the parser of ``pretrain_gpt.py`` at that tag beside the installed megatron-core, and lists
its actions. Keeps only facts, no help text.
"""

import argparse
import importlib
import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

TAG = "core_v0.16.1"


def arguments_module(checkout: Path) -> Any:
    """Import ``megatron.training.arguments`` of a checkout without its package's heavy imports."""
    package = types.ModuleType("megatron.training")
    package.__path__ = [str(checkout / "megatron" / "training")]
    for name in ("get_args", "get_timers", "get_adlr_autoresume"):  # what its modules import
        setattr(package, name, None)
    sys.modules["megatron.training"] = package
    sys.path.append(str(checkout))  # megatron.legacy; megatron.core stays the installed one
    return importlib.import_module("megatron.training.arguments")


def default(value: Any) -> Any:
    """Return a default as JSON: enumeration members by name."""
    return getattr(value, "name", value)


def fact(action: argparse.Action, group: str) -> dict[str, Any]:
    """Return the facts about one action."""
    is_switch = action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction)
    turns_off = isinstance(action, argparse._StoreFalseAction)
    kind = "switch" if is_switch else getattr(action.type, "__name__", "text")
    found = {
        "flags": action.option_strings,
        "group": group,
        "type": {"str": "text", "<lambda>": "text"}.get(kind, kind.removesuffix("_handler")),
        "many": action.nargs not in (None, 0, "?"),
        "default": (None if is_switch else default(action.default)),
        "turns_off": turns_off,
        "choices": [str(default(choice)) for choice in action.choices or ()],
    }
    return {
        name: value
        for name, value in found.items()
        if value is not None and value is not False and value != []
    }


def facts(checkout: Path) -> list[dict[str, Any]]:
    """Return all flags in the parser's order."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    arguments_module(checkout).add_megatron_arguments(parser)
    return [
        fact(action, str(group.title))
        for group in parser._action_groups
        for action in group._group_actions
    ]


if __name__ == "__main__":
    lines = [json.dumps(flag, default=str) for flag in facts(Path(sys.argv[1]).resolve())]
    print(f'{{"tag": "{TAG}", "flags": [')
    print(",\n".join(lines))
    print("]}")
