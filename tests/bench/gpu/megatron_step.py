"""megatron-core's own layers, optimizer and schedule, driven with the least code around them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt import gpt_layer_specs as specs
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings
from moetron.moe.host.adapt import restore_host
from moetron.moe.training import runtime
from moetron.moe.training.runtime import Runtime
from tests.bench.gpu.opponents import device_batches, learning_rates

FUSIONS: dict[str, Any] = {
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "masked_softmax_fusion": True,
    "apply_rope_fusion": True,
    "moe_permute_fusion": True,
    "moe_router_fusion": True,
    "cross_entropy_loss_fusion": True,
    "cross_entropy_fusion_impl": "te",
}
DIFFERENCES = (
    "megatron-core: GPTModel of get_gpt_layer_with_transformer_engine_spec, its DDP, optimizer and "
    "schedule; samples on the device before, no metrics, no checks. TE's RMSNorm over each head of "
    "queries and keys (OLMoE's runs over the full width, which megatron-core lacks)."
)


class MegatronProgram:
    """A GPTModel with megatron-core's optimizer and schedule."""

    def __init__(self, settings: Settings, ranks: Runtime, options: Mapping[str, Any]) -> None:
        self._settings = settings
        self._micro_batches = settings.training.global_batch_size
        self._micro_batches //= settings.training.micro_batch_size
        config = model_config(settings, options)
        self._model = build(settings, config, ranks)
        self.parameters = sum(p.numel() for p in self._model.parameters())
        self._optimizer = get_megatron_optimizer(
            optimizer_config(settings),
            [self._model],
            use_gloo_process_groups=False,
            pg_collection=ranks.groups,
        )
        self._batches = device_batches(settings, ranks.device)
        self._rates = learning_rates(settings)
        shape = (settings.training.micro_batch_size, settings.model.seq_length)
        self._positions = torch.arange(shape[1], device=ranks.device).expand(shape)
        self._reports: list[torch.Tensor] = []

    def step(self) -> None:
        """Run forward and backward passes, clip, update."""
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        learning_rate = next(self._rates)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        settings = self._settings
        self._reports = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=self._batches,
            model=[self._model],
            num_microbatches=self._micro_batches,
            seq_length=settings.model.seq_length,
            micro_batch_size=settings.training.micro_batch_size,
            forward_only=False,
        )
        self._optimizer.step()

    def _forward(self, batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        tokens, labels = next(batches)
        return model(tokens, self._positions, None, labels=labels), self._loss

    def _loss(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = losses.mean()
        return mean, mean.detach().clone()  # the schedule divides the first in place

    def loss(self) -> float:
        """Return the mean loss of the last step."""
        return float(torch.stack(self._reports).mean())


def model_config(settings: Settings, options: Mapping[str, Any]) -> TransformerConfig:
    """Return megatron-core's configuration of our shape; ``options`` replace its fields."""
    model, moe, bf16 = settings.model, settings.moe, settings.precision.bf16
    dtype = torch.bfloat16 if bf16 else torch.float32
    values: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": derived.expert_ffn_size(settings),
        "layernorm_epsilon": model.norm_epsilon,
        "init_method_std": model.init_method_std,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": derived.expert_ffn_size(settings),
        "moe_router_topk": moe.moe_router_topk,
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": moe.moe_aux_loss_coeff,
        "moe_z_loss_coeff": moe.moe_z_loss_coeff,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": torch.cuda.is_available(),
        **(FUSIONS if torch.cuda.is_available() else {}),
    }
    return TransformerConfig(**values | dict(options))


def build(settings: Settings, config: TransformerConfig, ranks: Runtime) -> torch.nn.Module:
    """Build the model of Transformer Engine's layers (on a CPU: of megatron-core's local ones)."""
    cuda = ranks.device.type == "cuda"
    layer = specs.get_gpt_layer_local_spec
    if cuda:
        layer = specs.get_gpt_layer_with_transformer_engine_spec
    assert settings.model.vocab_size is not None
    # The output layer is no layer of Transformer Engine's: fused accumulation asks apex for it.
    # It is built as if apex were there, and then told to do without.
    with mock.patch.object(layers, "_grad_accum_fusion_available", True):
        model = GPTModel(
            config,
            layer(
                num_experts=config.num_moe_experts,
                moe_grouped_gemm=config.moe_grouped_gemm,
                qk_layernorm=config.qk_layernorm,
            ),
            derived.padded_vocab_size(settings.model.vocab_size, settings),
            settings.model.seq_length,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        )
    model.output_layer.gradient_accumulation_fusion = False
    model.to(ranks.device)
    config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        Float16Module(config, model) if config.bf16 else model,
        pg_collection=ranks.groups,
    )
    wrapped.broadcast_params()
    return wrapped


def optimizer_config(settings: Settings) -> OptimizerConfig:
    """Return Adam with fp32 main parameters and fp32 moments, as ours."""
    chosen = settings.optimizer
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate.lr,
        weight_decay=chosen.weight_decay,
        adam_beta1=chosen.adam_beta1,
        adam_beta2=chosen.adam_beta2,
        adam_eps=chosen.adam_eps,
        clip_grad=chosen.clip_grad,
        bf16=settings.precision.bf16,
        params_dtype=torch.bfloat16 if settings.precision.bf16 else torch.float32,
    )


@contextmanager
def megatron_program(
    settings: Settings, options: Mapping[str, Any], stream: None = None
) -> Iterator[MegatronProgram]:
    """Build the program; on a GPU without our fixes of megatron-core's bugs."""
    with runtime.running(settings) as ranks:
        if ranks.device.type == "cuda":
            restore_host()
        yield MegatronProgram(settings, ranks, options)
