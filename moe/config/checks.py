"""Every cross-check on a whole configuration, answered before anything heavy starts.

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

_ASIDE = ("case", "inputs")
"""Modules of ``rules`` that hold no rule on settings alone."""


def _settings_rules() -> tuple[Rule, ...]:
    """The RULES of every module of ``rules``, in the order of the modules' names."""
    names = [module.name for module in pkgutil.iter_modules(rules.__path__)]
    subjects = [
        importlib.import_module(f"{rules.__name__}.{name}") for name in names if name not in _ASIDE
    ]
    return tuple(rule for subject in subjects for rule in subject.RULES)


SETTINGS_RULES = _settings_rules()
"""Rules on settings, layout, device and Transformer Engine."""
INPUT_RULES: tuple[Rule, ...] = inputs.RULES
"""Rules on what a real run needs besides."""


def problems(settings: Settings, world_size: int, *, device: str, te: bool) -> list[str]:
    """One line for every broken rule: flags, values, rule, remedy.

    Looks at no file: see ``input_problems``.

    Args:
        settings: the whole tree.
        world_size: ranks of the job.
        device: "cpu" or "cuda".
        te: whether Transformer Engine can be used there.
    """
    case = Case(settings, world_size, device, te)
    return [problem for rule in SETTINGS_RULES for problem in rule(case)]


def input_problems(settings: Settings) -> list[str]:
    """One line for every input or folder that a real run lacks; a dry run needs none of them."""
    case = Case(settings, world_size=1, device="cpu", te=False)
    return [problem for rule in INPUT_RULES for problem in rule(case)]
