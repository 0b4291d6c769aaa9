"""Named layouts: parsing, names, ranks, flags."""

from pathlib import Path

import pytest

from moetron.common.errors import UserError
from moetron.moe.config.command import load
from moetron.moe.plan.named_layouts import Layout, layouts_of, parse

TINY = str(Path(__file__).parents[3] / "examples" / "olmoe_1b_7b" / "tiny.yaml")


@pytest.mark.parametrize(
    ("name", "layout", "ranks"),
    [
        ("dp1", Layout(), 1),
        ("tp2", Layout(tp=2), 2),
        ("ep2", Layout(ep=2), 2),
        ("tp2ep2", Layout(tp=2, ep=2), 4),
        ("tp2ep2etp1", Layout(tp=2, ep=2, etp=1), 2),
        ("pp2vpp2", Layout(pp=2, vpp=2), 2),
        ("tp2pp2cp3ep2etp1zero1dp4", Layout(2, 2, 1, 3, 2, 1, 1, 4), 48),
    ],
)
def test_names(name: str, layout: Layout, ranks: int) -> None:
    assert parse(name) == layout
    assert parse(layout.name) == layout
    assert layout.smallest_world_size == ranks


@pytest.mark.parametrize("name", ["", "2tp", "tp", "tp0", "tp2x", "tp2tp4", "zero2", "tp-2"])
def test_invalid_names(name: str) -> None:
    with pytest.raises(UserError, match="--layouts"):
        parse(name)


def test_flags_override_the_layout_of_the_recipe() -> None:
    base = load(["--config", TINY, "--num-layers", "4"]).settings
    recipe = ["--config", TINY, "--num-layers", "4", "--pipeline-model-parallel-size", "4"]
    recipe += ["--overlap-grad-reduce", "--dry-run", "--world-size=4"]
    parallel = load([*recipe, *parse("tp2pp2vpp2ep2etp1zero1").flags(base)]).settings.parallel
    assert parallel.tensor_model_parallel_size == 2
    assert parallel.pipeline_model_parallel_size == 2
    assert parallel.num_layers_per_virtual_pipeline_stage == 1
    assert parallel.expert_model_parallel_size == 2
    assert parallel.expert_tensor_parallel_size == 1
    assert parallel.sequence_parallel and parallel.use_distributed_optimizer
    assert not parallel.overlap_grad_reduce
    assert load([*recipe, *Layout(dp=4).flags(base)]).settings.parallel == base.parallel.model_copy(
        update={"sequence_parallel": False}
    )


def test_layouts_of_two_ranks() -> None:
    names = [layout.name for layout in layouts_of(2)]
    assert len(set(names)) == len(names)
    assert {layout.smallest_world_size for layout in layouts_of(2)} == {2}
    assert {"dp2", "zero1dp2", "ep2dp2", "cp2", "pp2", "pp2vpp2", "tp2", "tp2ep2etp1"} <= {*names}
