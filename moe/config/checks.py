"""Cross-checks of a configuration before a run starts.

megatron-core enforces many of these rules late, by assert, or not at all.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable

from moetron.moe.config import rules
from moetron.moe.config.rules import inputs
from moetron.moe.config.rules.case import Case
from moetron.moe.config.schema.settings import Settings

Rule = Callable[[Case], Iterable[str]]

_NOT_SETTINGS = ("case", "inputs")
"""Modules of ``rules`` without rules on settings alone."""


def _settings_rules() -> tuple[Rule, ...]:
    """Return the RULES of every module of ``rules``, in the order of module names."""
    names = [module.name for module in pkgutil.iter_modules(rules.__path__)]
    subjects = [
        importlib.import_module(f"{rules.__name__}.{name}")
        for name in names
        if name not in _NOT_SETTINGS
    ]
    return tuple(rule for subject in subjects for rule in subject.RULES)


SETTINGS_RULES = _settings_rules()
"""Rules on settings, layout, device and Transformer Engine."""
INPUT_RULES: tuple[Rule, ...] = inputs.RULES
"""Rules on inputs of a real run."""


def problems(settings: Settings, world_size: int, *, device: str, te: bool) -> list[str]:
    """Return one line per broken rule: flags, values, rule, remedy.

    Reads no files; see ``input_problems``.

    Args:
        settings: the settings.
        world_size: number of ranks.
        device: "cpu" or "cuda".
        te: whether Transformer Engine is usable there.
    """
    case = Case(settings, world_size, device, te)
    return [problem for rule in SETTINGS_RULES for problem in rule(case)]


def input_problems(settings: Settings) -> list[str]:
    """Return one line per missing input or folder of a real run; a dry run needs none."""
    case = Case(settings, world_size=1, device="cpu", te=False)
    return [problem for rule in INPUT_RULES for problem in rule(case)]
