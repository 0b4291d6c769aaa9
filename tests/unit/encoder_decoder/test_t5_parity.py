"""The dense encoder-decoder against HuggingFace's T5 1.1, in logits, losses and gradients."""

from collections.abc import Iterator

import pytest
import torch

from moetron.moe.convert.families.encoder_decoders import T5
from tests.parallel.support.harness import model_parallel
from tests.unit.encoder_decoder.stack_cases import (
    ENCODER,
    assert_same_gradients,
    converted,
    stack_batch,
    stack_model,
    stack_settings,
    t5,
)


@pytest.fixture(autouse=True)
def _parallel_state() -> Iterator[None]:
    with model_parallel():
        yield


@pytest.mark.parametrize(("padded", "tied"), [(False, False), (True, False), (False, True)])
def test_dense_t5(padded: bool, tied: bool) -> None:
    theirs = t5(tied)
    settings = stack_settings({"untie_embeddings_and_output_weights": not tied})
    ours = stack_model(settings).train()
    loaded = ours.load_state_dict(converted(T5, settings, theirs.state_dict()), strict=False)
    assert not loaded.unexpected_keys
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
    assert_same_gradients(ours, converted(T5, settings, grads))
