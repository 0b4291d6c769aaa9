"""Rows of several lengths in one batch, against each row alone."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from moetron.common.errors import UserError
from moetron.moe.config.bridge import transformer_config
from moetron.moe.inference.batch_generation import LENGTH, Generated, Request, generate_batch
from moetron.moe.inference.generation import dropless
from moetron.moe.inference.growing_batch import GrowingBatch, takes_padding
from moetron.moe.inference.next_token import penalize
from moetron.moe.inference.sampling import Sampling
from moetron.moe.inference.scoring import score
from moetron.moe.layers.build_model import build_model
from moetron.moe.layers.language_model import LanguageModel
from moetron.moe.routing.router import Router
from tests.parallel.support.harness import model_parallel
from tests.unit.training.training_cases import settings

VOCABULARY = 128
"""A multiple of 128: no padding rows, which `score` would count."""
TOKENS = torch.randint(40, (40,), generator=torch.Generator().manual_seed(3)).tolist()
ROWS = [TOKENS[:9], TOKENS[9:11], TOKENS[11:12], TOKENS[12:19]]
"""Prompts; the window is 12 tokens."""
LATENT = {"kv_lora_rank": 8, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8}
LIMITED = {
    "num_experts": 8,
    "moe_expert_capacity_factor": 1.25,
    "moe_eval_capacity_factor": 0.5,
    "moe_capacity_includes_topk": False,
}
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "rope": {"moe": {"num_experts": 4}},
    "no positions": {"model": {"position_embedding_type": "none"}, "moe": {"num_experts": 4}},
    "grouped queries": {"model": {"num_query_groups": 2, "qk_layernorm": True}},
    "latent attention": {"attention": {"multi_latent_attention": True, **LATENT}},
    "position capacity": {"moe": {**LIMITED, "moe_token_drop_policy": "position"}},
    "expert choice": {
        "moe": {
            **LIMITED,
            "moe_router_type": "expert_choice",
            "moe_router_pre_softmax": True,
        }
    },
    "hash": {"moe": {"num_experts": 4, "moe_router_type": "hash"}},
    "prefixes": {"data": {"bidirectional_prefix": True, "objective": "prefix_lm"}},
}


def _model(**groups: dict[str, Any]) -> LanguageModel:
    shape = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "seq_length": 12}
    shape |= {"init_method_std": 0.2, **groups.pop("model", {})}
    chosen = dropless(settings(model=shape, **groups))
    return build_model(chosen, transformer_config(chosen), VOCABULARY).eval()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_logits_that_it_has_alone(kind: str, cached: bool) -> None:
    """With prompts, single tokens, windows that forget at different times, rows that leave."""
    with model_parallel():
        model = _model(**{group: dict(fields) for group, fields in KINDS[kind].items()})
        prefixes = [len(row) if kind == "prefixes" else 0 for row in ROWS]
        batch = GrowingBatch(model, len(ROWS), cached, prefixes)
        alone = [GrowingBatch(model, 1, cached, [prefix]) for prefix in prefixes]
        alive, new = [0, 1, 2, 3], ROWS
        for step in range(12):
            found = batch.extend(new)
            expected = [alone[row].extend([ids])[0] for row, ids in zip(alive, new, strict=True)]
            assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)
            if step in (2, 5):  # first the longest, so that the others are padded too much
                kept = list(range(1, len(alive)))[:: 1 if step == 2 else -1]
                batch.keep(kept)
                alive = [alive[place] for place in kept]
            new = [[TOKENS[(step + 7 * row) % len(TOKENS)]] for row in alive]
        assert alive == [3, 2]


def test_routers_leave_padding_out() -> None:
    counts = []
    with model_parallel():
        model = _model(moe={"num_experts": 4, "moe_router_topk": 2})
        [router, *_] = [each for each in model.modules() if isinstance(each, Router)]
        batch = GrowingBatch(model, len(ROWS))
        for new in (ROWS, [[1]] * len(ROWS)):
            batch.extend(new)
            counts.append(int(router.choices_of_experts().sum()))
    assert counts == [2 * sum(map(len, ROWS)), 2 * len(ROWS)]


def test_a_cache_grows_and_computes_only_new_tokens() -> None:
    lengths: list[int] = []
    with model_parallel():
        model = _model(model={"seq_length": 200})
        batch, plain = GrowingBatch(model, 2), GrowingBatch(model, 2, cached=False)
        model.register_forward_pre_hook(lambda _, given: lengths.append(given[0].size(1)))
        new = [TOKENS[:6], TOKENS[:3]]
        for step in range(70):
            found = batch.extend(new)
            new = [[TOKENS[step % 40]], [TOKENS[(3 * step) % 40]]]
        assert lengths == [6] + [1] * 69  # more than the first 64 positions
        rows = [list(window) for window in batch._windows]
        assert_close(found, plain.extend(rows), atol=1e-5, rtol=0)


def test_attention_that_obeys_no_mask_takes_no_padding() -> None:
    with model_parallel():
        model = _model(model={"attention_backend": "unfused"})
        assert not takes_padding(model)
        batch = GrowingBatch(model, 2)
        batch.extend([TOKENS[:3], TOKENS[3:6]])
        with pytest.raises(AssertionError):
            GrowingBatch(model, 2).extend([TOKENS[:3], TOKENS[3:4]])


def _generate(
    model: LanguageModel,
    rows: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    ends: Sequence[int] = (),
    length: int = 8,
) -> list[Generated]:
    requests = [Request(ids, seed) for ids, seed in zip(rows, seeds, strict=True)]
    finish = lambda _, token: "eos" if token in ends else None  # noqa: E731
    return generate_batch(model, requests, VOCABULARY, sampling, length, finish)


def test_draws_do_not_depend_on_the_batch() -> None:
    with model_parallel():
        model = _model()
        sampling = Sampling(temperature=1.5, repetition_penalty=1.3)
        seeds = [5, 5, 6, 7]
        together = _generate(model, ROWS, seeds, sampling)
        backwards = _generate(model, ROWS[::-1], seeds[::-1], sampling)[::-1]
        alone = [
            _generate(model, [ids], [seed], sampling)[0]
            for ids, seed in zip(ROWS, seeds, strict=True)
        ]
        tokens = [row.tokens for row in together]
        assert tokens == [row.tokens for row in backwards] == [row.tokens for row in alone]
        same = [row.tokens for row in _generate(model, [ROWS[0]] * 3, [5, 8, 5], sampling)]
        assert same[0] == same[2] == tokens[0] != same[1]


def test_a_row_ends_by_itself_and_leaves_the_batch() -> None:
    widths: list[int] = []
    with model_parallel():
        model = _model()
        greedy = Sampling(temperature=0)
        free = _generate(model, ROWS, [0] * 4, greedy, length=6)
        assert all(len(row.tokens) == 6 and row.finish_reason == LENGTH for row in free)
        end = free[1].tokens[2]
        hook = model.register_forward_pre_hook(lambda _, given: widths.append(len(given[0])))
        ended = _generate(model, ROWS, [0] * 4, greedy, [end], length=6)
        hook.remove()
        for row, full in zip(ended, free, strict=True):
            cut = full.tokens.index(end) + 1 if end in full.tokens else 6
            assert row.tokens == full.tokens[:cut]
            assert row.finish_reason == ("eos" if end in full.tokens else LENGTH)
        alive = [sum(len(row.tokens) > step for row in ended) for step in range(6)]
        assert widths == [count for count in alive if count]
        assert len(ended[1].tokens) <= 3


def test_log_probabilities_are_the_models_own() -> None:
    """Not those of the tempered, penalised and cut distribution that tokens are drawn from."""
    with model_parallel():
        model = _model()
        sampling = Sampling(temperature=0.7, top_k=5, repetition_penalty=1.4)
        rows = [row[:4] for row in ROWS]
        found = _generate(model, rows, [1, 2, 3, 4], sampling, length=7)
        pairs = [(ids, one.tokens) for ids, one in zip(rows, found, strict=True)]
        for one, expected in zip(found, score(model, pairs, 4), strict=True):
            assert one.log_probability == pytest.approx(expected.log_likelihood, abs=1e-4)


def test_the_repetition_penalty_is_huggingfaces() -> None:
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    for penalty in (0.5, 1.0, 1.7):
        theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)
        for _ in range(5):
            logits_V = torch.randn(VOCABULARY, generator=generator)
            ids = torch.randint(VOCABULARY, (9,), generator=generator)
            seen_V = torch.zeros(VOCABULARY, dtype=torch.bool)
            seen_V[ids] = True
            expected = theirs(ids[None], logits_V[None].clone())[0]
            assert torch.equal(penalize(logits_V, seen_V, penalty), expected)


def test_the_penalty_counts_prompt_and_answer() -> None:
    with model_parallel():
        model = _model(model={"init_method_std": 0.5})
        changed = 0
        for first in range(20):
            prompt = TOKENS[first : first + 8]
            sampling = Sampling(temperature=0, repetition_penalty=3.0)
            [found] = _generate(model, [prompt], [0], sampling, length=3)
            for count, token in enumerate(found.tokens):
                ids = [*prompt, *found.tokens[:count]]
                logits_V = GrowingBatch(model).extend([ids])[0]
                seen_V = torch.zeros(VOCABULARY, dtype=torch.bool)
                seen_V[ids] = True
                assert token == int(penalize(logits_V, seen_V, 3.0).argmax())
                changed += token != int(logits_V.argmax())
        assert changed


def test_a_penalty_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"--temperature -1.*\n--repetition-penalty 0"):
        Sampling(temperature=-1, repetition_penalty=0)
