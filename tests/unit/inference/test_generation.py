"""Generation: sampling and the cache."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from moetron.moe.config.bridge import transformer_config
from moetron.moe.inference.generation import continuation, dropless, load_model
from moetron.moe.inference.growing_batch import GrowingBatch
from moetron.moe.inference.next_token import draw
from moetron.moe.inference.sampling import Sampling
from moetron.moe.layers.build_model import build_model
from moetron.moe.layers.language_model import LanguageModel
from moetron.moe.routing.router_types import KINDS
from tests.parallel.support import checkpoint_runs
from tests.parallel.support.harness import model_parallel
from tests.unit.training.training_cases import settings

LOGITS = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()


def _shares(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature, top_k, top_p)
    draws = Counter(draw(LOGITS, sampling, generator) for _ in range(4000))
    return {token: count / 4000 for token, count in draws.items()}


def test_zero_temperature_is_greedy() -> None:
    assert _shares(temperature=0) == {1: 1.0}


def test_draws_follow_the_probabilities() -> None:
    assert _shares() == pytest.approx({0: 0.1, 1: 0.5, 2: 0.15, 3: 0.25}, abs=0.03)


def test_temperature_sharpens() -> None:
    """At temperature 1/2 probabilities are squared: 0.01, 0.25, 0.0225, 0.0625 of 0.345."""
    expected = {0: 0.01 / 0.345, 1: 0.25 / 0.345, 2: 0.0225 / 0.345, 3: 0.0625 / 0.345}
    assert _shares(temperature=0.5) == pytest.approx(expected, abs=0.03)


def test_top_k_keeps_k_tokens() -> None:
    assert _shares(top_k=2) == pytest.approx({1: 2 / 3, 3: 1 / 3}, abs=0.03)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, {1}), (0.5, {1}), (0.51, {1, 3}), (0.76, {1, 3, 2})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    assert _shares(top_p=top_p).keys() == kept


def _model(**groups: dict[str, Any]) -> LanguageModel:
    chosen = settings(
        model={
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "seq_length": 12,
            "init_method_std": 0.2,
            "norm_epsilon": 1e-6,
            **groups.pop("model", {}),
        },
        **groups,
    )
    chosen = dropless(chosen)
    return build_model(chosen, transformer_config(chosen), 40).eval()


LATENT = {"kv_lora_rank": 8, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8}


@pytest.mark.parametrize(
    "groups",
    [
        {"moe": {"num_experts": 4}},
        {"model": {"num_query_groups": 2, "qk_layernorm": True, "qk_layernorm_scope": "full"}},
        {"attention": {"multi_latent_attention": True, **LATENT}},
    ],
    ids=["experts", "full-width-norm", "latent-attention"],
)
def test_a_cache_changes_no_logits(groups: dict[str, Any]) -> None:
    """With a prompt, single tokens, the end of the window, and a second longer piece."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(40, (22,), generator=generator).tolist()
    pieces = [tokens[:5], *([token] for token in tokens[5:18]), tokens[18:21], tokens[21:]]
    with model_parallel():
        model = _model(**groups)
        cached, plain = GrowingBatch(model), GrowingBatch(model, cached=False)
        for piece in pieces:
            assert_close(cached.extend([piece]), plain.extend([piece]), atol=1e-5, rtol=0)


LIMITED: dict[str, dict[str, Any]] = {
    "topk": {},
    "sigmoid and bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn"},
    **{
        kind: {"moe_router_type": kind}
        for kind in KINDS
        if kind not in ("topk", "expert_choice", "base")
    },
    "expert_choice": {"moe_router_type": "expert_choice", "moe_router_pre_softmax": True},
    "base": {
        "moe_router_type": "base",
        "moe_router_topk": 1,
        "moe_router_score_function": "sigmoid",
    },
}


@pytest.mark.parametrize("policy", ["probs", "position", "choice", "batch_prioritized"])
@pytest.mark.parametrize("router", LIMITED)
def test_a_cache_changes_no_logits_of_a_model_with_a_capacity(router: str, policy: str) -> None:
    """Slots of training batches (none for a single token, by this rule) do not apply here."""
    moe = {
        "num_experts": 8,
        "moe_expert_capacity_factor": 1.25,
        "moe_eval_capacity_factor": 0.5,
        "moe_capacity_includes_topk": False,
        "moe_pad_expert_input_to_capacity": True,
        "moe_token_drop_policy": policy,
        **LIMITED[router],
    }
    tokens = torch.randint(40, (19,), generator=torch.Generator().manual_seed(1)).tolist()
    pieces = [tokens[:1], tokens[1:8], *([token] for token in tokens[8:14]), tokens[14:17]]
    with model_parallel():
        model = _model(moe=moe)
        cached, plain = GrowingBatch(model), GrowingBatch(model, cached=False)
        for piece in pieces:
            assert_close(cached.extend([piece]), plain.extend([piece]), atol=1e-5, rtol=0)


def test_a_cache_computes_only_new_tokens() -> None:
    lengths = []
    with model_parallel():
        model = _model()
        model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].size(1)))
        following = continuation(model, [1, 2, 3], 40, Sampling())
        tokens = [next(following) for _ in range(12)]
    assert len(set(tokens)) > 1
    assert lengths == [3] + [1] * 9 + [6, 1]  # the window is twelve tokens: half of it is kept


def test_the_same_seed_gives_the_same_text() -> None:
    with model_parallel():
        model = _model()

        def text(seed: int, cached: bool = True) -> list[int]:
            following = continuation(model, [1], 40, Sampling(seed=seed), cached)
            return [next(following) for _ in range(8)]

        assert text(1) == text(1) == text(1, cached=False) != text(2)


def test_a_model_with_multi_token_prediction_generates_the_next_token(
    tmp_path: Path,
) -> None:
    chosen = checkpoint_runs.settings(
        "dp",
        model={"mtp_num_layers": 1},
        training={"train_iters": 1},
        checkpoint={"save": str(tmp_path)},
    )
    tokens = torch.randint(checkpoint_runs.VOCABULARY, (1, 9))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(8)[None]
    with checkpoint_runs.parallel_of(chosen):
        loop = checkpoint_runs.start(chosen)
        loop.run(lambda: False)
        model = load_model(tmp_path, chosen, checkpoint_runs.VOCABULARY, loop.trainer.runtime)
        with torch.no_grad():
            trained = loop.trainer.chunks[0].eval()(inputs, positions, None, labels=labels)
            plain = model(inputs, positions, None, labels=labels)
        assert_close(plain, trained, atol=1e-6, rtol=0)
        assert next(continuation(model, [1], checkpoint_runs.VOCABULARY, Sampling())) >= 0
