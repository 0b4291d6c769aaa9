"""Packed examples equal the same examples in samples of their own."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils._python_dispatch import TorchDispatchMode

from moetron.data.objectives.span_corruption import SpanCorruption
from moetron.moe.config.schema.settings import Settings
from moetron.moe.encoder_decoder import segments as module
from moetron.moe.encoder_decoder.segments import runs, segments_of
from moetron.moe.encoder_decoder.stack_attention import StackAttention
from tests.parallel.support.harness import model_parallel
from tests.unit.encoder_decoder.stack_cases import DECODER, ENCODER, stack_batch, stack_model
from tests.unit.encoder_decoder.stack_cases import stack_settings as settings_of
from tests.unit.training.host_reads import HostReads

ROUTED = {"num_experts": 4, "moe_layer_freq": [0, 1, 1, 0, 1], "moe_aux_loss_coeff": 0.0}


@pytest.fixture(autouse=True)
def _parallel_state() -> Iterator[None]:
    with model_parallel():
        yield


def _alone(settings: Settings, inputs: int, targets: int) -> Settings:
    model = settings.model.model_copy(update={"seq_length": inputs + targets})
    data = settings.data.model_copy(update={"encoder_seq_length": inputs})
    return settings.model_copy(update={"model": model, "data": data})


def test_packed_equals_unpacked() -> None:
    """Losses and every gradient, of dropless experts too."""
    settings = settings_of(moe=ROUTED)
    packed = stack_model(settings).train()
    batch = stack_batch()
    segments = torch.zeros_like(batch["tokens"])
    places = {1: ((0, 9), (0, 4)), 2: ((9, 21), (5, 10))}  # in encoder and decoder
    for example, ((first, end), (start, stop)) in places.items():
        segments[:, first:end] = example
        segments[:, ENCODER + start : ENCODER + stop] = example
    mask = (segments > 0) * batch["loss_mask"]
    losses = packed(batch["tokens"], labels=batch["labels"], loss_mask=mask, segments=segments)
    (losses * mask).sum().backward()
    total = torch.zeros(())
    gradients: dict[str, torch.Tensor] = {}
    for (first, end), (start, stop) in places.values():
        alone = stack_model(_alone(settings, end - first, stop - start)).train()
        alone.load_state_dict(packed.state_dict())
        own = {
            name: torch.cat([x[:, first:end], x[:, ENCODER + start : ENCODER + stop]], dim=1)
            for name, x in batch.items()
        }
        loss = alone(own["tokens"], labels=own["labels"], loss_mask=own["loss_mask"]).sum()
        loss.backward()
        total = total + loss.detach()
        for name, parameter in alone.named_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad
    assert float((losses * mask).sum().detach()) == pytest.approx(float(total), rel=1e-6)
    for name, parameter in packed.named_parameters():
        scale = float(gradients[name].abs().max())
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=0, atol=2e-6 * scale, msg=name
        )


def test_span_corruptions_segments_are_read() -> None:
    """--examples-per-sample 2: no token of one text changes a logit of the other."""
    objective = SpanCorruption(ENCODER + DECODER, ENCODER, range(47, 40, -1), 1, 0, examples=2)
    (raw,) = objective.windowing.advances
    row, mask = torch.zeros(ENCODER + DECODER + 1, dtype=torch.long), torch.ones(ENCODER + DECODER)
    made = objective.fill(torch.arange(2, 2 + raw).numpy(), 0, "key", row.numpy(), mask.numpy())
    ids = torch.from_numpy(made.segments)[None]
    model = stack_model(settings_of()).eval()
    tokens = row[None, :-1]
    before = model(tokens, segments=ids)
    tokens = tokens.clone()
    tokens[ids == 2] = 3
    after = model(tokens, segments=ids)
    first = (ids == 1)[:, ENCODER:]
    assert torch.equal(before[first], after[first])
    second = (ids == 2)[:, ENCODER:]
    assert not torch.equal(before[second], after[second])


def test_runs_and_uniform_samples() -> None:
    assert runs([[1, 1, 2, 0], [0, 1, 1, 1]]) == {
        (0, 1): (0, 0, 2),
        (0, 2): (0, 2, 1),
        (1, 1): (1, 1, 3),
    }
    with pytest.raises(ValueError, match="two pieces"):
        runs([[1, 2, 1]])
    assert segments_of(torch.ones(2, 5, dtype=torch.long), {"encoder": 3, "decoder": 2}) is None


def test_ids_are_read_once_and_pairs_sent_once() -> None:
    """Examples of many lengths; the meta device stands for a GPU."""
    ids = torch.tensor([[1, 1, 1, 2, 2, 0, 1, 2, 2], [1, 2, 3, 3, 3, 3, 1, 2, 3]])
    with HostReads() as reads:
        found = segments_of(ids, {"encoder": 6, "decoder": 3})
    assert found is not None
    assert [place.rsplit(": ")[-1] for place in reads.found.elements()] == ["cpu"]
    assert sum(map(len, found.pairs.values())) > 6
    meta = torch.device("meta")
    with HostReads() as reads:
        sent = module._sent(found.pairs, meta)
    assert not reads.found
    for name, pairs in found.pairs.items():
        for here, there in zip(pairs, sent[name], strict=True):
            shapes = there.query_NQ.shape, there.key_NK.shape
            assert shapes == (here.query_NQ.shape, here.key_NK.shape)
            assert there.query_NQ.device == there.key_NK.device == meta


class _Calls(TorchDispatchMode):
    """Counts operations of torch by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_examples_of_many_lengths_are_gathered_together() -> None:
    """A gather of each would have a gradient of the full size, and on a GPU a sort of its own."""
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, attention_dropout=0.0
    )
    attention = StackAttention(config, 1, AttnMaskType.padding, "self")
    row = torch.arange(1, 7).repeat_interleave(torch.arange(1, 7))  # 1 token to 6 tokens
    found = segments_of(torch.cat([row, row])[None], {"encoder": 21, "decoder": 21})
    assert found is not None and len(found.pairs["encoder"]) == 6
    qkv = [torch.randn(21, 1, 2, 8, requires_grad=True) for _ in range(3)]
    with _Calls() as calls:
        attention(*qkv, found.pairs["encoder"]).sum().backward()
    gathers = {name: n for name, n in calls.found.items() if "index" in name}
    assert sum(n for name, n in gathers.items() if name != "aten::index_copy") <= 9, gathers
