"""Scores of continuations against the model's own logits, one sequence at a time."""

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from moetron.moe.config.bridge import transformer_config
from moetron.moe.inference.scoring import score
from moetron.moe.layers.build_model import build_model
from tests.parallel.support.harness import model_parallel
from tests.unit.training.training_cases import settings

PAIRS = [([1, 2, 3], [4]), ([5], [6, 7, 8, 9]), (list(range(10, 18)), [1, 2]), ([3], [3])]


def _model() -> GPTModel:
    chosen = settings(
        model={"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8}
        | {"init_method_std": 0.3},
        moe={"num_experts": 4},
    )
    return build_model(chosen, transformer_config(chosen), 40).eval()


def _slowly(model: GPTModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Score token by token, each after as many tokens as the model's 8 positions hold."""
    total, greedy = 0.0, True
    window = [*context, *continuation][-9:]
    first = len(window) - len(continuation)
    for place in range(first, len(window)):
        tokens = torch.tensor([window[:place]])
        with torch.no_grad():
            logits_V = model(tokens, torch.arange(place)[None], None)[0, -1]
        total += float(logits_V.log_softmax(0)[window[place]])
        greedy &= int(logits_V.argmax()) == window[place]
    return total, greedy


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_equal_the_models_logits(batch_size: int) -> None:
    with model_parallel():
        model = _model()
        found = score(model, PAIRS, batch_size)
        for one, (context, continuation) in zip(found, PAIRS, strict=True):
            expected, greedy = _slowly(model, context, continuation)
            assert one.log_likelihood == pytest.approx(expected, abs=1e-4)
            assert one.greedy == greedy


def test_the_most_likely_continuation_is_greedy() -> None:
    with model_parallel():
        model = _model()
        with torch.no_grad():
            logits_V = model(torch.tensor([[1, 2]]), torch.arange(2)[None], None)[0, -1]
        best = int(logits_V.argmax())
        answers = score(model, [([1, 2], [best]), ([1, 2], [(best + 1) % 40])], 2)
    assert [one.greedy for one in answers] == [True, False]
    assert answers[0].log_likelihood > answers[1].log_likelihood
