"""Fused operations of megatron-core and Transformer Engine."""

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from moetron.moe.config.schema.field import Group, negative_flag
from moetron.moe.config.schema.paths import LocalPath
from moetron.moe.config.schema.roles import Role


class PerformanceSettings(Group):
    """Fused and overlapped operations; docs/gpu.md says what each gives and what it excludes."""

    default_role = Role.TRAINING

    bias_swiglu_fusion: bool = True
    """Fuse SwiGLU, biases and the token's probability (Transformer Engine's layers)."""
    bias_dropout_fusion: bool = True
    """Fuse bias, dropout and residual addition (Transformer Engine's layers)."""
    rope_fusion: bool = True
    """Fuse rotary embedding (Transformer Engine's layers; not latent attention, not YaRN)."""
    masked_softmax_fusion: bool = True
    """Fuse scale, mask and softmax of --attention-backend unfused in local layers (a GPU with apex;
    other attention is always fused)."""
    gradient_accumulation_fusion: bool = True
    """Add weight gradients to main gradients inside the matrix product (Transformer Engine's linear
    layers)."""
    cross_entropy_loss_fusion: bool = False
    """Fuse the vocabulary's cross-entropy (GPU)."""
    cross_entropy_fusion_impl: Literal["native", "te"] = "native"
    """Kernels of --cross-entropy-loss-fusion: compiled by torch (native), or Transformer Engine's
    (te)."""
    moe_permute_fusion: bool = False
    """Permute tokens by Transformer Engine's kernels."""
    moe_router_fusion: bool = False
    """Compute scores, top-k and the balance loss's scores by Transformer Engine's kernels."""
    moe_router_padding_for_quantization: bool = False
    """Pad each expert's tokens in the routing map, in place of copies in FP8 experts."""
    optimizer_cpu_offload: bool = False
    """Keep optimizer state in the CPU's memory and update there; needs the precision-aware
    optimizer."""
    optimizer_offload_fraction: PositiveFloat = 1.0
    """Fraction of the state that --optimizer-cpu-offload moves."""
    overlap_moe_expert_parallel_comm: bool = False
    """Overlap the exchange of tokens among expert ranks with the computation of another micro-batch
    (megatron-core's combined 1F1B schedule)."""
    ep_overlap_early_attn_memory_release: bool = False
    """Run attention's backward pass before the other micro-batch's experts: less memory, less
    overlap."""
    delay_wgrad_compute: bool = False
    """Compute weight gradients of linear layers and experts while gradients of their inputs are
    sent (--overlap-moe-expert-parallel-comm)."""
    tp_comm_overlap: bool = False
    """Overlap the communication of tensor ranks with matrix products (buffers of Transformer
    Engine)."""
    tp_comm_overlap_cfg: LocalPath | None = None
    """YAML file of --tp-comm-overlap: method and options of each product; unset: Transformer
    Engine's."""
    tp_comm_overlap_ag: bool = negative_flag(True, "disable-tp-comm-overlap-ag")
    """Overlap all-gathers with products."""
    tp_comm_overlap_rs: bool = negative_flag(True, "disable-tp-comm-overlap-rs")
    """Overlap reduce-scatters with products."""
    tp_comm_overlap_rs_dgrad: bool = False
    """Overlap the reduce-scatter of input gradients with their own product."""
    tp_comm_bulk_dgrad: bool = negative_flag(True, "disable-tp-comm-bulk-dgrad")
    """Overlap an all-gather of inputs with the product of input gradients."""
    tp_comm_bulk_wgrad: bool = negative_flag(True, "disable-tp-comm-bulk-wgrad")
    """Overlap a reduce-scatter of input gradients with the product of weight gradients."""
    tp_comm_bootstrap_backend: Literal["nccl", "mpi", "gloo"] = "nccl"
    """Backend that sets up the buffers."""
    cuda_graph_impl: Literal["none", "local", "transformer_engine"] = "none"
    """Capture parts of layers as CUDA graphs; only Transformer Engine's implementation is
    supported."""
    cuda_graph_scope: list[str] | None = None
    """Parts of a layer to capture: attn (what precedes the FFN), mlp (a dense FFN); unset: attn."""
    cuda_graph_warmup_steps: PositiveInt = 3
    """Steps of a process before it captures."""
