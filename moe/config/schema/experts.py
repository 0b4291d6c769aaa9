"""Experts, routing and balance."""

import ast
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from moetron.moe.config.schema.field import Group
from moetron.moe.config.schema.roles import Exported, Function, Shape, Training, Unexported

EVEN_WEIGHTS = ("hash", "reinforce")
"""Values of --moe-router-type that give every selected expert weight 1 / k, without a softmax."""

MOST_LAYERS = 10_000
"""Longest list of --moe-layer-freq."""


def layer_pattern(text: str) -> list[int]:
    """Return the list of a --moe-layer-freq expression, such as ``([0]*3+[1]*23)*1``.

    Integers, brackets, ``+``, ``*`` and parentheses; Megatron-LM evaluates it as Python
    (``moe_freq_type`` in megatron/training/arguments.py).

    Raises:
        ValueError: the expression holds anything else, or the list exceeds ``MOST_LAYERS``.
    """
    try:
        made = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        made = None
    if not isinstance(made, list):
        raise ValueError("not an expression like ([0]*3+[1]*23)*1")
    return made


def _value(node: ast.expr) -> int | list[int] | None:
    """Return the integer or list of a node, or None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if type(node.value) is int else None
    if isinstance(node, ast.List):
        items = [_value(item) for item in node.elts]
        integers = [item for item in items if isinstance(item, int)]
        return integers if len(integers) == len(items) else None
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
        return left + right
    if isinstance(node.op, ast.Mult) and isinstance(left, int):
        left, right = right, left
    if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
        if len(left) * right > MOST_LAYERS:
            raise ValueError(f"more than {MOST_LAYERS:,} layers")
        return left * right
    return None


class MoESettings(Group):
    """Experts, routing and balance."""

    num_experts: Shape[PositiveInt | None] = None
    """Routed experts per layer (E); unset: a dense model."""
    moe_layer_freq: Shape[PositiveInt | list[Annotated[int, Field(ge=0, le=1)]]] = 1
    """Layers with experts: one of every n, or a list with 0 or 1 for each layer, also as Megatron's
    expression ([0]*3+[1]*23)*1."""
    moe_layer_position: Shape[Literal["first", "last"]] = "first"
    """Position of the layer with experts among every n: layers 0, n, 2n, ... (Megatron, DeepSeek),
    or n - 1, 2n - 1, ... (OpenMoE, ST-MoE, Qwen)."""
    first_k_dense_replace: Shape[NonNegativeInt] = 0
    """Number of first layers without experts, overriding --moe-layer-freq n (DeepSeek)."""
    moe_ffn_hidden_size: Shape[PositiveInt | None] = None
    """Width of one expert's FFN (F); unset: --ffn-hidden-size."""
    moe_router_topk: Function[PositiveInt] = 2
    """Experts per token (k)."""
    moe_router_pre_softmax: Function[bool] = False
    """Apply the softmax over all experts before the top-k, without renormalising (OLMoE, OpenMoE);
    otherwise over the k selected experts."""
    moe_router_type: Shape[
        Literal[
            "topk",
            "expert_choice",
            "base",
            "random_second",
            "noisy_topk",
            "straight_through",
            "gumbel",
            "relaxed_topk",
            "reinforce",
            "hash",
        ]
    ] = "topk"
    """Routing algorithm; docs/routers.md compares them."""
    moe_expert_choice_eval: Training[Exported[Literal["expert_choice", "topk"]]] = "expert_choice"
    """Routing of expert choice in evaluation during training: experts choose and look ahead, or
    each token takes its k best, as generation and scoring always do."""
    moe_second_expert_threshold: Training[Exported[PositiveFloat]] = 0.2
    """random_second: weight from which a further expert is always selected."""
    moe_router_temperature: Training[Exported[PositiveFloat]] = 1.0
    """gumbel, relaxed_topk: temperature of the logits."""
    moe_router_final_temperature: Training[Exported[PositiveFloat]] = 0.1
    """gumbel: temperature at the end of --moe-router-anneal-samples."""
    moe_router_anneal_samples: Training[Exported[PositiveInt | None]] = None
    """gumbel: samples over which the temperature decays geometrically; unset: no decay."""
    moe_router_score_function: Function[Literal["softmax", "sigmoid"]] = "softmax"
    """Function from logits to scores."""
    moe_router_dtype: Training[Literal["fp32", "fp64", "params"]] = "fp32"
    """Precision of the router's matrix product and probabilities; params: that of parameters."""
    moe_router_topk_scaling_factor: Function[PositiveFloat | None] = None
    """Factor of the combine weights."""
    moe_router_num_groups: Function[PositiveInt | None] = None
    """Node-limited routing: number of expert groups."""
    moe_router_group_topk: Function[PositiveInt | None] = None
    """Node-limited routing: expert groups per token."""
    moe_router_enable_expert_bias: Shape[bool] = False
    """Balance by a selection bias in place of an auxiliary loss (sigmoid scores only)."""
    moe_router_bias_update_rate: Training[NonNegativeFloat] = 1e-3
    """Step size of the selection bias."""
    moe_router_load_balancing_type: Training[
        Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "noisy_load", "sinkhorn", "none"]
    ] = "aux_loss"
    """Scope of the balance loss (micro-batch, sequence, global batch), noisy top-k's own losses, or
    Sinkhorn assignment in place of a loss."""
    moe_aux_loss_first_choice_only: Training[bool] = False
    """Count only each token's best expert in the balance loss (ST-MoE); otherwise all k."""
    moe_global_aux_loss_counts: Shape[Unexported[Literal["running", "previous_step"]]] = "running"
    """Token counts of global_aux_loss: a running mean over the step's micro-batches so far
    (Megatron), or all of the previous step, identical in every layout."""
    moe_aux_loss_coeff: Training[NonNegativeFloat] = 0.0
    """Coefficient of the balance loss, in megatron-core's scale: summed over layers, 1 x
    coefficient per layer when balanced."""
    moe_z_loss_coeff: Training[NonNegativeFloat | None] = None
    """Coefficient of the router z-loss, summed over layers."""
    moe_input_jitter_eps: Training[PositiveFloat | None] = None
    """Multiply the router's input by U[1 - eps, 1 + eps] in training."""
    moe_expert_capacity_factor: Training[PositiveFloat | None] = None
    """Capacity of an expert for the tokens of --moe-capacity-scope, as a multiple of a balanced
    load; unset: dropless."""
    moe_capacity_scope: Training[Literal["micro_batch", "sequence", "rank"]] = "micro_batch"
    """Tokens that compete for an expert's capacity: a micro-batch, a sequence (both identical in
    any layout), or one rank's part of a micro-batch (Megatron; depends on TP and CP)."""
    moe_eval_capacity_factor: Training[PositiveFloat | None] = None
    """Capacity factor in evaluation during training; unset: as in training. Generation and scoring
    (tools/generate.py, tools/evaluate.py) are dropless."""
    moe_encoder_capacity_factor: Training[PositiveFloat | None] = None
    """Capacity factor of an encoder-decoder's encoder; unset: --moe-expert-capacity-factor."""
    moe_encoder_eval_capacity_factor: Training[PositiveFloat | None] = None
    """The same in evaluation during training; unset: as --moe-encoder-capacity-factor, or without
    that --moe-eval-capacity-factor."""
    moe_minimum_capacity: Training[NonNegativeInt] = 0
    """Minimum capacity of an expert (OpenMoE, ST-MoE: 4); a capacity of 0 is refused."""
    moe_capacity_includes_topk: Training[bool] = True
    """A balanced load is k x tokens / E, capacity is rounded up (Megatron); otherwise tokens / E,
    rounded to the nearest (Switch, ST-MoE, OpenMoE)."""
    moe_pad_expert_input_to_capacity: Training[bool] = False
    """Pad every expert's input to its capacity."""
    moe_token_drop_policy: Training[Literal["probs", "position", "choice", "batch_prioritized"]] = (
        "probs"
    )
    """Tokens that an expert over capacity keeps: highest probability (probs); first in order,
    sequence by sequence, left to right (position); the same, with all first choices before all
    second choices (choice; GShard, OpenMoE); or first choices first, then by each token's highest
    probability (batch_prioritized; V-MoE's BPR). All but position and choice look ahead."""
    moe_token_dispatcher_type: Training[Literal["allgather", "alltoall", "flex"]] = "alltoall"
    """Token dispatcher."""
    moe_grouped_gemm: Training[bool] = True
    """Run a rank's experts as one grouped GEMM; otherwise sequentially."""
    moe_experts_impl: Training[Literal["auto", "grouped_mm", "te"]] = "auto"
    """Grouped GEMM of experts: torch's with one stacked weight for each matrix (grouped_mm), or
    Transformer Engine's with one weight per expert (te); auto: grouped_mm, which was measured to be
    faster, where it supports the settings (not FP8). Checkpoints are the same."""
    moe_shared_expert_intermediate_size: Shape[PositiveInt | None] = None
    """Total width of shared experts; unset: none."""
    moe_shared_expert_gate: Shape[bool] = False
    """Multiply the shared experts' output by sigmoid(w x) (Qwen1.5-MoE, Qwen2-MoE)."""
    moe_sequential_ffn_hidden_size: Shape[PositiveInt | None] = None
    """Width of a dense FFN with its own norm after the experts: x += FFN(norm x) (OpenMoE's code,
    ST-MoE's sparse-dense stack); unset: none."""
    moe_expert_multiplicative_bias: Shape[bool] = False
    """Multiply each expert's inner activation by a learned vector, initially ones (ST-MoE)."""
    moe_expert_dropout: Training[float] = Field(default=0.0, ge=0, lt=1)
    """Dropout on experts' inner activation (ST-MoE's fine-tuning)."""
    moe_router_init_method_std: Training[PositiveFloat | None] = None
    """Standard deviation of the router's normal initialisation (OpenMoE: 0.02); unset: as other
    matrices."""
    moe_shared_expert_overlap: Training[bool] = False
    """Overlap shared experts with token dispatch (GPU only)."""

    @field_validator("moe_layer_freq", mode="before")
    @classmethod
    def _read_expression(cls, value: Any) -> Any:
        """Parse Megatron's expressions into lists; leave numbers alone."""
        expression = isinstance(value, str) and "[" in value
        return layer_pattern(value) if expression else value
