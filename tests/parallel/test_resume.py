"""A resumed run equals the uninterrupted one, and every layout loads any other's checkpoint."""

from pathlib import Path

import pytest
import torch

from tests.parallel.support.checkpoint_runs import (
    Groups,
    assert_identical,
    metrics,
    parallel_of,
    read_and_go_on,
    run,
    settings,
    start,
    tensors,
    write,
)
from tests.parallel.support.harness import run_ranks

MAIN = "optimizer.state.fp32_param."


def _straight_and_resumed(folder: str, layout: str, groups: Groups) -> None:
    straight, resumed = f"{folder}/straight", f"{folder}/resumed"
    training = groups.get("training", {})
    run(settings(layout, **groups, checkpoint={"save": straight}))
    half = {**groups, "training": {**training, "exit_interval": 3}}
    run(settings(layout, **half, checkpoint={"save": resumed}))
    run(settings(layout, **groups, checkpoint={"save": resumed, "load": resumed}))


@pytest.mark.parametrize(
    ("layout", "ranks", "bf16"),
    [
        ("dp", 1, False),
        ("dp", 1, True),
        ("ep2", 2, False),
        ("ep2", 2, True),
        ("zero", 2, True),
        ("ep2_zero", 2, False),
        ("tp2", 2, True),
        ("pp2", 2, False),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, layout: str, ranks: int, bf16: bool
) -> None:
    groups: Groups = {"precision": {"bf16": bf16}}
    run_ranks(_straight_and_resumed, ranks, str(tmp_path), layout, groups)
    straight, resumed = metrics(tmp_path / "straight"), metrics(tmp_path / "resumed")
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5, 6]
    assert resumed == straight
    one, other = (tensors(tmp_path / name / "step_0000006") for name in ("straight", "resumed"))
    assert_identical(one, other)


def test_sgd_resumes_with_its_momentum(tmp_path: Path) -> None:
    groups: Groups = {
        "optimizer": {"optimizer": "sgd"},
        "learning_rate": {"lr": 0.1, "lr_warmup_iters": 0},
    }
    run_ranks(_straight_and_resumed, 1, str(tmp_path), "dp", groups)
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "straight")
    saved = tensors(tmp_path / "straight" / "step_0000006")
    assert any(".momentum_buffer." in key and tensor.any() for key, tensor in saved.items())


ADAFACTOR: Groups = {
    "model": {"hidden_dropout": 0.0},
    "optimizer": {
        "optimizer": "adafactor",
        "adafactor_min_dim_size_to_factor": 4,
        "weight_decay": 0.01,
        "clip_grad": 0.0,
    },
    "learning_rate": {"lr": 0.05, "lr_warmup_iters": 0},
}


MUON: Groups = {
    "model": {"hidden_dropout": 0.0},
    "moe": {"moe_shared_expert_intermediate_size": 8},
    "optimizer": {"optimizer": "muon", "router_lr_mult": 0.5},
    "learning_rate": {"lr": 0.01, "lr_warmup_iters": 0},
}


@pytest.mark.parametrize(
    ("groups", "moment"), [(ADAFACTOR, "exp_avg_sq_row"), (MUON, "momentum_buffer")]
)
def test_our_optimizers_resume_and_are_the_same_on_sharded_matrices(
    tmp_path: Path, groups: Groups, moment: str
) -> None:
    """After a first half on one rank, one rank and two tensor and expert ranks continue equally."""
    half = {**groups, "training": {"exit_interval": 3}}
    run_ranks(_run_once, 1, "dp", half, {"save": str(tmp_path / "half")})
    for layout, ranks in (("dp", 1), ("tp2", 2), ("ep2", 2)):
        folders = {"load": str(tmp_path / "half"), "save": str(tmp_path / layout)}
        run_ranks(_run_once, ranks, layout, groups, folders)
    run_ranks(_run_once, 1, "dp", groups, {"save": str(tmp_path / "straight")})
    straight = metrics(tmp_path / "straight")
    assert metrics(tmp_path / "dp") == straight[3:]
    saved = tensors(tmp_path / "straight" / "step_0000006")
    assert any(f".{moment}." in key and tensor.any() for key, tensor in saved.items())
    for layout in ("tp2", "ep2"):
        losses = [row["lm_loss"] for row in metrics(tmp_path / layout)]
        assert losses == pytest.approx([row["lm_loss"] for row in straight[3:]], rel=1e-5)
        for key, tensor in tensors(tmp_path / layout / "step_0000006").items():
            torch.testing.assert_close(tensor, saved[key], rtol=1e-3, atol=1e-4, msg=key)


def _run_once(layout: str, groups: Groups, checkpoint: dict[str, str]) -> None:
    run(settings(layout, **groups, checkpoint=checkpoint))


@pytest.mark.parametrize(
    ("writer", "reader", "bf16"),
    [
        ("1 dp", "2 ep2", False),
        ("2 ep2", "1 dp", True),
        ("2 dp", "2 zero", True),
        ("2 ep2_zero", "1 dp", False),
        ("2 ep2_zero", "2 tp2_etp1", False),
        ("2 tp2", "2 ep2_zero", True),
        ("2 pp2", "2 ep2", False),
        ("2 zero", "2 pp2", True),
    ],
)
def test_any_layout_loads_any_other(tmp_path: Path, writer: str, reader: str, bf16: bool) -> None:
    groups: Groups = {
        "model": {"hidden_dropout": 0.0},
        "training": {"train_iters": 3},
        "precision": {"bf16": bf16},
    }
    written, read = tmp_path / "written", tmp_path / "read"
    ranks, layout = writer.split()
    run_ranks(write, int(ranks), str(written), layout, groups)
    ranks, layout = reader.split()
    source = str(written / "step_0000002")
    run_ranks(read_and_go_on, int(ranks), source, str(read), layout, groups)
    assert_identical(tensors(written / "step_0000002"), tensors(read / "step_0000002"))
    third, [again] = metrics(written)[2], metrics(read)
    tolerance = 2e-3 if bf16 else 1e-5 if "tp" in writer + reader else 1e-6
    assert again["lm_loss"] == pytest.approx(third["lm_loss"], rel=tolerance)
    assert again["grad_norm"] == pytest.approx(third["grad_norm"], rel=100 * tolerance)


def test_pipeline_stages_get_token_ids_and_checkpoints_keep_the_hash_table(tmp_path: Path) -> None:
    """Hash routing: another layout and another seed keep the experts of each id."""
    hashed: Groups = {
        "model": {"hidden_dropout": 0.0},
        "moe": {"moe_router_type": "hash", "moe_aux_loss_coeff": 0.0},
        "training": {"train_iters": 3},
    }
    written, read = tmp_path / "written", tmp_path / "read"
    run_ranks(write, 1, str(written), "dp", hashed)
    source = str(written / "step_0000002")
    run_ranks(read_and_go_on, 2, source, str(read), "pp2", hashed)
    assert_identical(tensors(written / "step_0000002"), tensors(read / "step_0000002"))
    assert "decoder.layers.0.mlp.router.table_seed" in tensors(read / "step_0000002")
    third, [again] = metrics(written)[2], metrics(read)
    assert again["lm_loss"] == pytest.approx(third["lm_loss"], rel=2e-3)
    assert again["expert_load"] == third["expert_load"]


def test_precisions_load_each_other(tmp_path: Path) -> None:
    """fp32 loads a bf16 run's main parameters, bf16 starts from an fp32 run's weights exactly."""
    training = {"train_iters": 3}
    fp32: Groups = {"training": training, "precision": {"bf16": False}}
    bf16: Groups = {"training": training, "precision": {"bf16": True}}
    folders = [tmp_path / name for name in ("bf16", "fp32", "back")]
    sources = [str(folder / "step_0000002") for folder in folders]
    run_ranks(write, 1, str(folders[0]), "dp", bf16)
    run_ranks(read_and_go_on, 1, sources[0], str(folders[1]), "dp", fp32)
    run_ranks(read_and_go_on, 1, sources[1], str(folders[2]), "dp", bf16)
    first, middle, back = (tensors(Path(source)) for source in sources)
    assert_identical(first, back)
    mains = {key: first[key] for key in first if key.startswith(MAIN)}
    assert mains
    for key, main in mains.items():
        assert torch.equal(middle[key.removeprefix(MAIN)], main), key


def test_sequential_and_grouped_experts_load_each_other(tmp_path: Path) -> None:
    """One parameter for all experts of a rank, or one per expert: the checkpoint is the same."""
    sequential: Groups = {"moe": {"moe_grouped_gemm": False}, "training": {"train_iters": 2}}
    grouped: Groups = {"moe": {"moe_grouped_gemm": True}, "training": {"train_iters": 2}}
    folders = [tmp_path / name for name in ("sequential", "grouped", "back")]
    sources = [str(folder / "step_0000002") for folder in folders]
    run_ranks(write, 2, str(folders[0]), "ep2_zero", sequential)
    run_ranks(read_and_go_on, 1, sources[0], str(folders[1]), "dp", grouped)
    run_ranks(read_and_go_on, 2, sources[1], str(folders[2]), "ep2", sequential)
    first, middle, back = (tensors(Path(source)) for source in sources)
    assert_identical(first, middle)
    assert_identical(first, back)


def test_a_parameter_over_three_flat_shards(tmp_path: Path) -> None:
    """Tied embeddings of 1024 rows are 16384 of 25.6 thousand parameters on four ranks."""
    tied: Groups = {
        "model": {
            "untie_embeddings_and_output_weights": False,
            "make_vocab_size_divisible_by": 1024,
        },
        "training": {"train_iters": 2},
    }
    folders = [tmp_path / name for name in ("four", "stages", "back")]
    sources = [str(folder / "step_0000002") for folder in folders]
    run_ranks(write, 4, str(folders[0]), "zero", tied)
    run_ranks(read_and_go_on, 2, sources[0], str(folders[1]), "pp2", tied)
    run_ranks(read_and_go_on, 4, sources[1], str(folders[2]), "zero", tied)
    first, middle, back = (tensors(Path(source)) for source in sources)
    assert_identical(first, middle)
    assert_identical(first, back)


def _copies_of_the_embedding(groups: Groups) -> torch.Tensor:
    chosen = settings("pp2", **groups)
    with parallel_of(chosen):
        loop = start(chosen)
        loop.run(lambda: False)
        named = dict(loop.trainer.chunks[0].named_parameters())
        return named["module.embedding.word_embeddings.weight"].detach().clone()


def test_muon_leaves_both_copies_of_the_embedding_to_adamw() -> None:
    """The last stage has an embedding for multi-token prediction; megatron-core marks only one."""
    groups: Groups = {
        "model": {"mtp_num_layers": 1},
        "optimizer": {"optimizer": "muon"},
        "training": {"train_iters": 3},
    }
    first, last = run_ranks(_copies_of_the_embedding, 2, groups)
    assert torch.equal(first, last)


def test_padding_of_the_vocabulary_may_differ(tmp_path: Path) -> None:
    """96 rows on one tensor rank, 192 on two; rows that no token uses are zero."""
    padding: Groups = {
        "model": {"make_vocab_size_divisible_by": 96},
        "training": {"train_iters": 2},
    }
    folders = [tmp_path / name for name in ("narrow", "wide", "back")]
    sources = [str(folder / "step_0000002") for folder in folders]
    run_ranks(write, 1, str(folders[0]), "dp", padding)
    run_ranks(read_and_go_on, 2, sources[0], str(folders[1]), "tp2", padding)
    run_ranks(read_and_go_on, 1, sources[1], str(folders[2]), "dp", padding)
    narrow, wide, back = (tensors(Path(source)) for source in sources)
    assert_identical(narrow, back)
    embedding = wide["embedding.word_embeddings.weight"]
    assert embedding.shape[0] == 192
    assert not embedding[96:].any()
