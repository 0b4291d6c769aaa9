"""Upcycled mixtures that initially compute the dense model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from moetron.common.errors import UserError
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.config.schema.experts import MoESettings
from moetron.moe.config.schema.settings import Settings
from moetron.moe.config.upcycling import UpcyclingSettings
from moetron.moe.convert.checkpoint_tensors import CheckpointTensors
from moetron.moe.convert.upcycle import (
    DenseModel,
    UpcycledWeights,
    dense_folder,
    dense_run,
    is_huggingface,
    upcycle,
)
from moetron.moe.inference.generation import load_model
from moetron.moe.training.runtime import Runtime
from tests.parallel.support.checkpoint_runs import metrics, run, settings
from tests.parallel.support.harness import model_parallel

PLAIN = {"num_experts": 4, "moe_router_topk": 2}
FINE = {"num_experts": 12, "moe_router_topk": 6, "moe_ffn_hidden_size": 16}
WIDTH = 48
OPTIONS = UpcyclingSettings(router_init_std=0.5)


def dense_settings(steps: int, ffn_type: str = "swiglu", **checkpoint: Any) -> Settings:
    model = {"ffn_hidden_size": WIDTH, "ffn_type": ffn_type, "hidden_dropout": 0.0}
    return settings(
        "dp",
        model=model,
        moe={"num_experts": None, "moe_ffn_hidden_size": None, "moe_aux_loss_coeff": 0.0},
        training={"train_iters": steps},
        checkpoint=checkpoint,
    )


def first_steps(chosen: Settings, moe: dict[str, Any], load: Path, save: Path) -> list[float]:
    """Return the losses of training from the weights at ``load``."""
    checkpoint = {"load": str(load), "save": str(save), "finetune": True}
    tree = chosen.model_dump(mode="json") | {"checkpoint": checkpoint, "moe": moe}
    run(Settings.model_validate(tree))
    return [row["lm_loss"] for row in metrics(save)]


@pytest.mark.parametrize(
    ("ffn_type", "moe"),
    [
        ("swiglu", PLAIN),
        ("swiglu", FINE),
        ("geglu", {**FINE, "moe_router_topk_scaling_factor": 2.5}),
        ("gelu", FINE),
        ("relu", {**FINE, "moe_layer_freq": 2, "moe_layer_position": "last"}),
        ("swiglu", {**FINE, "moe_router_score_function": "sigmoid"}),
    ],
)
def test_the_first_loss_is_the_dense_models(
    tmp_path: Path, ffn_type: str, moe: dict[str, Any]
) -> None:
    dense = dense_settings(4, ffn_type)
    run(dense_settings(4, ffn_type, save=str(tmp_path / "dense")))
    upcycle(dense_run(tmp_path / "dense"), tmp_path / "sparse", MoESettings(**moe), OPTIONS)
    before = first_steps(dense, {}, tmp_path / "dense", tmp_path / "dense_on")
    after = first_steps(dense, moe, tmp_path / "sparse", tmp_path / "sparse_on")
    assert after[0] == pytest.approx(before[0], abs=1e-5)
    assert after[-1] != pytest.approx(
        before[-1], abs=1e-5
    )  # the learning rate of the first step is 0
    trained = CheckpointTensors(checkpoint_folder.find(tmp_path / "sparse_on"))
    experts = trained.read("decoder.layers.1.mlp.experts.experts.linear_fc2.weight")
    assert len({tuple(expert.flatten().tolist()) for expert in experts}) == moe["num_experts"]


class Zeros:
    """Dense layer with an FFN of zeros; counts reads."""

    shapes = {
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": (16,),
        "decoder.layers.0.mlp.linear_fc1.weight": (2 * WIDTH, 16),
        "decoder.layers.0.mlp.linear_fc2.weight": (16, WIDTH),
    }

    def __init__(self) -> None:
        self.reads: list[str] = []

    def names(self) -> list[str]:
        return list(self.shapes)

    def empty(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], device="meta")

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return torch.zeros(self.shapes[name])


def sparse_settings(**moe: Any) -> Settings:
    return dense_settings(1).model_copy(update={"moe": MoESettings(**{**FINE, **moe})})


def test_random_values_depend_only_on_seed_and_name() -> None:
    name = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
    options = UpcyclingSettings(noise_fraction=0.5, noise_std=0.1)
    first, second = (UpcycledWeights(Zeros(), sparse_settings_of_one(), options) for _ in "12")
    router = second.read("decoder.layers.0.mlp.router.weight")
    drawn = first.read(name)
    assert torch.equal(drawn, second.read(name))
    chosen = drawn != 0
    assert chosen.float().mean() == pytest.approx(0.5, abs=0.02)
    assert drawn[chosen].std() == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(drawn[0], drawn[3]), "copies get noise of their own"
    assert router.std() == pytest.approx(0.02, rel=0.4)
    assert torch.equal(router[0], router[2]), "parts of one copy"
    assert not torch.equal(router[2], router[3])
    other = UpcycledWeights(
        Zeros(), sparse_settings_of_one(), options.model_copy(update={"seed": 1})
    )
    assert not torch.equal(drawn, other.read(name))


def sparse_settings_of_one() -> Settings:
    """Return the mixture upcycled from `Zeros`."""
    return sparse_settings(moe_layer_freq=[1, 0])


def test_shapes_need_no_reads() -> None:
    dense = Zeros()
    weights = UpcycledWeights(dense, sparse_settings_of_one(), OPTIONS)
    shapes = {name: tuple(weights.empty(name).shape) for name in weights.names()}
    layer = "decoder.layers.0."
    assert shapes == {
        f"{layer}pre_mlp_layernorm.weight": (16,),
        f"{layer}mlp.router.weight": (12, 16),
        f"{layer}mlp.experts.experts.linear_fc1.weight": (12, 32, 16),
        f"{layer}mlp.experts.experts.linear_fc2.weight": (12, 16, 16),
    }
    assert dense.reads == []
    assert {name: tuple(weights.read(name).shape) for name in shapes} == shapes
    assert sorted(dense.reads) == sorted(Zeros.shapes)


@pytest.mark.parametrize(
    ("moe", "model", "lines"),
    [
        (
            {"num_experts": 10, "moe_router_topk": 4},
            {},
            ["--num-experts 10", "--moe-router-topk 4"],
        ),
        ({"moe_ffn_hidden_size": 17}, {}, ["--moe-ffn-hidden-size 17 must divide"]),
        ({"num_experts": None}, {}, ["no layer gets experts"]),
        ({"moe_shared_expert_intermediate_size": 8}, {}, ["--moe-shared-expert-intermediate-size"]),
        ({"moe_router_type": "noisy_topk"}, {}, ["--moe-router-type noisy_topk"]),
        ({}, {"ffn_type": "double_gated"}, ["--ffn-type double_gated"]),
    ],
)
def test_impossible_mixtures_are_refused(
    tmp_path: Path, moe: dict[str, Any], model: dict[str, Any], lines: list[str]
) -> None:
    chosen = dense_settings(1)
    chosen = chosen.model_copy(update={"model": chosen.model.model_copy(update=model)})
    with pytest.raises(UserError) as caught:
        upcycle(
            DenseModel(Zeros(), chosen, None),
            tmp_path / "sparse",
            MoESettings(**{**FINE, **moe}),
            OPTIONS,
        )
    assert all(line in str(caught.value) for line in lines)
    assert not (tmp_path / "sparse").exists()


@contextmanager
def model_of(folder: Path, vocabulary: int) -> Iterator[torch.nn.Module]:
    chosen = checkpoint_folder.one_rank_settings(checkpoint_folder.read(folder).record)
    with model_parallel():
        groups = ProcessGroupCollection.use_mpu_process_groups()
        runtime = Runtime(0, 1, torch.device("cpu"), groups)
        yield load_model(folder, chosen, vocabulary, runtime)


@pytest.mark.parametrize("model_type", ["llama", "olmo", "qwen2", "qwen3"])
def test_upcycling_of_huggingface_folders(tmp_path: Path, model_type: str) -> None:
    """The mixture computes the logits of the dense transformers model."""
    pytest.importorskip("transformers")
    from tests.unit.convert import hf_models

    theirs = hf_models.saved(tmp_path / "hf", model_type)
    assert is_huggingface(tmp_path / "hf")
    dense = dense_folder(tmp_path / "hf", None, None)
    moe = MoESettings(num_experts=10, moe_router_topk=5, moe_ffn_hidden_size=8)
    upcycle(dense, tmp_path / "sparse", moe, OPTIONS)
    vocabulary = hf_models.SIZES["vocab_size"]
    tokens = torch.randint(vocabulary, (40, 16), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(16)[None].expand_as(tokens)
    with torch.no_grad(), model_of(tmp_path / "sparse", vocabulary) as model:
        expected = theirs(tokens).logits
        logits = model(tokens, positions, None)[..., :vocabulary]
    assert (logits - expected).abs().max() <= 2e-5
