"""transformers' OlmoeForCausalLM, trained by a plain loop with the optimizer states of ours."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings
from moetron.moe.host.device import resolve_device
from tests.bench.gpu.opponents import device_batches, learning_rates

DIFFERENCES = (
    "transformers: OlmoeForCausalLM in bf16, experts grouped_mm, attention sdpa. Gradients "
    "accumulate in bf16, as in its Trainer (ours: in fp32). They are copied to fp32 and clipped; "
    "torch's fused AdamW moves fp32 weights with fp32 moments, which are copied back to bf16."
)
_AUX_LOSS_COEFF = 0.01


class TransformersProgram:
    """The model, fp32 copies of its parameters, and AdamW on them."""

    def __init__(
        self, settings: Settings, device: torch.device, options: Mapping[str, Any]
    ) -> None:
        self._settings = settings
        self._micro_batches = settings.training.global_batch_size
        self._micro_batches //= settings.training.micro_batch_size
        self._model = build(settings, device, options)
        self._weights = list(self._model.parameters())
        self.parameters = sum(weight.numel() for weight in self._weights)
        self._mains = [weight.detach().clone().float() for weight in self._weights]
        for main in self._mains:
            main.grad = torch.zeros_like(main)
        chosen = settings.optimizer
        self._optimizer = torch.optim.AdamW(
            self._mains,
            lr=settings.learning_rate.lr,
            betas=(chosen.adam_beta1, chosen.adam_beta2),
            eps=chosen.adam_eps,
            weight_decay=chosen.weight_decay,
            fused=True,
        )
        self._batches = device_batches(settings, device)
        self._rates = learning_rates(settings)
        self._losses: list[torch.Tensor] = []

    def step(self) -> None:
        """Run forward and backward passes, clip, update."""
        self._losses = []
        for _ in range(self._micro_batches):
            tokens, _ = next(self._batches)
            out = self._model(input_ids=tokens, labels=tokens)
            (out.loss / self._micro_batches).backward()
            self._losses.append(out.loss.detach() - _AUX_LOSS_COEFF * out.aux_loss.detach())
        with torch.no_grad():
            self._update()

    def _update(self) -> None:
        gradients = [main.grad for main in self._mains]
        torch._foreach_copy_(gradients, [weight.grad for weight in self._weights])
        torch.nn.utils.clip_grad_norm_(self._mains, self._settings.optimizer.clip_grad)
        for group in self._optimizer.param_groups:
            group["lr"] = next(self._rates)
        self._optimizer.step()
        torch._foreach_copy_(self._weights, self._mains)
        for weight in self._weights:
            weight.grad = None

    def loss(self) -> float:
        """Return the mean cross-entropy of the last step."""
        return float(torch.stack(self._losses).mean())


def build(settings: Settings, device: torch.device, options: Mapping[str, Any]) -> torch.nn.Module:
    """Build the model of our shape on ``device``; ``options`` replace fields of its config."""
    model, moe = settings.model, settings.moe
    assert model.vocab_size is not None
    values: dict[str, Any] = {
        "vocab_size": derived.padded_vocab_size(model.vocab_size, settings),
        "hidden_size": model.hidden_size,
        "intermediate_size": derived.expert_ffn_size(settings),
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": derived.query_groups(model),
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.moe_router_topk,
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.norm_epsilon,
        "norm_topk_prob": False,
        "use_cache": False,
        "output_router_logits": True,
        "router_aux_loss_coef": _AUX_LOSS_COEFF,
        "pad_token_id": None,
        "eos_token_id": None,
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if settings.precision.bf16 else torch.float32)
    try:
        torch.manual_seed(settings.training.seed)
        with device:
            built = OlmoeForCausalLM(OlmoeConfig(**values | dict(options)))
    finally:
        torch.set_default_dtype(before)
    built.set_experts_implementation("grouped_mm")
    built.set_attn_implementation("sdpa")
    trained: torch.nn.Module = built.train()
    return trained


@contextmanager
def transformers_program(
    settings: Settings, options: Mapping[str, Any], stream: None = None
) -> Iterator[TransformersProgram]:
    """Build the program."""
    yield TransformersProgram(settings, resolve_device(settings.parallel.device), options)
