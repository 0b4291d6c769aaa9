"""What the model is: its shape, its blocks, its experts."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from moetron.moe.config.field import Group, negative_flag


class ModelSettings(Group):
    """Shape and blocks of the transformer."""

    num_layers: PositiveInt
    """Number of transformer layers."""
    hidden_size: PositiveInt
    """Width of the residual stream (H)."""
    num_attention_heads: PositiveInt
    """Number of query heads."""
    num_query_groups: PositiveInt | None = None
    """Number of key/value heads; unset: as many as query heads."""
    kv_channels: PositiveInt | None = None
    """Width of one head; unset: hidden size / heads."""
    ffn_hidden_size: PositiveInt | None = None
    """Width of the dense FFN (F); unset: 4 x hidden size. Layers with experts use
    --moe-ffn-hidden-size."""
    seq_length: PositiveInt
    """Tokens a sample holds."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Kind of normalisation."""
    norm_epsilon: PositiveFloat = 1e-5
    """Epsilon of every normalisation."""
    qk_layernorm: bool = False
    """Normalise queries and keys before rotary embedding."""
    qk_layernorm_scope: Literal["head", "full"] = "head"
    """What --qk-layernorm normalises over: each head's channels (Megatron's way), or the full
    projection before the head split (OLMoE's way)."""
    position_embedding_type: Literal["rope", "none"] = "rope"
    """Kind of position information."""
    rotary_base: PositiveInt = 10_000
    """Rotary base (theta)."""
    rotary_percent: float = Field(default=1.0, gt=0, le=1)
    """Share of a head's channels that is rotated."""
    swiglu: bool = True
    """Gated FFN with SiLU: down(silu(gate x) * up x); otherwise down(gelu(up x))."""
    add_bias_linear: bool = negative_flag(False, "disable-bias-linear")
    """Biases in linear layers."""
    untie_embeddings_and_output_weights: bool = True
    """Separate matrices for the input embedding and the output layer."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of the weight initialisation."""
    init_method: Literal["normal", "truncated_normal"] = "normal"
    """Distribution of the weight initialisation."""
    init_method_cutoff: PositiveFloat = 3.0
    """Where truncated_normal cuts, in standard deviations (OLMoE: 3)."""
    scaled_output_init: bool = True
    """Divide the standard deviation of output projections by sqrt(2 x layers), as Megatron does;
    OLMoE does not."""
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on residual branches."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on attention probabilities."""
    vocab_size: PositiveInt | None = None
    """Size of the vocabulary before padding; unset: the tokenizer's."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The embedding's rows are padded to a multiple of this times the tensor-parallel size."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation; auto: Transformer Engine on a GPU that has it, else local."""
    attention_backend: Literal["auto", "sdpa", "unfused"] = "auto"
    """Core attention of the local implementation: scaled_dot_product_attention (auto, sdpa) or
    megatron-core's own, which materialises the s x s matrix (unfused)."""


class MoESettings(Group):
    """Experts, routing and balance."""

    num_experts: PositiveInt | None = None
    """Routed experts in a layer (E); unset: a dense model."""
    moe_layer_freq: PositiveInt | list[Annotated[int, Field(ge=0, le=1)]] = 1
    """Which layers have experts: n puts them in layers 0, n, 2n, ...; a list says 0 or 1 for each
    layer."""
    moe_ffn_hidden_size: PositiveInt | None = None
    """Width of one expert's FFN (F); unset: --ffn-hidden-size."""
    moe_router_topk: PositiveInt = 2
    """Experts that a token visits (k)."""
    moe_router_pre_softmax: bool = False
    """Softmax over all experts before the top-k, weights not renormalised (OLMoE, OpenMoE);
    otherwise softmax over the k winners."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores."""
    moe_router_dtype: Literal["fp32", "fp64", "params"] = "fp32"
    """Precision of the router's product and probabilities; params: that of the parameters."""
    moe_router_topk_scaling_factor: PositiveFloat | None = None
    """Multiplies the combine weights."""
    moe_router_num_groups: PositiveInt | None = None
    """Node-limited routing: number of expert groups."""
    moe_router_group_topk: PositiveInt | None = None
    """Node-limited routing: groups that a token may visit."""
    moe_router_enable_expert_bias: bool = False
    """Balance by a bias on the selection (sigmoid scores only), no auxiliary loss."""
    moe_router_bias_update_rate: NonNegativeFloat = 1e-3
    """Step of that bias."""
    moe_router_load_balancing_type: Literal[
        "aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"
    ] = "aux_loss"
    """Scope of the balance loss."""
    moe_aux_loss_coeff: NonNegativeFloat = 0.0
    """Coefficient of the balance loss, megatron-core's scale: summed over layers, 1 x coefficient a
    layer when balanced."""
    moe_z_loss_coeff: NonNegativeFloat | None = None
    """Coefficient of the router z-loss, summed over layers."""
    moe_input_jitter_eps: PositiveFloat | None = None
    """Multiply the router's input by U[1 - eps, 1 + eps] in training."""
    moe_expert_capacity_factor: PositiveFloat | None = None
    """Slots an expert has for the tokens of one rank's micro-batch, as a multiple of an even share;
    unset: dropless."""
    moe_eval_capacity_factor: PositiveFloat | None = None
    """The same in evaluation; unset: as in training."""
    moe_minimum_capacity: NonNegativeInt = 0
    """Slots an expert has at least (OpenMoE, ST-MoE: 4)."""
    moe_capacity_includes_topk: bool = True
    """An even share is k x tokens / E, slots are rounded up (Megatron); otherwise tokens / E, slots
    are rounded to the nearest (Switch, ST-MoE, OpenMoE)."""
    moe_pad_expert_input_to_capacity: bool = False
    """Pad every expert's input to its capacity."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens an overfull expert keeps: those of highest probability, or the first ones,
    sequence by sequence, from left to right."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"
    """How tokens travel to their experts."""
    moe_grouped_gemm: bool = True
    """Run a rank's experts as one grouped GEMM; otherwise one after the other."""
    moe_shared_expert_intermediate_size: PositiveInt | None = None
    """Total width of the always-on shared experts; unset: none."""
    moe_shared_expert_overlap: bool = False
    """Overlap the shared experts with the dispatch (GPU only)."""


class ParallelSettings(Group):
    """Layout: how the model and the batch are cut over ranks."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each matrix (TP)."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Pipeline stages (PP)."""
    num_layers_per_virtual_pipeline_stage: PositiveInt | None = None
    """Layers a virtual stage holds; set: interleaved pipeline."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share a layer's experts (EP)."""
    expert_tensor_parallel_size: PositiveInt | None = None
    """Ranks that share each expert's matrices (ETP); unset: the tensor-parallel size."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share a sequence (CP)."""
    sequence_parallel: bool | None = None
    """Shard norms and dropout along the sequence; unset: on when TP > 1."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer's state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather parameters while the forward pass runs (distributed optimizer)."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Recompute activations in the backward pass: chosen modules, or whole layers."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Which layers full recomputation takes."""
    recompute_num_layers: PositiveInt | None = None
    """Layers in a recomputed unit (uniform) or of each stage (block)."""
    recompute_modules: list[str] | None = None
    """What selective recomputation takes; unset: core_attn."""
    distributed_timeout_minutes: PositiveFloat = 10.0
    """How long a rank waits for the others."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: CUDA where there is a GPU."""
    cpu_threads: NonNegativeInt = 0
    """Threads a rank uses on a CPU; 0: cores / local ranks."""


class PrecisionSettings(Group):
    """Number formats."""

    bf16: bool = negative_flag(False, "fp32")
    """bfloat16 parameters with fp32 main parameters and gradients; otherwise all fp32."""
    accumulate_allreduce_grads_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """FP8 products in linear layers and experts, e4m3 throughout or with e5m2 gradients (hybrid):
    Transformer Engine's, or emulated by the local implementation. Unset: none."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """What shares an FP8 scale: a tensor (delayed: from earlier amaxes; tensorwise: its own), 1x128
    activations and 128x128 weights (blockwise), or 32 values (mxfp8)."""
    fp8_margin: NonNegativeInt = 0
    """Delayed scaling: divide scales by 2^margin."""
    fp8_amax_history_len: PositiveInt = 1
    """Delayed scaling: amaxes that are remembered."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Delayed scaling: which remembered amax makes the scale."""
    first_last_layers_bf16: bool = False
    """Keep the first and last layers out of FP8."""
    num_layers_at_start_in_bf16: NonNegativeInt = 1
    """First layers that --first-last-layers-bf16 keeps."""
    num_layers_at_end_in_bf16: NonNegativeInt = 1
    """Last layers that --first-last-layers-bf16 keeps."""
