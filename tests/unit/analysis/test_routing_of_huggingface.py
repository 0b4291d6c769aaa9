"""Routing of a HuggingFace model: reported choices are those of its routers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moetron.common.errors import UserError
from moetron.moe.analysis.hf_model import HuggingFaceModel

transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")


def test_choices_are_those_of_the_routers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=6,
        num_experts_per_tok=3,
        initializer_range=0.5,
    )
    transformers.OlmoeForCausalLM(config).save_pretrained(tmp_path)
    model = HuggingFaceModel(tmp_path)
    chosen = []
    for layer in model._model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: chosen.append(output[2]))
    tokens = np.random.default_rng(0).integers(0, 50, (2, 10))
    routed = model.route(tokens)
    assert model.layers == [0, 1] and (model.num_experts, model.topk) == (6, 3)
    expected = torch.stack(chosen).sort(-1).values.numpy()
    np.testing.assert_array_equal(np.sort(routed.ranked_LTK, axis=2), expected)
    np.testing.assert_array_equal(routed.kept_LTE, routed.chosen_LTE())
    assert [rows.shape for rows in model.weights()[0]] == [(6, 16), (6, 3 * 16 * 8)]


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not return router logits"):
        HuggingFaceModel(tmp_path)
