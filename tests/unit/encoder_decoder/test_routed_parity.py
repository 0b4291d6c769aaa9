"""Routed layers against HuggingFace's Switch model and NLLB-MoE's top-2 router.

Switch 5.24 counts capacity in each sequence and hands on raw logits; transformers 5.0 to 5.17
dropped no token (transformers#48293). Its jitter also changes what experts read: it is off here.
NLLB-MoE 5.24 has a right router, but gives its experts a one-hot of a one-hot: only the router is
compared. Its losses are not compared either.
"""

from collections.abc import Iterator

import pytest
import torch
import transformers
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

from moetron.moe.convert.families.encoder_decoders import SWITCH
from moetron.moe.routing.router import Router
from tests.parallel.support.harness import model_parallel
from tests.unit.encoder_decoder.stack_cases import (
    DECODER,
    ENCODER,
    EXPERTS,
    MODEL,
    assert_same_gradients,
    converted,
    stack_batch,
    stack_model,
    stack_settings,
    switch,
)

SLOTS = 4
ROUTED = {
    "num_experts": EXPERTS,
    "moe_layer_freq": 2,
    "moe_layer_position": "last",
    "moe_router_topk": 1,
    "moe_router_pre_softmax": True,
    "moe_aux_loss_coeff": 0.0,
    "moe_capacity_scope": "sequence",
    "moe_token_drop_policy": "position",
    "moe_capacity_includes_topk": False,
    "moe_encoder_capacity_factor": SLOTS * EXPERTS / ENCODER,
    "moe_expert_capacity_factor": SLOTS * EXPERTS / DECODER,
}
"""As many slots in each sequence of both stacks."""


@pytest.fixture(autouse=True)
def _parallel_state() -> Iterator[None]:
    with model_parallel():
        yield


def test_switch_with_dropped_tokens() -> None:
    theirs = switch(expert_capacity=SLOTS)
    settings = stack_settings(
        {"num_layers": 6, "ffn_type": "relu", "untie_embeddings_and_output_weights": False}, ROUTED
    )
    ours = stack_model(settings).train()
    loaded = ours.load_state_dict(converted(SWITCH, settings, theirs.state_dict()), strict=False)
    assert not loaded.unexpected_keys
    kept = {}
    for name, module in ours.named_modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda _, __, out, name=name: kept.update({name: out[1]}))
    batch = stack_batch()
    inputs, targets = batch["tokens"].split([ENCODER, DECODER], dim=1)
    labels = batch["labels"][:, ENCODER:]
    expected = theirs(input_ids=inputs, decoder_input_ids=targets).logits
    logits = ours(batch["tokens"])
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * scale)
    dropped = {name: len(routed) - int(routed.sum()) for name, routed in kept.items()}
    assert len(dropped) == 3
    assert dropped["decoder.layers.1.mlp.router"] >= 2 * (ENCODER - EXPERTS * SLOTS)

    losses = ours(batch["tokens"], labels=batch["labels"], loss_mask=batch["loss_mask"])
    losses.sum().backward()
    torch.nn.functional.cross_entropy(expected.transpose(1, 2), labels, reduction="sum").backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    assert_same_gradients(ours, converted(SWITCH, settings, grads))


def test_top_2_router_of_nllb() -> None:
    tokens, slots, width = 2 * ENCODER, 13, MODEL["hidden_size"]
    config = transformers.NllbMoeConfig(
        d_model=width,
        num_experts=EXPERTS,
        expert_capacity=slots,
        router_bias=False,
        router_dtype="float32",
        second_expert_policy="all",
        normalize_router_prob_before_dropping=True,
        batch_prioritized_routing=False,
    )
    theirs = NllbMoeTop2Router(config).train()
    moe = {
        "num_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_aux_loss_coeff": 0.0,
        "moe_expert_capacity_factor": 2.0,
        "moe_encoder_capacity_factor": slots * EXPERTS / tokens,
        "moe_capacity_includes_topk": False,
        "moe_token_drop_policy": "choice",
    }
    model = stack_model(stack_settings(moe=moe)).train()
    ours = model.decoder.layers[0].mlp.router
    theirs.classifier.weight.data = ours.weight.detach().clone()
    hidden_bSH = torch.randn(2, ENCODER, width, generator=torch.Generator().manual_seed(1))
    _, expected_TE, _ = theirs(hidden_bSH.flatten(0, 1))
    probs_TE, map_TE = ours(hidden_bSH.transpose(0, 1).contiguous())
    by_sample = probs_TE.view(ENCODER, 2, EXPERTS).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(by_sample, expected_TE)
    assert int(map_TE.sum()) < 2 * tokens, "some choices are dropped"
