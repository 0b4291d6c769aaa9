"""Prompts and scores with the masks of training: models with --bidirectional-prefix."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch.testing import assert_close

from moetron.moe.config.bridge import transformer_config
from moetron.moe.inference.generation import continuation
from moetron.moe.inference.growing_batch import GrowingBatch
from moetron.moe.inference.sampling import Sampling
from moetron.moe.inference.scoring import score
from moetron.moe.layers.attention import SdpaAttention, prefix_mask, shorten_prefix
from moetron.moe.layers.build_model import build_model
from moetron.moe.layers.language_model import LanguageModel
from tests.parallel.support.harness import model_parallel
from tests.unit.training.training_cases import settings

TOKENS = torch.randint(40, (22,), generator=torch.Generator().manual_seed(0)).tolist()
LATENT = {"kv_lora_rank": 8, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8}
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "experts": {"moe": {"num_experts": 4}},
    "latent attention": {"attention": {"multi_latent_attention": True, **LATENT}},
}


def _model(bidirectional: bool = True, **groups: dict[str, Any]) -> LanguageModel:
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
        data={"bidirectional_prefix": bidirectional, "objective": "prefix_lm"},
        precision={"bf16": False},
        **groups,
    )
    return build_model(chosen, transformer_config(chosen), 40).eval()


def _as_in_training(model: LanguageModel, tokens: list[int], prefix: int) -> torch.Tensor:
    """Return the logits [V] after ``tokens``, with the mask of a training step."""
    mask = prefix_mask(torch.tensor([prefix]), len(tokens))
    with torch.no_grad():
        return model(torch.tensor([tokens]), torch.arange(len(tokens))[None], mask)[0, -1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cached", [True, False])
def test_a_prompt_has_the_mask_of_training(kind: str, cached: bool) -> None:
    """The prompt, its continuation, and windows that dropped half of their tokens."""
    with model_parallel():
        model = _model(**{group: dict(fields) for group, fields in KINDS[kind].items()})
        sequence = GrowingBatch(model, cached=cached, prefixes=[8])
        window, prefix = [], 8
        for piece in (TOKENS[:8], *([token] for token in TOKENS[8:15])):
            window += piece
            if len(window) > 12:
                forgotten = len(window) - 6
                window, prefix = window[forgotten:], prefix - forgotten
            found = sequence.extend([piece])[0]
            assert_close(found, _as_in_training(model, window, prefix), atol=1e-5, rtol=0)
        assert prefix == 1  # of the window of tokens 7 to 14: one prompt token


def test_a_long_prompt_keeps_its_end() -> None:
    with model_parallel():
        model = _model()
        for cached in (True, False):
            found = GrowingBatch(model, cached=cached, prefixes=[22]).extend([TOKENS])[0]
            assert_close(found, _as_in_training(model, TOKENS[-6:], 6), atol=1e-5, rtol=0)


def test_a_prompt_of_one_token_is_causal() -> None:
    with model_parallel():
        model, plain = _model(), _model(bidirectional=False)
        plain.load_state_dict(model.state_dict())
        for cached in (True, False):
            for seen in (model, plain):
                given = GrowingBatch(seen, cached=cached, prefixes=[int(seen is model)])
                for token in TOKENS[:4]:
                    logits_V = given.extend([[token]])[0]
                expected = _as_in_training(model, TOKENS[:4], 0)
                assert_close(logits_V, expected, atol=1e-5, rtol=0)


def test_continuation_with_and_without_a_bidirectional_prompt() -> None:
    """Greedy text with both masks, against logits of the full sequence."""
    with model_parallel():
        model = _model()
        for both_ways in (True, False):
            following = continuation(
                model, TOKENS[:6], 40, Sampling(temperature=0), reads_prefix=both_ways
            )
            text = [next(following) for _ in range(5)]
            expected = list(TOKENS[:6])
            for _ in range(5):
                logits_V = _as_in_training(model, expected, 6 if both_ways else 0)
                expected.append(int(logits_V[:40].argmax()))
            assert text == expected[6:]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_have_the_mask_of_training(batch_size: int) -> None:
    pairs = [(TOKENS[:5], TOKENS[5:8]), (TOKENS[:1], TOKENS[1:9]), (TOKENS[:15], TOKENS[15:18])]
    with model_parallel():
        model = _model()
        for both_ways in (True, False):
            found = score(model, pairs, batch_size, both_ways)
            for one, (context, target) in zip(found, pairs, strict=True):
                full = [*context, *target][-13:]
                prefix = len(full) - len(target) if both_ways else 0
                total = 0.0
                for place in range(len(full) - len(target), len(full)):
                    logits_V = _as_in_training(model, full[:place], prefix)
                    total += float(logits_V.log_softmax(0)[full[place]])
                assert one.log_likelihood == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_transformer_engine_attention_gets_its_masks(
    cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake with its rule: `arbitrary` needs a mask of [queries, keys], `no_mask` reads none.

    specs.py gives `arbitrary` to these models; with a cache megatron-core gives `no_mask` to single
    tokens.
    """
    plain, kinds = SdpaAttention.forward, []

    def forward(self: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        kinds.append(more["attn_mask_type"])
        if kinds[-1] == AttnMaskType.no_mask:
            assert len(query) == 1
            return plain(self, query, key, value, None, **more)
        assert kinds[-1] == AttnMaskType.arbitrary
        assert mask is not None and mask.shape[2:] == (len(query), len(key))
        return plain(self, query, key, value, mask, **more)

    with model_parallel():
        model = _model()
        expected = [_as_in_training(model, TOKENS[: 4 + n], 4) for n in range(3)]
        scored = score(model, [(TOKENS[:3], TOKENS[3:6])], 1, True)[0]
        for layer in model.decoder.layers:
            layer.self_attention.attn_mask_type = AttnMaskType.arbitrary
        monkeypatch.setattr(SdpaAttention, "forward", forward)
        sequence = GrowingBatch(model, cached=cached, prefixes=[4])
        pieces = (TOKENS[:4], TOKENS[4:5], TOKENS[5:6])
        found = [sequence.extend([piece])[0] for piece in pieces]
        assert score(model, [(TOKENS[:3], TOKENS[3:6])], 1, True)[0] == scored
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, atol=1e-5, rtol=0)
    assert (AttnMaskType.no_mask in kinds) == cached


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_shorten_prefix(ahead: int) -> None:
    prefixes = torch.arange(9)
    expected = prefix_mask((prefixes - ahead).clamp(min=0), 8)
    assert torch.equal(shorten_prefix(prefix_mask(prefixes, 8), ahead), expected)


def test_modules_of_multi_token_prediction_do_not_see_their_labels() -> None:
    """Module n predicts token i + n + 1 at i from tokens up to i + n only."""
    prefix, length, depth = 5, 12, 2
    with model_parallel():
        model = _model(model={"mtp_num_layers": depth}, moe={"num_experts": 4})
        states: dict[int, list[torch.Tensor]] = {1: [], 2: []}
        for layer in model.mtp.layers:
            number = layer.layer_number
            layer.register_forward_hook(lambda _, __, out, n=number: states[n].append(out[0]))
        mask = prefix_mask(torch.tensor([prefix]), length)
        for changed in range(prefix, length):  # one target token differs from the first pass
            for tokens in (TOKENS[:length], [*TOKENS[:changed], 39, *TOKENS[changed + 1 : length]]):
                ids = torch.tensor([tokens])
                with torch.no_grad():
                    model(ids, torch.arange(length)[None], mask, labels=ids.roll(-1))
            for number, found in states.items():
                first, second = found[-2:]  # [s, b, H]
                before = changed - number
                assert_close(first[:before], second[:before], atol=1e-6, rtol=0)
                assert not torch.allclose(first[before:], second[before:], atol=1e-6)
