"""Hints for setting names of other programs."""

import re
from pathlib import Path

import pytest

from moetron.common.errors import ConfigError
from moetron.moe.config.command import load
from moetron.moe.config.flags import parse
from moetron.moe.config.foreign_names import DIFFERENT, PREFIXES, SAME
from moetron.moe.config.schema.field import nearest
from moetron.moe.config.schema.settings import Settings, fields

OURS = {name for _, name, _ in fields()}


def test_hints_name_existing_settings() -> None:
    assert set(SAME.values()) <= OURS
    named = {name for text in DIFFERENT.values() for name in re.findall(r"\{(\w+)\}", text)}
    assert named <= OURS


def test_our_names_are_not_foreign() -> None:
    assert not (SAME.keys() | DIFFERENT.keys()) & OURS
    assert not SAME.keys() & DIFFERENT.keys()
    prefixes = tuple(f"{prefix}_" for prefix in PREFIXES)
    assert not [name for name in OURS if name.startswith(prefixes)]


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--group-query-attention", "leave it out: --num-query-groups alone groups the queries"),
        ("--num-key-value-heads", "use --num-query-groups"),
        ("--num_local_experts=8", "use --num-experts"),
        ("--train-samples", "use --train-iters: samples / --global-batch-size"),
        ("--no-save-optim", "a checkpoint has the optimizer; --no-load-optim skips it"),
        ("--rl-partial-rollouts", "reinforcement learning is not supported"),
        ("--per-device-train-batch-size", "use --micro-batch-size"),
        ("--nproc-per-node", "an option of torchrun or srun: give it before pretrain_moe.py"),
    ],
)
def test_flags(flag: str, answer: str) -> None:
    (problem,) = parse([flag, "1"]).problems
    assert problem.startswith(f"unknown flag {flag.partition('=')[0]}: ")
    assert answer in problem


@pytest.mark.parametrize(
    ("group", "key", "answer"),
    [
        ("model", "num_key_value_heads", "use `num_query_groups` under `model:`"),
        ("model", "n_routed_experts", "use `num_experts` under `moe:`"),
        ("model", "torch_dtype", "use `bf16` under `precision:`"),
        ("model", "rope_theta", "use `rotary_base` under `model:`"),
        (
            "training",
            "gradient_accumulation_steps",
            "leave it out: it is `global_batch_size`",
        ),
    ],
)
def test_keys(tmp_path: Path, group: str, key: str, answer: str) -> None:
    (tmp_path / "r.yaml").write_text(f"{group}: {{{key}: 1}}\n")
    with pytest.raises(ConfigError) as caught:
        load(["--config", str(tmp_path / "r.yaml"), "--dry-run"])
    assert f"unknown key `{key}` under `{group}:`: {answer}" in caught.value.problems[0]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("--num_layers", "--num-layers"),
        ("--tensor-parallel-size", "--tensor-model-parallel-size"),
        ("--moe-router-top-k", "--moe-router-topk"),
        ("--save-inteval", "--save-interval"),
        ("--use-distributed-optim", "--use-distributed-optimizer"),
        ("--no-load-optimizer", "--no-load-optim"),
    ],
)
def test_the_nearest_name_is_a_misspelt_one(wrong: str, right: str) -> None:
    assert parse([wrong]).problems == [f"unknown flag {wrong}; did you mean {right}?"]


@pytest.mark.parametrize(
    ("wrong", "opposite_or_other"),
    [
        ("load-rng-states", "no-load-rng"),
        ("swiglu", "no-swiglu"),
        ("no-save-rng", "no-load-rng"),
        ("num-value-heads", "num-attention-heads"),
        ("bias", "rotary-base"),
        ("lr-decay-steps", "lr-decay-style"),
    ],
)
def test_a_name_of_another_meaning_is_not_suggested(wrong: str, opposite_or_other: str) -> None:
    assert nearest(wrong, [opposite_or_other]) == ""


def test_sections() -> None:
    assert nearest("modle", Settings.model_fields) == "; did you mean model?"
    assert nearest("train", Settings.model_fields) == "; did you mean training?"
    assert nearest("network", Settings.model_fields) == ""
