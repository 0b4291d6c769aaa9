"""Routing of the stacks on samples whose routing is known."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moetron.data.stream.mock_spans import MockSpans
from moetron.moe.analysis.page.build_page import write_page
from moetron.moe.analysis.page.runs import Run
from moetron.moe.analysis.page.stack_answers import stack_routing
from moetron.moe.analysis.stack_study import Vocabulary, entropy_table, study_stacks
from moetron.moe.training.batches import micro_batches
from tests.parallel.support.harness import model_parallel
from tests.unit.encoder_decoder.stack_cases import VOCABULARY, stack_model, stack_settings

EXPERTS = 4
ENCODER, LENGTH = 24, 24 + 10


def _show(token: int) -> str:
    return f"<extra_id_{token}>" if token > VOCABULARY // 2 else "word"


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """Of a model whose encoder reads sentinels with expert 2 and the rest with expert 1."""
    moe = {"num_experts": EXPERTS, "moe_layer_freq": [1, 0, 0, 1, 0], "moe_router_topk": 1}
    settings = stack_settings(moe={**moe, "moe_router_pre_softmax": True})
    with model_parallel():
        model = stack_model(settings).eval()
        with torch.no_grad():
            # The residual stream is the embedding alone where attention adds nothing.
            model.decoder.layers[0].self_attention.linear_proj.weight.zero_()
            table = model.embedding.word_embeddings.weight.fill_(0.01)
            table[:, 0], table[VOCABULARY // 2 + 1 :, 0] = -1.0, 1.0
            router = model.decoder.layers[0].mlp.router.weight.zero_()
            router[1, 0], router[2, 0] = -1.0, 1.0
        stream = MockSpans(3, VOCABULARY, LENGTH, ENCODER)
        batches = list(micro_batches(stream, LENGTH, [[0, 1], [2, 3]]))
        classes = {"sentinels": r"<extra_id_\d+>", "words": "word"}
        found = study_stacks(model, settings, batches, Vocabulary(VOCABULARY, _show, classes))
    return found


def test_classes_are_routed_as_built(result: dict[str, Any]) -> None:
    encoder, decoder = (result["stacks"][stack] for stack in ("encoder", "decoder"))
    assert (encoder["layers"], decoder["layers"]) == ([0], [3])
    sentinels, words, other = encoder["token_classes"]["tokens"]
    assert (encoder["tokens"], other) == (4 * ENCODER, 0)
    assert encoder["token_classes"]["entropy"] == [[0.0, 0.0, 0.0]]
    share = sentinels / (sentinels + words)
    mixed = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert encoder["entropy"] == [pytest.approx(mixed)]
    best = encoder["sentinel_experts"][0][0]
    assert (best["expert"], best["share"]) == (2, 1.0)
    assert best["share_of_all"] == pytest.approx(share)
    assert encoder["load"][0] == pytest.approx([0.0, EXPERTS * (1 - share), EXPERTS * share, 0.0])
    assert decoder["tokens"] < 4 * (LENGTH - ENCODER), "padding does not count"


def test_table_and_report(result: dict[str, Any], tmp_path: Path) -> None:
    table = entropy_table(result)
    assert "sentinels" in table
    assert f"{math.log(EXPERTS):.2f}" in table
    row = {"step": 1, "tokens": 10, "lm_loss": 1.0, "grad_norm": 1.0, "lr": 1e-3}
    row |= {"step_time_s": 1.0, "tokens_per_s": 1.0, "tflops_per_s": 1.0, "loss_tokens": 5}
    run = Run("runs/one", [row], [], {}, [], result)
    first, *others = stack_routing(run)
    assert "encoder 0.00 nats for sentinels" in first.text
    assert "expert 2 (100 %" in others[0].text
    write_page([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Which experts of the encoder read sentinels?" in page
    assert "Entropy of the choices of each stack&#39;s layers" in page
    cells = re.findall(r"<td>encoder</td><td>sentinels</td><td>(.*?)</td>", page)
    assert [abs(float(cell)) for cell in cells] == [0.0]
    assert "Words of the sentinel experts of encoder layer 0" in page
