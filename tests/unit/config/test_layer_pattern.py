"""Megatron's layer expressions have Python's values, and nothing else is evaluated."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetron.moe.config.flags import parse
from moetron.moe.config.schema.experts import layer_pattern
from moetron.moe.config.validate import validate

REQUIRED = {
    "model": {"num_layers": 26, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 8},
    "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
    "learning_rate": {"lr": 1e-3},
}

lists = st.lists(st.integers(0, 1), min_size=1, max_size=3).map(str)
expressions = st.recursive(
    lists,
    lambda inner: st.one_of(
        st.builds("({}+{})".format, inner, inner),
        st.builds("{}*{}".format, inner, st.integers(0, 3)),
        st.builds("({}*{})".format, st.integers(0, 3), inner),
    ),
    max_leaves=5,
)


@given(expressions)
def test_values_are_those_of_python(text: str) -> None:
    assert layer_pattern(text) == eval(text)  # noqa: S307 (made of the grammar above)


@pytest.mark.parametrize(
    "text", ["", "3", "[0", "[[1]]", "[1]-[0]", "[x]", "[1]*[1]", "f([1])", "[True]", "[1]*2**9"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an expression"):
        layer_pattern(text)


def test_an_excessive_length_is_refused_before_allocation() -> None:
    with pytest.raises(ValueError, match="more than 10,000 layers"):
        layer_pattern("[1]*10000000000000")


def test_as_a_flag() -> None:
    given = parse(["--moe-layer-freq", "([0]*3+[1]*23)*1"]).settings
    settings, problems, _ = validate({**REQUIRED, **given})
    assert not problems and settings is not None
    assert settings.moe.moe_layer_freq == [0] * 3 + [1] * 23
    _, problems, _ = validate({**REQUIRED, **parse(["--moe-layer-freq", "[1]*"]).settings})
    assert problems == [
        "--moe-layer-freq [1]*: must be integer > 0 or list of (integer >= 0, <= 1): "
        "not an expression like ([0]*3+[1]*23)*1"
    ]
