"""Values computed from settings, against worked examples and megatron-core's calculator."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import num_microbatches_calculator

from moetron.moe.config.schema import derived
from tests.unit.config.config_cases import make


def test_unset_sizes() -> None:
    settings = make()
    assert derived.head_dim(settings.model) == 8
    assert derived.query_groups(settings.model) == 8
    assert derived.dense_ffn_size(settings.model) == derived.expert_ffn_size(settings) == 256
    given_sizes = make(kv_channels=16, num_query_groups=2, ffn_hidden_size=5, moe_ffn_hidden_size=3)
    assert derived.head_dim(given_sizes.model) == 16
    assert derived.query_groups(given_sizes.model) == 2
    assert derived.dense_ffn_size(given_sizes.model) == 5
    assert derived.expert_ffn_size(given_sizes) == 3


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, [True] * 4),
        ({"num_experts": None}, [False] * 4),
        ({"moe_layer_freq": 2}, [True, False, True, False]),
        ({"moe_layer_freq": 3}, [True, False, False, True]),
        ({"moe_layer_freq": [0, 0, 0, 1]}, [False, False, False, True]),
        ({"moe_layer_freq": "[0]*2+([1])*2"}, [False, False, True, True]),
        ({"moe_layer_freq": 2, "moe_layer_position": "last"}, [False, True, False, True]),
        ({"moe_layer_freq": 3, "moe_layer_position": "last"}, [False, False, True, False]),
        ({"first_k_dense_replace": 1}, [False, True, True, True]),
        ({"moe_layer_freq": 2, "first_k_dense_replace": 1}, [False, False, True, False]),
    ],
)
def test_layers_with_experts(changes: dict[str, object], layers: list[bool]) -> None:
    assert derived.moe_layers(make(**changes)) == layers


def test_layout() -> None:
    settings = make(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
    )
    assert derived.sequence_parallel(settings.parallel)
    assert derived.data_parallel_size(settings.parallel, 16) == 4
    assert derived.expert_data_parallel_size(settings.parallel, 16) == 2
    assert derived.num_microbatches(settings, 16) == 2
    assert not derived.sequence_parallel(make().parallel)
    unset = make(tensor_model_parallel_size=2).parallel
    assert derived.expert_tensor_parallel_size(unset) == 2


@pytest.mark.parametrize(
    ("vocab_size", "tensor", "rows"),
    [(50280, 1, 50304), (50304, 1, 50304), (50305, 1, 50432), (50280, 4, 50688), (1, 1, 128)],
)
def test_padded_vocabulary(vocab_size: int, tensor: int, rows: int) -> None:
    settings = make(tensor_model_parallel_size=tensor)
    assert derived.padded_vocab_size(vocab_size, settings) == rows


def test_ramp_by_hand() -> None:
    # Two steps (4 -> 8 -> 12) of 10 samples each: 4 4 4 (12 seen) 8 (20 seen) 12 12 ...
    settings = make(rampup_batch_size=(4, 4, 20), global_batch_size=12, train_iters=6)
    assert [derived.global_batch_size_at(settings, n) for n in (0, 9, 10, 19, 20)] == [
        4, 4, 8, 8, 12,
    ]  # fmt: skip
    assert derived.total_samples(settings) == 4 + 4 + 4 + 8 + 12 + 12
    assert derived.total_samples(make(train_iters=7, global_batch_size=6)) == 42


@pytest.mark.skipif(
    not hasattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator"),
    reason="megatron-core 0.19 has no ramp",
)
@given(
    start=st.integers(1, 20),
    increment=st.integers(1, 20),
    stairs=st.integers(1, 10),
    ramp_samples=st.integers(1, 500),
    consumed=st.integers(0, 600),
)
def test_ramp_is_megatrons(
    start: int, increment: int, stairs: int, ramp_samples: int, consumed: int
) -> None:
    full = start + increment * stairs
    theirs = num_microbatches_calculator.RampupBatchsizeNumMicroBatchesCalculator(
        full, 1, 1, False, 1, start, increment, ramp_samples
    )
    # If a step ends at a fractional number of samples, theirs divides in floating point.
    if consumed * stairs % ramp_samples == 0 and ramp_samples % stairs:
        return
    theirs.update(consumed, consistency_check=False)
    settings = make(rampup_batch_size=(start, increment, ramp_samples), global_batch_size=full)
    assert derived.global_batch_size_at(settings, consumed) == theirs.current_global_batch_size


def test_schedule_lengths() -> None:
    steps = derived.schedule_lengths(make(lr_warmup_iters=5))
    assert (steps.unit, steps.run, steps.warmup, steps.end) == ("steps", 100, 5, 100)
    tokens = derived.schedule_lengths(make(lr_decay_tokens=1000, lr_wsd_decay_tokens=10))
    assert (tokens.unit, tokens.run, tokens.warmup) == ("tokens", 100 * 16 * 32, 0)
    assert (tokens.end, tokens.final_decay) == (1000, 10)


FILES = {"mock_data": False, "vocab_size": None, "tokenizer_model": "bytes"}
ONE = {**FILES, "data_path": ["x"]}
STAGED = {
    **FILES,
    "stages": [
        {"data_path": ["x"], "objective": "ul2", "until_tokens": 100},  # 3.1 samples of 32 tokens
        {"data_path": ["y"]},
    ],
}


@pytest.mark.parametrize(
    ("changes", "sample", "objective"),
    [
        ({"objective": "ul2"}, 9, "causal"),  # mock samples
        (ONE, 9, "causal"),
        ({**ONE, "objective": "prefix_lm"}, 9, "prefix_lm"),
        ({**ONE, "eod_mask_loss": True}, 9, "causal"),
        ({**ONE, "repetition_max_count": 9}, 9, "causal"),
        (STAGED, 0, "ul2"),
        (STAGED, 3, "ul2"),
        (STAGED, 4, "causal"),
    ],
)
def test_objectives(changes: dict[str, Any], sample: int, objective: str) -> None:
    settings = make(**changes)
    assert derived.objective_at(settings, sample) == objective


@pytest.mark.parametrize(
    ("changes", "consumed", "has_mode", "expected"),
    [
        ({**ONE, "objective": "prefix_lm"}, 9, False, False),  # read causally in training
        ({**ONE, "objective": "prefix_lm", "bidirectional_prefix": True}, 9, False, True),
        ({**STAGED, "bidirectional_prefix": True}, 4, False, True),
        ({**STAGED, "bidirectional_prefix": True}, 5, False, False),
        ({**STAGED, "bidirectional_prefix": True}, 5, True, True),
        ({**STAGED, "bidirectional_prefix": True}, 0, False, True),
        ({"bidirectional_prefix": True}, 9, False, False),
    ],
)
def test_prompts_with_bidirectional_attention(
    changes: dict[str, Any], consumed: int, has_mode: bool, expected: bool
) -> None:
    assert derived.reads_prefix(make(**changes), consumed, has_mode) is expected
