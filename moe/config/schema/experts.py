"""Experts, routing and balance."""

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
from moetron.moe.config.schema.layer_pattern import layer_pattern
from moetron.moe.config.schema.roles import Exported, Function, Shape, Training, Unexported

EVEN_WEIGHTS = ("hash", "reinforce")
"""Values of --moe-router-type that give every chosen expert weight 1 / k, without a softmax."""


class MoESettings(Group):
    """Experts, routing and balance."""

    num_experts: Shape[PositiveInt | None] = None
    """Routed experts in a layer (E); unset: a dense model."""
    moe_layer_freq: Shape[PositiveInt | list[Annotated[int, Field(ge=0, le=1)]]] = 1
    """Which layers have experts: one of every n; or a list of 0 or 1 for each layer, also as
    Megatron's expression ([0]*3+[1]*23)*1."""
    moe_layer_position: Shape[Literal["first", "last"]] = "first"
    """Which of every n layers has experts: layers 0, n, 2n, ... (Megatron, DeepSeek), or n - 1,
    2n - 1, ... (OpenMoE, ST-MoE, Qwen)."""
    first_k_dense_replace: Shape[NonNegativeInt] = 0
    """First layers that have no experts, whatever --moe-layer-freq n says (DeepSeek)."""
    moe_ffn_hidden_size: Shape[PositiveInt | None] = None
    """Width of one expert's FFN (F); unset: --ffn-hidden-size."""
    moe_router_topk: Function[PositiveInt] = 2
    """Experts that a token visits (k)."""
    moe_router_pre_softmax: Function[bool] = False
    """Softmax over all experts before the top-k, weights not renormalised (OLMoE, OpenMoE);
    otherwise softmax over the k winners."""
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
    """Who chooses whom, and what gradient weights have; docs/routers.md says what each trades."""
    moe_expert_choice_eval: Training[Exported[Literal["expert_choice", "topk"]]] = "expert_choice"
    """Evaluation of expert choice during training: experts choose and look ahead, or each token
    takes its k best, as generation and scoring always do."""
    moe_second_expert_threshold: Training[Exported[PositiveFloat]] = 0.2
    """random_second: weight from which a further expert is always visited."""
    moe_router_temperature: Training[Exported[PositiveFloat]] = 1.0
    """gumbel, relaxed_topk: divides the logits."""
    moe_router_final_temperature: Training[Exported[PositiveFloat]] = 0.1
    """gumbel: temperature at the end of --moe-router-anneal-samples."""
    moe_router_anneal_samples: Training[Exported[PositiveInt | None]] = None
    """gumbel: samples over which the temperature falls, geometrically; unset: it stays."""
    moe_router_score_function: Function[Literal["softmax", "sigmoid"]] = "softmax"
    """How logits become scores."""
    moe_router_dtype: Training[Literal["fp32", "fp64", "params"]] = "fp32"
    """Precision of the router's product and probabilities; params: that of the parameters."""
    moe_router_topk_scaling_factor: Function[PositiveFloat | None] = None
    """Multiplies the combine weights."""
    moe_router_num_groups: Function[PositiveInt | None] = None
    """Node-limited routing: number of expert groups."""
    moe_router_group_topk: Function[PositiveInt | None] = None
    """Node-limited routing: groups that a token may visit."""
    moe_router_enable_expert_bias: Shape[bool] = False
    """Balance by a bias on the selection (sigmoid scores only), no auxiliary loss."""
    moe_router_bias_update_rate: Training[NonNegativeFloat] = 1e-3
    """Step of that bias."""
    moe_router_load_balancing_type: Training[
        Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "noisy_load", "sinkhorn", "none"]
    ] = "aux_loss"
    """Scope of the balance loss (micro-batch, sequence, global batch), noisy top-k's own losses, or
    Sinkhorn's balanced choices instead of a loss."""
    moe_aux_loss_first_choice_only: Training[bool] = False
    """The balance loss counts each token's best expert alone (ST-MoE); otherwise all k."""
    moe_global_aux_loss_counts: Shape[Unexported[Literal["running", "previous_step"]]] = "running"
    """Which choices global_aux_loss counts: a running mean over the micro-batches of the step so
    far (Megatron), or all of the previous step, the same in every layout."""
    moe_aux_loss_coeff: Training[NonNegativeFloat] = 0.0
    """Coefficient of the balance loss, megatron-core's scale: summed over layers, 1 x coefficient a
    layer when balanced."""
    moe_z_loss_coeff: Training[NonNegativeFloat | None] = None
    """Coefficient of the router z-loss, summed over layers."""
    moe_input_jitter_eps: Training[PositiveFloat | None] = None
    """Multiply the router's input by U[1 - eps, 1 + eps] in training."""
    moe_expert_capacity_factor: Training[PositiveFloat | None] = None
    """Slots an expert has for the tokens of --moe-capacity-scope, as a multiple of an even share;
    unset: dropless."""
    moe_capacity_scope: Training[Literal["micro_batch", "sequence", "rank"]] = "micro_batch"
    """Tokens that share an expert's slots: one micro-batch's, one sequence's (both the same in any
    layout), or those of the micro-batch that one rank holds (Megatron; follows TP and CP)."""
    moe_eval_capacity_factor: Training[PositiveFloat | None] = None
    """The same in evaluation during training; unset: as in training. Generation and scoring
    (tools/generate.py, tools/evaluate.py) have no capacity."""
    moe_minimum_capacity: Training[NonNegativeInt] = 0
    """Slots an expert has at least (OpenMoE, ST-MoE: 4); settings that leave none are refused."""
    moe_capacity_includes_topk: Training[bool] = True
    """An even share is k x tokens / E, slots are rounded up (Megatron); otherwise tokens / E, slots
    are rounded to the nearest (Switch, ST-MoE, OpenMoE)."""
    moe_pad_expert_input_to_capacity: Training[bool] = False
    """Pad every expert's input to its capacity."""
    moe_token_drop_policy: Training[Literal["probs", "position", "choice", "batch_prioritized"]] = (
        "probs"
    )
    """Which choices an overfull expert serves: those of highest probability; the first ones,
    sequence by sequence, from left to right; the same, but all first choices before all second ones
    (GShard, OpenMoE); or first choices first, tokens by their highest probability (V-MoE's BPR).
    All but position and choice look ahead."""
    moe_token_dispatcher_type: Training[Literal["allgather", "alltoall", "flex"]] = "alltoall"
    """How tokens travel to their experts."""
    moe_grouped_gemm: Training[bool] = True
    """Run a rank's experts as one grouped GEMM; otherwise one after the other."""
    moe_shared_expert_intermediate_size: Shape[PositiveInt | None] = None
    """Total width of the always-on shared experts; unset: none."""
    moe_shared_expert_gate: Shape[bool] = False
    """Multiply the shared experts' output by sigmoid(w x) (Qwen1.5-MoE, Qwen2-MoE)."""
    moe_sequential_ffn_hidden_size: Shape[PositiveInt | None] = None
    """Width of a dense FFN that follows the experts with a norm of its own: x += FFN(norm x)
    (OpenMoE's code, ST-MoE's sparse-dense stack); unset: none."""
    moe_expert_multiplicative_bias: Shape[bool] = False
    """Multiply each expert's inner activation by a vector that starts at one (ST-MoE)."""
    moe_expert_dropout: Training[float] = Field(default=0.0, ge=0, lt=1)
    """Dropout on experts' inner activation (ST-MoE's fine-tuning)."""
    moe_router_init_method_std: Training[PositiveFloat | None] = None
    """Standard deviation of the router's first weights, drawn from a normal (OpenMoE: 0.02); unset:
    as the other matrices."""
    moe_shared_expert_overlap: Training[bool] = False
    """Overlap the shared experts with the dispatch (GPU only)."""

    @field_validator("moe_layer_freq", mode="before")
    @classmethod
    def _read_expression(cls, value: Any) -> Any:
        """Megatron's expressions as lists; a number stays one."""
        expression = isinstance(value, str) and "[" in value
        return layer_pattern(value) if expression else value
