"""Parameter counts of encoder-decoder recipes, to the digit."""

from pathlib import Path

import pytest
import torch

from moetron.moe.config import recipe
from moetron.moe.config.bridge import transformer_config
from moetron.moe.config.schema.settings import Settings
from moetron.moe.encoder_decoder.build_stacks import build
from moetron.moe.plan.parameters import count_parameters, per_chunk
from tests.parallel.support.harness import model_parallel

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def read(name: str) -> Settings:
    return Settings.model_validate(recipe.read(EXAMPLES / f"{name}.yaml"))


@pytest.mark.parametrize(
    ("name", "width", "inner", "ffn", "experts", "layers", "printed"),
    [
        ("st_moe_base/pretrain", 768, 768, 2048, 16, 12, None),
        ("st_moe_l/encdec", 1024, 1024, 2816, 32, 24, 4.105e9),
        ("st_moe_32b/encdec", 5120, 8192, 20480, 64, 24, 269.10e9),
    ],
)
def test_st_moe(
    name: str, width: int, inner: int, ffn: int, experts: int, layers: int, printed: float | None
) -> None:
    """Count (Le + 2 Ld) 4 H A, a dense FFN in every layer, experts in every fourth, both ends."""
    count = count_parameters(read(name), 32128)
    sparse = 2 * layers // 4
    attention, ffns = 3 * layers * 4 * width * inner, 2 * layers * 3 * width * ffn
    routed = sparse * experts * (3 * width * ffn + width)
    matrices = attention + ffns + routed + 2 * 32128 * width
    norms = (2 * layers + 3 * layers + sparse + 2) * width
    biases = 2 * 32 * inner // (128 if name.startswith("st_moe_32b") else 64)
    assert count.total == matrices + norms + biases
    assert count.parts["norms"] == norms
    assert count.parts["relative_bias"] == biases
    if printed is not None:
        assert matrices == pytest.approx(printed, rel=1e-4)


@pytest.mark.parametrize("experts", [8, 16, 32, 64, 128, 256])
def test_switch_base_has_the_parameters_of_the_released_models(experts: int) -> None:
    settings = read("switch_base/encdec")
    moe = settings.moe.model_copy(update={"num_experts": experts})
    count = count_parameters(settings.model_copy(update={"moe": moe}), 32128)
    assert count.total == 166_280_448 + 56_632_320 * experts


def test_st_moe_l_is_built_with_these_parameters() -> None:
    """On the meta device; `build` compares every chunk with the plan too."""
    settings = read("st_moe_l/encdec")
    alone = settings.parallel.model_copy(update={"expert_model_parallel_size": 1})
    settings = settings.model_copy(update={"parallel": alone})
    with model_parallel(), torch.device("meta"):
        model = build(settings, transformer_config(settings), 32128)
    parameters = dict(model.named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == 4_105_444_352
    sparse = {name.split(".")[2] for name in parameters if ".experts." in name}
    assert sparse == {str(layer) for layer in range(3, 48, 4)}
    crossing = {int(name.split(".")[2]) for name in parameters if ".cross_attention." in name}
    assert crossing == set(range(24, 48))


def test_stages_add_up() -> None:
    """Except that every stage holds the tables of relative biases."""
    settings = read("st_moe_l/encdec")
    parallel = settings.parallel.model_copy(
        update={"pipeline_model_parallel_size": 3, "expert_model_parallel_size": 1}
    )
    split = settings.model_copy(update={"parallel": parallel})
    held = [per_chunk(split, 32128, stage, 0) for stage in range(3)]
    count = count_parameters(settings, 32128)
    assert sum(each.dense + each.expert for each in held) == count.total + 2 * 2 * 32 * 16
