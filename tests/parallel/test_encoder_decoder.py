"""An encoder-decoder in every layout against one process: losses, choices and all gradients."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moetron.data.chat.text_to_text_stream import TextToTextStream, open_text_to_text
from tests.parallel.support.parity_suite import Suite
from tests.parallel.support.steps import SEQUENCE, Case, assert_same, run
from tests.unit.data.chat.chat_cases import TOKENIZER, prepare

TP, EP, PP = (f"{kind}_model_parallel_size" for kind in ("tensor", "expert", "pipeline"))
ETP, ZERO = "expert_tensor_parallel_size", "use_distributed_optimizer"
ENCODER = 10
PACKED = (1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 1, 1, 1, 2, 2, 0)
STACKS = Case(
    model={
        "num_layers": 6,
        "encoder_num_layers": 2,
        "num_query_groups": None,
        "qk_layernorm": False,
        "qk_layernorm_scope": "head",
        "position_embedding_type": "relative",
        "ffn_type": "geglu_tanh",
        "output_z_loss_coeff": 0.01,
        "label_smoothing": 0.1,
    },
    attention={"softmax_scale": 1.0},
    moe={
        "moe_layer_freq": 2,
        "moe_layer_position": "last",
        "moe_sequential_ffn_hidden_size": 24,
        "moe_expert_capacity_factor": 1.0,
        "moe_encoder_capacity_factor": 0.5,
        "moe_token_drop_policy": "choice",
    },
    data={"encoder_seq_length": ENCODER},
    segments=PACKED,
    micro_batch_size=2,
)


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    assert len(PACKED) == SEQUENCE
    return run(1, STACKS)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        pytest.param(2, {TP: 2, ETP: 1, EP: 2}, id="TP2 EP2"),
        pytest.param(2, {PP: 2}, id="PP2"),
        pytest.param(2, {EP: 2}, id="EP2 DP2", marks=pytest.mark.slow),
        pytest.param(2, {TP: 2}, id="TP2 ETP2", marks=pytest.mark.slow),
        pytest.param(
            2,
            {PP: 2, "num_layers_per_virtual_pipeline_stage": 1},
            id="PP2 VPP3",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            {
                PP: 2,
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
            id="PP2 recomputed",
            marks=pytest.mark.slow,
        ),
        pytest.param(4, {TP: 2, PP: 2, EP: 2, ETP: 1}, id="TP2 PP2 EP2", marks=pytest.mark.slow),
    ],
)
def test_layout_equals_one_process(
    one_rank: dict[str, Any], ranks: int, parallel: dict[str, Any]
) -> None:
    """With packed examples of several lengths, padding, and a capacity of each stack."""
    result = run(ranks, replace(STACKS, parallel=parallel), one_rank["weights"])
    assert_same(result, one_rank)


def test_both_stacks_are_logged_and_limited(one_rank: dict[str, Any]) -> None:
    losses = one_rank["auxiliary"]
    assert losses["aux_loss"] == pytest.approx(
        (losses["encoder_aux_loss"] + 2 * losses["decoder_aux_loss"]) / 3
    )
    assert losses["encoder_z_loss"] != losses["decoder_z_loss"]
    kept, chosen = (one_rank[name].sum(1) for name in ("kept", "chosen"))
    encoder, *decoder = (kept / chosen).tolist()
    assert encoder <= 0.5 + 8 / 40, "half of a balanced load, in whole slots of 8 experts"
    assert all(share > encoder for share in decoder)
    names = one_rank["weights"].keys()
    assert any("layers.1.final_layernorm" in name for name in names)
    assert any("layers.2.cross_attention.linear_kv" in name for name in names)


TASKS = [{"inputs": "ab" * (n % 5), "targets": "y" * (1 + n % 4)} for n in range(24)]
INPUTS, TARGETS = 16, 12


def _open(prefix: str, seed: int, *_: int) -> TextToTextStream:
    known, pad = TOKENIZER.fingerprint, TOKENIZER.pad
    return open_text_to_text([prefix], (INPUTS, TARGETS), known, pad, seed, True, "sample")


def test_fine_tuning_equals_one_process(tmp_path: Path) -> None:
    """Inputs and targets, packed, each example with the same weight."""
    assert prepare(tmp_path, TASKS, "text_to_text").counts["used"] == len(TASKS)
    prefix = str(tmp_path / "chats")
    changes = {
        "sft": True,
        "sft_loss_normalisation": "sample",
        "mock_data": False,
        "data_path": [prefix],
        "tokenizer_model": "bytes",
        "vocab_size": TOKENIZER.vocab_size,
        "encoder_num_layers": 1,
        "encoder_seq_length": INPUTS,
        "seq_length": INPUTS + TARGETS,
        "position_embedding_type": "relative",
        "softmax_scale": 1.0,
        "num_query_groups": None,
        "qk_layernorm": False,
        "qk_layernorm_scope": "head",
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None,
    }
    suite = Suite(tmp_path, 2, changes=changes, samples=partial(_open, prefix))
    assert not suite.differences("dropless", ("ep2", "pp2"))
