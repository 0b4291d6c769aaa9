"""Every cross-check on a whole configuration, answered before anything heavy starts.

megatron-core enforces many of these rules late, by assert, or not at all.
"""

from moetron.moe.config.rules import (
    attention,
    data,
    experts,
    inputs,
    layout,
    model,
    optimizer,
    pipeline,
    precision,
    routers,
    run,
)
from moetron.moe.config.rules.case import Case
from moetron.moe.config.schema.settings import Settings


def problems(settings: Settings, world_size: int, *, device: str, te: bool) -> list[str]:
    """One line for every broken rule: flags, values, rule, remedy.

    ``device`` is 'cpu' or 'cuda'; ``te`` says whether Transformer Engine is installed. Looks at no
    file: see ``input_problems``.
    """
    case = Case(settings, world_size, device, te)
    subjects = (
        model,
        attention,
        experts,
        routers,
        pipeline,
        layout,
        optimizer,
        precision,
        data,
        run,
    )
    rules = [rule for subject in subjects for rule in subject.RULES]
    return [problem for rule in rules for problem in rule(case)]


def input_problems(settings: Settings) -> list[str]:
    """One line for every input or folder that a real run lacks; a dry run needs none of them."""
    case = Case(settings, world_size=1, device="cpu", te=False)
    return [problem for rule in inputs.RULES for problem in rule(case)]
