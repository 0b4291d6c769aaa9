"""Table of all families and the search for the family of a model."""

from moetron.common.errors import UserError
from moetron.moe.config.schema.field import nearest
from moetron.moe.convert.families.config_keys import Values
from moetron.moe.convert.families.decoder_moe import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from moetron.moe.convert.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from moetron.moe.convert.families.dense import LLAMA, OLMO, QWEN2, QWEN3
from moetron.moe.convert.families.encoder_decoders import SWITCH, T5
from moetron.moe.convert.families.family import Family
from moetron.moe.convert.families.openmoe import OPENMOE

_ALL = (
    OLMOE,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    OPENMOE,
    LLAMA,
    OLMO,
    QWEN2,
    QWEN3,
    T5,
    SWITCH,
)
FAMILIES = {family.model_type: family for family in _ALL}
"""By HuggingFace's ``model_type``; the first match is taken."""


def family_named(model_type: str) -> Family:
    """Return the family of a ``model_type``.

    Raises:
        UserError: the name is unknown.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type `{model_type}` is not supported{nearest(model_type, FAMILIES)} "
            f"(supported: {', '.join(FAMILIES)})"
        )
    return FAMILIES[model_type]


def family_of(values: Values) -> Family:
    """Return the family that matches a model with these settings (`function_of`) exactly.

    Raises:
        UserError: no family matches; lists the differences from the closest.
    """
    problems = {name: family.problems(values) for name, family in FAMILIES.items()}
    sparse = values["moe.num_experts"] is not None
    stacks = values["model.encoder_num_layers"] is not None

    def distance(name: str) -> tuple[bool, bool, int]:
        family = FAMILIES[name]
        return family.has_encoder != stacks, family.experts != sparse, len(problems[name])

    closest = min(problems, key=distance)
    if problems[closest]:
        listed = "\n".join(f"  - {problem}" for problem in problems[closest])
        raise UserError(
            f"no HuggingFace architecture matches exactly; {closest} differs in\n{listed}"
        )
    return FAMILIES[closest]
