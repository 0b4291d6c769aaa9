"""tiny.yaml has its recipe's blocks at another size; life.yaml has its recipe's stages."""

from pathlib import Path

import pytest

from moetron.moe.config import recipe
from moetron.moe.config.command import load
from moetron.moe.config.schema.derived import smallest_world_size
from moetron.moe.config.schema.parallel import ParallelSettings
from moetron.moe.config.schema.settings import Settings

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
TINY = sorted(EXAMPLES.glob("*/tiny.yaml"))
BLOCK = ("model", "attention", "moe", "optimizer")
COEFFICIENTS = ("moe_aux_loss_coeff", "moe_z_loss_coeff", "output_z_loss_coeff")
"""Auxiliary losses: the first two depend on layers, tiny models do not use the third."""


def settings(*names: str, flags: tuple[str, ...] = ()) -> Settings:
    """Return the merged settings of recipes, as a dry run on the fewest ranks reads them."""
    paths = [EXAMPLES / f"{name}.yaml" for name in names]
    parallel = [recipe.read(path).get("parallel", {}) for path in paths]
    ranks = max(smallest_world_size(ParallelSettings.model_validate(tree)) for tree in parallel)
    argv = [word for path in paths for word in ("--config", str(path))]
    return load([*argv, "--dry-run", f"--world-size={ranks}", "--device=cuda", *flags]).settings


def life(name: str) -> Settings:
    """Return the settings of examples/NAME/life.sh."""
    flags = ("--tokenizer-model", "umt5.model", "--vocab-size", "2048", "--data-root", "/data")
    return settings(f"{name}/tiny", f"{name}/life", flags=flags)


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.parent.name)
def test_only_sizes_differ(path: Path) -> None:
    name = path.parent.name
    tiny, full = (settings(f"{name}/{stage}").model_dump() for stage in ("tiny", "pretrain"))
    differ = {
        field: (value, full[group][field])
        for group in BLOCK
        for field, value in tiny[group].items()
        if value != full[group][field] and field not in COEFFICIENTS
    }
    assert "hidden_size" in differ
    assert all(type(value) is int for pair in differ.values() for value in pair), differ


def test_openmoes_life_has_the_stages_of_its_recipe() -> None:
    """Objectives and the fraction of code match."""

    def shares(run: Settings, code: set[str]) -> list[tuple[str, float]]:
        found = []
        for stage in run.data.planned_stages():
            weights = dict(
                zip(stage.data_path[1::2], map(float, stage.data_path[::2]), strict=True)
            )
            assert sum(weights.values()) == 100
            found.append((stage.objective, sum(weights[name] for name in code)))
        return found

    published = settings("openmoe_8b/pretrain", "openmoe_8b/data")
    expected = shares(published, {"redpajama/github", "the_stack_dedup"})
    assert shares(life("openmoe_8b"), {"code"}) == expected == [("ul2", 52.25), ("causal", 15)]


def test_olmoes_life_anneals_as_its_recipe_does() -> None:
    """The same mixture in a new order; the learning rate goes from a tenth of the peak to zero."""
    for run in (life("olmoe_1b_7b"), settings("olmoe_1b_7b/pretrain", "olmoe_1b_7b/data")):
        main, anneal = run.data.planned_stages()
        assert main.data_path == anneal.data_path and main.seed != anneal.seed == 42
        rate, segment = run.learning_rate, anneal.learning_rate
        assert segment is not None and (segment.lr, segment.min_lr) == (rate.min_lr, 0.0)
        assert rate.min_lr == rate.lr_warmup_init == rate.lr / 10
        assert segment.lr_decay_style == "linear" and rate.lr_decay_style == "cosine"
