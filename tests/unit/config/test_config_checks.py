"""All cross-checks together; test_rules_*.py test single rules."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetron.moe.config.checks import input_problems
from tests.unit.config.config_cases import found, make

PP2 = {"world_size": 2, "pipeline_model_parallel_size": 2}
TP2 = {"world_size": 2, "tensor_model_parallel_size": 2}
SIGMOID = {"moe_router_score_function": "sigmoid"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts": None},
        {**TP2, "expert_tensor_parallel_size": 1},
        {**PP2, "num_layers_per_virtual_pipeline_stage": 1},
        {"world_size": 8, "expert_model_parallel_size": 8},
        {
            "world_size": 12,
            "num_experts": 6,
            "expert_model_parallel_size": 3,
            "global_batch_size": 24,
        },
        {"world_size": 2, "context_parallel_size": 2, "device": "cuda", "te": True},
        {"world_size": 2, "context_parallel_size": 2},
        {"moe_layer_freq": [0, 1, 0, 1]},
        {"rampup_batch_size": (4, 4, 100)},
        {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {"moe_router_enable_expert_bias": True, **SIGMOID},
        {"moe_router_load_balancing_type": "sinkhorn", "moe_router_topk": 1},
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 20, "lr_warmup_iters": 80},
        {"lr_warmup_tokens": 51200, "lr_decay_style": "constant"},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 4},
        {"recompute_granularity": "selective", "recompute_modules": ["moe", "mlp"]},
        {"moe_shared_expert_intermediate_size": 64},
    ],
)
def test_consistent_settings_pass(changes: dict[str, Any]) -> None:
    assert found(**changes) == []


def inputs(**changes: Any) -> list[str]:
    return input_problems(make(**changes))


def test_a_real_run_needs_inputs(tmp_path: Path) -> None:
    assert inputs() == []
    (line,) = inputs(mock_data=False)
    assert line.startswith("no data: give --data-path")
    lines = inputs(mock_data=False, data_path=[str(tmp_path / "a")], tokenizer_model=None)
    assert lines[0].startswith("--data-path needs --tokenizer-model")
    assert lines[1].endswith(f"there is no file {tmp_path / 'a.bin'} or {tmp_path / 'a.idx'}")
    (tmp_path / "a.bin").touch()
    (tmp_path / "a.idx").touch()
    shards = {"mock_data": False, "data_path": ["0.5", str(tmp_path / "a")]}
    assert inputs(**shards, tokenizer_model="bytes") == []
    several = [str(tmp_path / "a"), str(tmp_path / "b")]
    (line,) = inputs(mock_data=False, data_path=several, tokenizer_model="bytes")
    assert line.startswith(f"--data-path {tmp_path / 'b'}: there is no file")
    (line,) = inputs(**shards, tokenizer_model=str(tmp_path / "t.json"))
    assert line.startswith(f"--tokenizer-model {tmp_path / 't.json'}: no such file")
    (line,) = inputs(**shards, tokenizer_model="bytes", eval_interval=5)
    assert line == "--eval-interval 5 needs --valid-data-path"


@pytest.mark.parametrize("name", ["save_interval", "keep_last", "exit_interval"])
def test_saving_needs_a_folder(name: str, tmp_path: Path) -> None:
    (line,) = inputs(**{name: 3})
    assert line == f"--{name.replace('_', '-')} 3 needs --save FOLDER"
    assert inputs(**{name: 3}, save=str(tmp_path / "new")) == []


def test_outputs_need_a_save_folder() -> None:
    assert inputs(async_save=True) == ["--async-save needs --save FOLDER"]
    assert inputs(tensorboard_dir="tb") == ["--tensorboard-dir tb needs --save FOLDER"]


@pytest.mark.parametrize("installed", [False, True])
def test_wandb_is_checked_before_the_run(
    installed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version = "1" if installed else None
    monkeypatch.setattr("moetron.moe.config.rules.inputs.installed_version", lambda _: version)
    missing = ["--wandb-project p needs the package wandb: install moetron[log]"]
    found = inputs(wandb_project="p", save=str(tmp_path))
    assert found == ([] if installed else missing)


@pytest.mark.parametrize("name", ["wandb_entity", "wandb_exp_name"])
def test_a_name_on_wandb_needs_a_project(name: str) -> None:
    assert inputs(**{name: "x"}) == [f"--{name.replace('_', '-')} x needs --wandb-project"]


@pytest.mark.parametrize("name", ["finetune", "reset_progress", "no_load_optim", "no_load_rng"])
def test_loading_needs_a_folder(name: str, tmp_path: Path) -> None:
    (line,) = inputs(**{name: True})
    assert line == f"--{name.replace('_', '-')} needs --load FOLDER"
    (line,) = inputs(load=str(tmp_path / "none"))
    assert line.endswith("there is no such folder")
    (tmp_path / "file").touch()
    (line,) = inputs(save=str(tmp_path / "file"))
    assert line.endswith("is a file: name a folder")


sizes = st.integers(1, 5)
layouts = st.fixed_dictionaries(
    {},
    optional={
        "num_layers": sizes,
        "num_attention_heads": sizes,
        "num_query_groups": sizes,
        "num_experts": st.none() | sizes,
        "moe_layer_position": st.sampled_from(["first", "last"]),
        "first_k_dense_replace": sizes,
        "moe_layer_freq": sizes | st.lists(st.sampled_from([0, 1]), max_size=4),
        "moe_router_topk": sizes,
        "moe_router_num_groups": sizes,
        "moe_router_group_topk": sizes,
        "tensor_model_parallel_size": sizes,
        "pipeline_model_parallel_size": sizes,
        "num_layers_per_virtual_pipeline_stage": sizes,
        "expert_model_parallel_size": sizes,
        "expert_tensor_parallel_size": sizes,
        "context_parallel_size": sizes,
        "micro_batch_size": sizes,
        "global_batch_size": sizes,
        "rampup_batch_size": st.tuples(sizes, sizes, sizes),
        "seq_length": sizes,
        "lr_warmup_tokens": sizes,
        "data_path": st.lists(st.sampled_from(["1", "x"]), max_size=4),
    },
)


@settings(max_examples=400, deadline=None)
@given(layouts, st.integers(1, 64), st.sampled_from(["cpu", "cuda"]), st.booleans())
def test_checks_answer_for_any_settings(
    changes: dict[str, Any], world_size: int, device: str, te: bool
) -> None:
    lines = found(world_size, device, te, **changes)
    assert all(isinstance(line, str) and "--" in line and "\n" not in line for line in lines)
