"""Model settings: shape and blocks."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from moetron.moe.config.schema.field import Group, negative_flag
from moetron.moe.config.schema.roles import Exported, Function, Shape, Training, Unexported

FfnType = Literal["swiglu", "geglu", "geglu_tanh", "gelu", "relu", "double_gated"]

MOST_LAYERS = 100_000
"""More than any model has; lists of layers fit into memory."""


class ModelSettings(Group):
    """Shape and blocks of the transformer."""

    num_layers: Shape[PositiveInt] = Field(le=MOST_LAYERS)
    """Number of transformer layers; of an encoder-decoder those of both stacks."""
    encoder_num_layers: Shape[PositiveInt | None] = Field(default=None, le=MOST_LAYERS)
    """Make the first layers the encoder of an encoder-decoder (T5), and the others its decoder with
    cross-attention; unset: a decoder only."""
    hidden_size: Shape[PositiveInt]
    """Width of the residual stream (H)."""
    num_attention_heads: Shape[PositiveInt]
    """Number of query heads."""
    num_query_groups: Shape[PositiveInt | None] = None
    """Number of key/value heads; unset: as many as query heads."""
    kv_channels: Shape[PositiveInt | None] = None
    """Width of one head; unset: hidden size / heads."""
    ffn_hidden_size: Shape[PositiveInt | None] = None
    """Width of the dense FFN (F); unset: 4 x hidden size. Layers with experts use
    --moe-ffn-hidden-size."""
    seq_length: Training[Exported[PositiveInt]]
    """Tokens per sample."""
    normalization: Shape[Literal["RMSNorm", "LayerNorm"]] = "RMSNorm"
    """Kind of normalisation."""
    norm_affine: Shape[bool] = True
    """Give norms weights; off: they only normalise (OLMo-1B, an ablation of ST-MoE)."""
    norm_epsilon: Function[PositiveFloat] = 1e-5
    """Epsilon of all norms."""
    qk_layernorm: Shape[bool] = False
    """Normalise queries and keys before rotary embedding."""
    qk_layernorm_scope: Shape[Literal["head", "full"]] = "head"
    """Scope of --qk-layernorm: each head's channels (Megatron), or the full projection before the
    head split (OLMoE)."""
    position_embedding_type: Function[Literal["rope", "none", "relative"]] = "rope"
    """Position embedding; relative: T5's biases of attention logits, one table for each stack of an
    encoder-decoder."""
    relative_attention_num_buckets: Shape[PositiveInt] = Field(default=32, ge=4, multiple_of=2)
    """Relative biases per head (T5: 32)."""
    relative_attention_max_distance: Function[PositiveInt] = 128
    """Distance from which all relative biases are equal (T5: 128)."""
    rotary_base: Function[PositiveInt] = 10_000
    """Rotary base (theta)."""
    rotary_percent: Function[float] = Field(default=1.0, gt=0, le=1)
    """Fraction of a head's channels that is rotated."""
    swiglu: Shape[bool] = True
    """Use a gated FFN with SiLU, down(silu(gate x) * up x); otherwise down(gelu(up x))."""
    ffn_type: Shape[FfnType | None] = None
    """Kind of dense and expert FFN: gated by SiLU or GELU (swiglu, geglu; geglu_tanh: GELU's tanh
    approximation, T5 1.1), two matrices with an activation between them (gelu, relu), or OpenMoE's
    four, down(silu(gate x) * up x * linear x) (double_gated); unset: swiglu or gelu, by
    --swiglu."""
    add_bias_linear: Shape[bool] = negative_flag(False, "disable-bias-linear")
    """Use biases in linear layers."""
    untie_embeddings_and_output_weights: Shape[bool] = True
    """Use separate matrices for the input embedding and the output layer."""
    init_method_std: Training[Exported[PositiveFloat]] = 0.02
    """Standard deviation of the weight initialisation."""
    init_method: Training[Literal["normal", "truncated_normal", "variance_scaling"]] = "normal"
    """Distribution of the weight initialisation; variance_scaling: normal with standard deviation
    sqrt(scale / inputs) (T5, Switch, ST-MoE, OpenMoE)."""
    init_method_scale: Training[PositiveFloat] = 0.1
    """Scale of variance_scaling (Switch, section 2.4: 0.1)."""
    embedding_init_method_std: Training[PositiveFloat | None] = None
    """Standard deviation of the input embedding's normal initialisation (T5, OpenMoE: 1); unset: as
    other matrices, with --init-method-std."""
    query_init_folds_scale: Training[bool] = False
    """Divide initial query weights by sqrt(head width) (T5, OpenMoE), for --softmax-scale 1."""
    init_method_cutoff: Training[PositiveFloat] = 3.0
    """Cutoff of truncated_normal, in standard deviations (OLMoE: 3)."""
    scaled_output_init: Training[bool] = True
    """Divide the standard deviation of output projections by sqrt(2 x layers), as Megatron does;
    OLMoE does not."""
    mtp_num_layers: Shape[Unexported[PositiveInt | None]] = None
    """Multi-token prediction modules (arXiv 2412.19437, section 2.2), each one token further ahead:
    a projection and a layer of the last layer's kind; unset: none."""
    mtp_loss_scaling_factor: Training[PositiveFloat] = 0.1
    """Weight of the mean multi-token prediction loss."""
    output_z_loss_coeff: Training[PositiveFloat | None] = None
    """Coefficient of the output z-loss: coefficient x (log Z)^2 per token, where Z is the sum of
    exp over its logits (PaLM, T5X's z_loss, OpenMoE: 1e-4); unset: none."""
    label_smoothing: Training[float] = Field(default=0.0, ge=0, lt=1)
    """Share of a training label that is spread over all other rows of the vocabulary; the logged
    training loss contains it, evaluation does not."""
    hidden_dropout: Training[float] = Field(default=0.0, ge=0, lt=1)
    """Dropout on residual branches."""
    attention_dropout: Training[float] = Field(default=0.0, ge=0, lt=1)
    """Dropout on attention probabilities."""
    vocab_size: Shape[PositiveInt | None] = None
    """Vocabulary size before padding; unset: the tokenizer's."""
    make_vocab_size_divisible_by: Training[PositiveInt] = 128
    """Pad the embedding's rows to a multiple of this times the tensor-parallel size."""
    transformer_impl: Training[Literal["auto", "local", "transformer_engine"]] = "auto"
    """Layer implementation; auto: Transformer Engine on a GPU if it is usable and supports the
    model, else local."""
    attention_backend: Training[Literal["auto", "sdpa", "unfused"]] = "auto"
    """Core attention of the local implementation: scaled_dot_product_attention (auto, sdpa) or
    megatron-core's own, which materialises the s x s matrix (unfused)."""
