"""All families, and which of them a model belongs to."""

from moetron.common.errors import UserError
from moetron.moe.config.schema.field import nearest
from moetron.moe.convert.families.config_keys import Values
from moetron.moe.convert.families.decoder_moe import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from moetron.moe.convert.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from moetron.moe.convert.families.dense import LLAMA, OLMO, QWEN2, QWEN3
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
)
FAMILIES = {family.model_type: family for family in _ALL}
"""By HuggingFace's ``model_type``; the first that fits is taken."""


def family_named(model_type: str) -> Family:
    """The family of a ``model_type``.

    Raises:
        UserError: there is none of that name.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type `{model_type}` is not supported{nearest(model_type, FAMILIES)} "
            f"(supported: {', '.join(FAMILIES)})"
        )
    return FAMILIES[model_type]


def family_of(values: Values) -> Family:
    """The family that is exactly a model with these settings (`function_of`).

    Raises:
        UserError: none is; says what keeps the model from the one that it comes closest to.
    """
    problems = {name: family.problems(values) for name, family in FAMILIES.items()}
    sparse = values["moe.num_experts"] is not None
    closest = min(problems, key=lambda n: (FAMILIES[n].experts != sparse, len(problems[n])))
    if problems[closest]:
        listed = "\n".join(f"  - {problem}" for problem in problems[closest])
        raise UserError(
            f"no architecture of HuggingFace's is exactly this; {closest} differs in\n{listed}"
        )
    return FAMILIES[closest]
