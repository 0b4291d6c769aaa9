"""Requests of lm-evaluation-harness, answered by a model that predicts the next byte value."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="pip install moetron[eval]")

from moetron.moe.analysis.lm_eval_model import HarnessModel
from moetron.tokenizers.byte_level import ByteTokenizer


class NextByte(torch.nn.Module):
    """Model that predicts byte n + 1 after byte n."""

    max_sequence_length = 16
    bidirectional_prefix = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens_BS: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return 20.0 * torch.nn.functional.one_hot(tokens_BS + 1, 400).float()


def _requests(*arguments: Any) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=one) for one in arguments]


def test_answers() -> None:
    model = HarnessModel(NextByte(), ByteTokenizer(), batch_size=2)
    right, wrong = model.loglikelihood(_requests(("ab", "cd"), ("ab", "dc")), disable_tqdm=True)
    assert right == (pytest.approx(0, abs=1e-5), True)
    assert wrong == (pytest.approx(-40, abs=1e-4), False)
    long = "".join(chr(33 + number) for number in range(40))  # three windows
    (total,) = model.loglikelihood_rolling(_requests((long,)))
    assert total == pytest.approx(-20, abs=1e-4)  # only the first byte is improbable
    texts = model.generate_until(
        _requests(("ab", {"until": ["f"]}), ("0", {"max_gen_toks": 3, "until": []}))
    )
    assert texts == ["cde", "123"]
