"""The dense encoder-decoder against HuggingFace's T5 1.1, in logits, losses and gradients."""

from collections.abc import Iterator

import pytest
import torch
import transformers

from tests.parallel.support.harness import model_parallel
from tests.unit.encoder_decoder.stack_cases import (
    ENCODER,
    HEADS,
    MODEL,
    VOCABULARY,
    WIDTH,
    assert_same_gradients,
    from_t5,
    stack_batch,
    stack_model,
    stack_settings,
)


@pytest.fixture(autouse=True)
def _parallel_state() -> Iterator[None]:
    with model_parallel():
        yield


def _theirs(tied: bool) -> transformers.T5ForConditionalGeneration:
    torch.manual_seed(3)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=MODEL["hidden_size"],
        d_kv=WIDTH,
        d_ff=MODEL["ffn_hidden_size"],
        num_layers=2,
        num_decoder_layers=3,
        num_heads=HEADS,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=MODEL["relative_attention_max_distance"],
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=tied,  # False: logits of T5 1.1, not scaled
    )
    config.tie_word_embeddings = tied  # transformers 5 ties all the same, or nothing
    model = transformers.T5ForConditionalGeneration(config).train()
    for stack in (model.encoder, model.decoder):
        stack.set_input_embeddings(model.shared)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize(("padded", "tied"), [(False, False), (True, False), (False, True)])
def test_dense_t5(padded: bool, tied: bool) -> None:
    theirs = _theirs(tied)
    ours = stack_model(stack_settings({"untie_embeddings_and_output_weights": not tied})).train()
    missing = ours.load_state_dict(from_t5(theirs.state_dict(), 2, 5), strict=False)
    assert not missing.unexpected_keys or tied
    batch = stack_batch()
    segments = torch.ones_like(batch["tokens"])
    if padded:
        segments[1, ENCODER - 7 : ENCODER] = 0
        segments[1, -3:] = 0
    inputs, targets = batch["tokens"].split([ENCODER, 10], dim=1)
    labels = batch["labels"][:, ENCODER:]
    expected = theirs(
        input_ids=inputs, attention_mask=segments[:, :ENCODER], decoder_input_ids=targets
    ).logits
    real = segments[:, ENCODER:] == 1
    logits = ours(batch["tokens"], segments=segments)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5 * scale)

    mask = batch["loss_mask"] * segments
    losses = ours(batch["tokens"], labels=batch["labels"], loss_mask=mask, segments=segments)
    assert not losses[:, :ENCODER].any()
    their_losses = torch.nn.functional.cross_entropy(
        expected.transpose(1, 2), labels, reduction="none"
    )
    found, wanted = (losses * mask).sum(), (their_losses * real).sum()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    found.backward()
    wanted.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    assert_same_gradients(ours, from_t5(grads, 2, 5))
