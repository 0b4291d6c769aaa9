"""The differences between megatron-core 0.16.1 and 0.19, all of them.

Chosen by the presence of an attribute, never by a version number: a container may hold a version of
its own. No other module here asks which version is installed (tests/unit/test_structure.py). What
this module need not contain is code that reads the same in both, such as routers that number layers
and record losses themselves.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig


def present(owner: Any, *names: str) -> list[Any]:
    """Return those attributes of ``owner`` that this version has."""
    return [getattr(owner, name) for name in names if hasattr(owner, name)]


def dense_ffn(kind: type[MLP], submodules: MLPSubmodules) -> Any:
    """Return the spec of a dense FFN in a layer: 0.19 calls it with other arguments."""
    if hasattr(kind, "as_mlp_submodule"):
        return partial(kind.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=kind, submodules=submodules)


def gradients_for_norm(optimizer: MegatronOptimizer) -> list[torch.Tensor]:
    """Return the gradients that count on this rank; 0.19 has another name for the method."""
    names = ("get_main_grads_for_grad_norm", "get_grads_for_grad_norm")
    gradients: list[torch.Tensor] = present(optimizer, *names)[0]()
    return gradients


def captured_modules(names: list[str]) -> dict[str, Any]:
    """Return the fields of the model's configuration that name what CUDA graphs capture."""
    if "cuda_graph_modules" in TransformerConfig.__dataclass_fields__:
        return {"cuda_graph_modules": names, "cuda_graph_scope": None}
    return {"cuda_graph_scope": names}


def submodules_of(spec: Any) -> Any:
    """Return the submodules of a spec from megatron-core: in 0.19 those of FFNs are partials."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def add_prediction_losses(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor | None,
    *,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    runtime_gather_output: bool | None,
    is_training: bool,
    compute_language_model_loss: Any,
    config: Any,
    cp_group: Any,
    **_: Any,
) -> torch.Tensor:
    """Attach the losses of multi-token prediction as 0.16.1 does; return the decoder's output.

    A module's loss is the sum over its tokens by the number of tokens of the main loss, as in
    DeepSeek-V3 (arXiv 2412.19437, equation 24). 0.19 divides by the module's own tokens, which
    differs by one or two positions a sample, and with context parallelism by those of the rank,
    which makes it depend on the layout; it also predicts every token again for a metric.

    Args:
        hidden_states: [(1 + modules) s, b, H], the decoder's and every module's.
        labels: [b, s] of the next token.
        loss_mask: [b, s]; None: all count.
        output_layer: of the model.
        output_weight: its weight if it is the embedding's.
        runtime_gather_output: as in GPTModel.
        is_training: whether to record losses.
        compute_language_model_loss: labels, logits -> losses [b, s].
        config: megatron-core's.
        cp_group: ranks that hold parts of the sequence.

    Returns:
        [s, b, H].
    """
    modules = config.mtp_num_layers
    output, *predicted = hidden_states.chunk(1 + modules, dim=0)
    mask = torch.ones_like(labels) if loss_mask is None else loss_mask
    for number, hidden in enumerate(predicted):
        logits, _ = output_layer(
            hidden, weight=output_weight, runtime_gather_output=runtime_gather_output
        )
        # Send and receive between neighbours of the context group: a label may be on the next rank.
        labels, _ = multi_token_prediction.roll_tensor(labels, cp_group=cp_group)
        mask, tokens = multi_token_prediction.roll_tensor(mask, cp_group=cp_group)
        losses = compute_language_model_loss(labels, logits) * mask
        if is_training:
            _record_prediction_loss(losses.detach().sum() / tokens.clamp(min=1), number, modules)
        scale = config.mtp_loss_scaling_factor / modules
        weighted = losses * scale if config.calculate_per_token_loss else losses * scale / tokens
        output = multi_token_prediction.MTPLossAutoScaler.apply(output, weighted)
    return output


def _record_prediction_loss(mean: torch.Tensor, number: int, modules: int) -> None:
    recorded = multi_token_prediction.MTPLossLoggingHelper.tracker
    if "values" not in recorded:
        recorded["values"] = torch.zeros(modules, device=mean.device)
    recorded["values"][number] += mean


def take_prediction_losses() -> torch.Tensor | None:
    """Return this rank's sums of mean losses, float32 [modules], since the last call.

    None: no module ran here.
    """
    recorded = multi_token_prediction.MTPLossLoggingHelper.tracker
    if "values" not in recorded:
        return None
    values: torch.Tensor = recorded["values"].clone()
    recorded["values"].zero_()
    return values
