"""Answers of an encoder-decoder equal transformers' T5 `generate`, batched or not."""

from collections.abc import Iterator

import pytest
import torch

from moetron.moe.convert.families.encoder_decoders import SWITCH, T5
from moetron.moe.encoder_decoder.encoded_batch import EncodedBatch
from moetron.moe.layers.language_model import LanguageModel
from tests.parallel.support.harness import model_parallel
from tests.unit.encoder_decoder.stack_cases import (
    converted,
    stack_model,
    stack_settings,
    switch,
    t5,
)

START, END, LIMIT = 0, 1, 9
INPUTS = [[5, 9, 30, 2, END], [7, END], [11, 12, 13, 14, 15, 16, 17, 18, END]]


@pytest.fixture(autouse=True)
def _parallel_state() -> Iterator[None]:
    with model_parallel():
        yield


def greedy(model: LanguageModel, inputs: list[list[int]]) -> list[list[int]]:
    """Return all answers; rows that have ended leave the batch."""
    batch, alive = EncodedBatch(model, START), list(range(len(inputs)))
    answers: list[list[int]] = [[] for _ in inputs]
    new = inputs
    for _ in range(LIMIT):
        chosen = batch.extend(new).argmax(-1).tolist()
        for number, token in zip(alive, chosen, strict=True):
            answers[number].append(token)
        kept = [place for place, token in enumerate(chosen) if token != END]
        if not kept:
            break
        batch.keep(kept)
        alive, new = [alive[place] for place in kept], [[chosen[place]] for place in kept]
    return answers


@pytest.mark.parametrize("name", ["t5", "t5 tied", "switch"])
def test_answers_are_those_of_transformers(name: str) -> None:
    tied = name != "t5"
    routed = name == "switch"
    theirs = (switch(expert_capacity=64) if routed else t5(tied)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # else a tied model repeats one token
            parameter.add_(torch.randn_like(parameter) * 0.5)
    moe = {
        "num_experts": 4,
        "moe_layer_freq": 2,
        "moe_layer_position": "last",
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
    }
    settings = stack_settings(
        {
            "untie_embeddings_and_output_weights": not tied,
            **({"num_layers": 6, "ffn_type": "relu"} if routed else {}),
        },
        moe if routed else {},
    )
    ours = stack_model(settings).eval()
    family = SWITCH if routed else T5
    ours.load_state_dict(converted(family, settings, theirs.state_dict()), strict=False)

    longest = max(map(len, INPUTS))
    padded = torch.tensor([row + [START] * (longest - len(row)) for row in INPUTS])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in INPUTS])
    expected = theirs.generate(
        padded,
        attention_mask=mask,
        decoder_start_token_id=START,
        eos_token_id=END,
        pad_token_id=START,
        max_new_tokens=LIMIT,
        do_sample=False,
        use_cache=False,  # transformers' cache has the encoder's number of layers
    )
    found = greedy(ours, INPUTS)
    for answer, row in zip(found, expected[:, 1:].tolist(), strict=True):
        assert answer == row[: len(answer)]
        assert answer[-1] == END or len(answer) == LIMIT
    assert len(set(map(tuple, found))) == len(INPUTS)
    assert any(len(set(answer)) > 2 for answer in found)
    assert [greedy(ours, [row])[0] for row in INPUTS] == found


def test_a_row_ends_and_leaves_the_others() -> None:
    model = stack_model(stack_settings()).eval()
    batch = EncodedBatch(model, START)
    together = batch.extend(INPUTS)
    batch.keep([0, 2])
    logits = batch.extend([[3], [4]])
    alone = EncodedBatch(model, START)
    torch.testing.assert_close(alone.extend([INPUTS[2]])[0], together[2])
    torch.testing.assert_close(alone.extend([[4]])[0], logits[1])
