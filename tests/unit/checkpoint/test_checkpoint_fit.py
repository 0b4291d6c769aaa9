"""Compatibility of a checkpoint with the settings that load it."""

from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from moetron.common.errors import UserError
from moetron.moe.checkpoint import compatibility, run_folder
from moetron.moe.checkpoint.compatibility import (
    FUNCTION,
    SHAPE,
    changed_data,
    check_folders,
    differences,
)
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.run_folder import Record
from moetron.moe.config.schema.settings import Settings, fields
from tests.unit.training.training_cases import settings

STREAM = {
    "sources": [{"name": "code", "tokenizer": "abc"}],
    "order": {"seed": 1, "weights": (1, 2)},
}

FREE = {
    *("seq_length", "make_vocab_size_divisible_by", "transformer_impl", "attention_backend"),
    *("init_method_std", "init_method", "init_method_scale", "embedding_init_method_std"),
    *("query_init_folds_scale", "init_method_cutoff", "scaled_output_init"),
    *(
        "mtp_loss_scaling_factor",
        "output_z_loss_coeff",
        "hidden_dropout",
        "attention_dropout",
        "moe_expert_dropout",
    ),
    *("moe_expert_choice_eval", "moe_second_expert_threshold", "moe_router_temperature"),
    *("moe_router_final_temperature", "moe_router_anneal_samples", "moe_router_dtype"),
    *("moe_router_bias_update_rate", "moe_router_load_balancing_type", "moe_aux_loss_coeff"),
    *("moe_aux_loss_first_choice_only", "moe_z_loss_coeff", "moe_input_jitter_eps"),
    *("moe_expert_capacity_factor", "moe_capacity_scope", "moe_eval_capacity_factor"),
    *("moe_minimum_capacity", "moe_capacity_includes_topk", "moe_pad_expert_input_to_capacity"),
    *("moe_token_drop_policy", "moe_token_dispatcher_type", "moe_grouped_gemm"),
    *("moe_experts_impl", "moe_router_init_method_std", "moe_shared_expert_overlap"),
    *("moe_encoder_capacity_factor", "moe_encoder_eval_capacity_factor", "label_smoothing"),
    *("qk_clip", "qk_clip_alpha", "qk_clip_threshold", "log_max_attention_logit"),
}
"""Model settings that may change at a resume: initialisation, training, drops, kernels."""


def test_every_setting_of_the_model_is_fixed_or_free() -> None:
    held = {(group, name) for part in (SHAPE, FUNCTION) for group in part for name in part[group]}
    held.add(("model", "vocab_size"))  # vocabulary.py's
    groups = ("model", "attention", "moe")
    free = {name for group, name, _ in fields() if group in groups and (group, name) not in held}
    assert free == FREE


def record(saved: Settings, **stream: Any) -> Record:
    tree = saved.model_dump(mode="json")
    saved_stream = {**STREAM, "order": {"seed": 1, "weights": [1, 2]}, **stream}
    return Record(Progress(3, 24, 96), tree, {}, saved_stream, {}, {})


def test_the_same_settings_fit() -> None:
    assert differences(record(settings()), settings(), STREAM) == []


@pytest.mark.parametrize(
    ("group", "change", "flag"),
    [
        ("model", {"num_layers": 2}, "--num-layers 2: the checkpoint has 1"),
        ("model", {"swiglu": False}, "--swiglu false: the checkpoint has true"),
        ("model", {"ffn_type": "relu"}, "--ffn-type relu: the checkpoint has none"),
        ("moe", {"num_experts": 4}, "--num-experts 4: the checkpoint has none"),
        ("moe", {"moe_layer_freq": [0]}, "--moe-layer-freq 0: the checkpoint has 1"),
    ],
)
def test_another_architecture_does_not_fit(group: str, change: dict[str, Any], flag: str) -> None:
    changed = {"checkpoint": {"finetune": True}, group: change}
    [problem] = differences(record(settings()), settings(**changed), STREAM)
    assert problem == f"  - {flag}"


@pytest.mark.parametrize(
    ("wrote", "installed", "fits"),
    [
        ("0.16.1", "0.19.2", True),
        ("0.19.3", "0.19.2", True),
        ("0.19.2", "0.16.1", False),
        ("0.20.0rc1", "0.19.2", False),
        ("of no release", "0.19.2", True),
    ],
)
def test_runs_go_forward_to_newer_releases_of_megatron_core(
    monkeypatch: pytest.MonkeyPatch, wrote: str, installed: str, fits: bool
) -> None:
    monkeypatch.setattr(metadata, "version", {"megatron-core": installed}.get)
    saved = replace(record(settings()), versions={"megatron-core": wrote})
    problems = differences(saved, settings(), STREAM)
    if fits:
        assert not problems
    else:
        [problem] = problems
        assert f"megatron-core {installed}: the checkpoint was written with {wrote}" in problem
        assert "or --finetune" in problem
        assert not differences(saved, settings(checkpoint={"finetune": True}), STREAM)


def test_all_differences_at_once() -> None:
    changed = settings(model={"num_layers": 2, "hidden_size": 16})
    assert len(differences(record(settings()), changed, STREAM)) == 2


@pytest.mark.parametrize("finetune", [False, True])
def test_another_vocabulary_does_not_fit(finetune: bool) -> None:
    """Nor may it grow in fine-tuning: megatron-core would silently add rows of zeros."""
    saved = record(settings(model={"vocab_size": 90}))
    grown = settings(model={"vocab_size": 200}, checkpoint={"finetune": finetune})
    [problem] = differences(saved, grown, STREAM)
    assert "--vocab-size 200, given or the tokenizer's (256 rows" in problem
    assert "the checkpoint has 90 (128 rows); give what its run had: --vocab-size 90" in problem
    padded_otherwise = settings(
        model={"vocab_size": 90, "make_vocab_size_divisible_by": 8},
        parallel={"tensor_model_parallel_size": 4},
    )
    assert differences(saved, padded_otherwise, STREAM, embedding_rows=128) == []


def test_settings_that_may_change_at_a_resume() -> None:
    changed = settings(
        parallel={"tensor_model_parallel_size": 2},
        training={"global_batch_size": 16, "train_iters": 99},
        learning_rate={"lr": 0.5},
        precision={"bf16": True},
    )
    assert differences(record(settings()), changed, STREAM) == []


def test_the_optimizer_must_fit_if_it_is_loaded() -> None:
    saved = record(settings(optimizer={"optimizer": "sgd"}))
    [problem] = differences(saved, settings(), STREAM)
    assert "--optimizer adam: the checkpoint has sgd" in problem
    for options in (("no_load_optim",), ("finetune",), ("no_load_optim", "finetune")):
        loading = settings(checkpoint=dict.fromkeys(options, True))
        assert differences(saved, loading, STREAM) == []


def test_routing_may_change_only_in_finetuning() -> None:
    saved, changed = record(settings()), {"moe": {"moe_router_topk": 1}}
    assert "--moe-router-topk 1" in differences(saved, settings(**changed), STREAM)[0]
    finetune = settings(**changed, checkpoint={"finetune": True})
    assert differences(saved, finetune, STREAM) == []


def test_a_setting_missing_in_an_old_checkpoint_is_no_difference() -> None:
    saved = record(settings())
    del saved.settings["moe"]
    del saved.settings["model"]["swiglu"]
    assert differences(saved, settings(), STREAM) == []


def test_another_tokenizer_never_fits() -> None:
    saved = record(settings(), sources=[{"name": "code", "tokenizer": "xyz"}])
    finetune = settings(checkpoint={"finetune": True})
    assert "tokenizer abc: the checkpoint has xyz" in differences(saved, finetune, STREAM)[0]


def test_other_data_fit_and_are_named() -> None:
    saved = record(settings(), order={"seed": 2, "weights": [1, 2]})
    assert differences(saved, settings(), STREAM) == []
    assert changed_data(saved, STREAM) == ["order"]
    assert changed_data(record(settings()), STREAM) == [], "tuples are lists in JSON"


def _preferences(folder: Path, **checkpoint: Any) -> Settings:
    chosen = {"sft": True, "preference_loss": "dpo"}
    reference = {"preference_reference_load": str(folder / "reference")}
    return settings(adaptation={**chosen, **reference}, checkpoint=checkpoint)


def test_a_reference_has_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the weights of --finetune: only the architecture counts."""
    saved = {
        "start": record(settings()),
        "reference": record(settings(optimizer={"optimizer": "sgd"})),
    }
    monkeypatch.setattr(compatibility, "find_readable", lambda path, *_, **__: path)
    monkeypatch.setattr(compatibility, "read_record", lambda folder: saved[folder.name])
    verified: list[str] = []
    monkeypatch.setattr(compatibility, "verify_files", lambda f, _: verified.append(f.name))
    resumed = _preferences(tmp_path, load=str(tmp_path / "start"))
    check_folders(resumed, STREAM)
    assert verified == ["start"]  # a resumed run has the log-probabilities
    chosen = _preferences(tmp_path, load=str(tmp_path / "start"), finetune=True)
    check_folders(chosen, STREAM)
    assert verified[1:] == ["start", "reference"]
    saved["reference"] = record(settings(model={"num_layers": 2}))
    with pytest.raises(UserError, match=r"--preference-reference-load .*reference: does not fit"):
        check_folders(chosen, STREAM)


def test_preferences_do_not_start_from_random_weights(tmp_path: Path) -> None:
    same = str(tmp_path)
    with pytest.raises(UserError, match="no checkpoint: preferences need a trained model"):
        check_folders(_preferences(tmp_path, load=same, save=same), STREAM)


@pytest.mark.parametrize(("rank", "asked"), [("0", 2), ("7", 0)])
def test_rank_0_alone_asks_for_the_sizes_of_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, asked: int
) -> None:
    """Also to find what --load-fallback loads: 2,048 ranks would ask for 4,096 files each."""
    saved, names = record(settings()), list[str]()
    saved.files["__0_0.distcp"] = 1
    (tmp_path / "step_0000001").mkdir()
    (tmp_path / "step_0000002").mkdir()

    def verify(_: Path, record: Record, chosen: Any = None) -> None:
        names.extend(record.files if chosen is None else chosen)

    for module in (compatibility, run_folder):
        monkeypatch.setattr(module, "read_record", lambda _: saved)
        monkeypatch.setattr(module, "verify_files", verify)
    monkeypatch.setenv("RANK", rank)
    check_folders(settings(checkpoint={"load": str(tmp_path), "load_fallback": True}), STREAM)
    assert names == ["__0_0.distcp"] * asked
