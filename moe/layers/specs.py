"""Layer specs: the modules of a block, our own or Transformer Engine's."""

import warnings
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from moetron.moe.config.bridge import ModelConfig
from moetron.moe.config.schema import derived
from moetron.moe.config.schema.implementation import experts_impl
from moetron.moe.config.schema.settings import Settings
from moetron.moe.host.device import fp8_on_tensor_cores, uses_transformer_engine
from moetron.moe.layers.attention import SdpaAttention
from moetron.moe.layers.expert_variants import VariantExperts
from moetron.moe.layers.experts import GroupedExperts, grouped_gemm_fits
from moetron.moe.layers.ffn import DoubleGatedMLP, DoubleGatedSharedExpertMLP, SequentialFfnLayer
from moetron.moe.layers.fp8_linear import (
    Fp8ColumnParallelLinear,
    Fp8GroupedExperts,
    Fp8RowParallelLinear,
)
from moetron.moe.layers.latent_attention import LatentAttention
from moetron.moe.layers.norm import LayerNorm, RMSNorm
from moetron.moe.layers.rotary_attention import RotarySelfAttention
from moetron.moe.layers.scaled_experts import ScaledGroupedExperts, scaled_experts_fit
from moetron.moe.megatron.version_differences import dense_ffn, submodules_of
from moetron.moe.numerics.fp8_emulation import Fp8Numerics, fp8_numerics
from moetron.moe.overlap.delayed_linear import (
    DelayedColumnParallelLinear,
    DelayedRowParallelLinear,
)
from moetron.moe.routing.router_types import router_class

with warnings.catch_warnings():  # "Apex is not installed": we have our own norms
    warnings.simplefilter("ignore")
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
        get_gpt_mtp_block_spec_for_backend,
    )


class LocalProvider(LocalSpecProvider):
    """megatron-core's local modules with our norms, core attention and experts.

    ``fp8``: numerics of linear layers and experts in FP8; None: no FP8.
    """

    def __init__(self, settings: Settings, config: ModelConfig, fp8: Fp8Numerics | None) -> None:
        self._settings = settings
        self._config = config
        self.fp8 = fp8

    def column_parallel_linear(self) -> type | ModuleSpec:
        """Return the linear layer whose outputs are split over tensor ranks."""
        delays = self._config.delay_wgrad_compute
        plain = DelayedColumnParallelLinear if delays else ColumnParallelLinear
        return self._linear(plain, Fp8ColumnParallelLinear)

    def row_parallel_linear(self) -> type | ModuleSpec:
        """Return the linear layer whose inputs are split over tensor ranks."""
        delays = self._config.delay_wgrad_compute
        plain = DelayedRowParallelLinear if delays else RowParallelLinear
        return self._linear(plain, Fp8RowParallelLinear)

    def _linear(self, plain: type, reduced: type) -> type | ModuleSpec:
        if self.fp8 is None:
            return plain
        return ModuleSpec(module=reduced, params={"numerics": self.fp8})

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """Return the norm that the configuration names."""
        return RMSNorm if self._config.normalization == "RMSNorm" else LayerNorm

    def core_attention(self) -> type:
        """Return our attention, or megatron-core's for --attention-backend unfused."""
        if self._settings.model.attention_backend == "unfused":
            unfused: type = super().core_attention()
            return unfused
        return SdpaAttention

    def linear_layers(self) -> MLPSubmodules:
        """Return the two linear layers of an FFN."""
        return MLPSubmodules(
            linear_fc1=self.column_parallel_linear(), linear_fc2=self.row_parallel_linear()
        )

    def experts(self) -> ModuleSpec:
        """Return the spec of grouped experts where supported, sequential ones elsewhere."""
        config = self._config
        ranks = derived.expert_tensor_parallel_size(self._settings.parallel)
        if not (config.moe_grouped_gemm and grouped_gemm_fits(config, ranks)):
            return ModuleSpec(module=SequentialMLP, submodules=self.linear_layers())
        kind = self.grouped_experts()
        params = {"numerics": self.fp8} if kind is Fp8GroupedExperts else {}
        return ModuleSpec(module=kind, params=params)

    def grouped_experts(self) -> type[GroupedExperts]:
        """Return the class of grouped experts for this configuration."""
        config = self._config
        if (
            config.double_gated
            or config.moe_expert_multiplicative_bias
            or config.moe_expert_dropout
        ):
            return VariantExperts
        if self.fp8 is None:
            return GroupedExperts
        ranks = derived.expert_tensor_parallel_size(self._settings.parallel)
        scaled = self.fp8.on_tensor_cores and scaled_experts_fit(config, ranks)
        return ScaledGroupedExperts if scaled else Fp8GroupedExperts


def _attention(backend: LocalProvider, config: TransformerConfig) -> ModuleSpec:
    norm = backend.layer_norm() if config.qk_layernorm else IdentityOp
    shared = {
        "core_attention": backend.core_attention(),
        "linear_proj": backend.row_parallel_linear(),
        "q_layernorm": norm,
    }
    columns = backend.column_parallel_linear()
    params: dict[str, Any] = {"attn_mask_type": AttnMaskType.causal}
    if not config.multi_latent_attention:
        plain = SelfAttentionSubmodules(linear_qkv=columns, k_layernorm=norm, **shared)
        return ModuleSpec(module=RotarySelfAttention, params=params, submodules=plain)
    latent = MLASelfAttentionSubmodules(
        linear_q_proj=columns,
        linear_q_up_proj=columns,
        linear_kv_up_proj=columns,
        kv_layernorm=norm,
        **shared,
    )
    params["numerics"] = backend.fp8
    return ModuleSpec(module=LatentAttention, params=params, submodules=latent)


def _checkpoint_names(config: TransformerConfig, experts: bool) -> dict[str, str]:
    """Return Transformer Engine's names for norms, which it fuses into the next linear layer."""
    if config.multi_latent_attention:
        latents = ("q", "kv")
        names = {
            f"self_attention.{x}_layernorm.": f"self_attention.linear_{x}_up_proj.layer_norm_"
            for x in latents
        }
    else:
        names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not experts:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return names


def _dense_kind(config: ModelConfig) -> type[MLP]:
    return DoubleGatedMLP if config.double_gated else MLP


def _moe_layer(backend: LocalProvider, config: ModelConfig) -> ModuleSpec:
    """Return the spec of experts, shared experts and their router."""
    kind = DoubleGatedSharedExpertMLP if config.double_gated else SharedExpertMLP
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=backend.experts(),
            shared_experts=ModuleSpec(module=kind, submodules=backend.linear_layers()),
            router=router_class(config),
        ),
    )


def _local_layer(
    backend: LocalProvider, config: ModelConfig, experts: bool, sequential_ffn: int | None
) -> ModuleSpec:
    norm = backend.layer_norm()
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_attention(backend, config),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_moe_layer(backend, config)
            if experts
            else dense_ffn(_dense_kind(config), backend.linear_layers()),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_checkpoint_names(config, experts),
        ),
    )
    if experts and sequential_ffn is not None:
        layer.module = SequentialFfnLayer
        layer.params = {
            "extra_mlp": _dense_kind(config),
            "extra_submodules": backend.linear_layers(),
            "ffn_hidden_size": sequential_ffn,
        }
    return layer


def _transformer_engine_layer(
    settings: Settings, config: ModelConfig, experts: bool, fp8: bool
) -> ModuleSpec:
    layer: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm and experts,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    if not experts:
        return layer
    moe = submodules_of(layer.submodules.mlp)
    moe.router = router_class(config)
    if experts_impl(settings, local=False) == "grouped_mm":
        numerics = fp8_numerics(settings.precision, on_tensor_cores=True) if fp8 else None
        moe.experts = ModuleSpec(module=LocalProvider(settings, config, numerics).grouped_experts())
    return layer


def block_spec(
    settings: Settings,
    config: ModelConfig,
    groups: ProcessGroupCollection,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Return the specs of this rank's pipeline stage (and virtual stage), and the final norm.

    Args:
        settings: implementation, QK-norm, layers with experts.
        config: their equivalent in megatron-core.
        groups: ``pp`` is read.
        vp_stage: virtual pipeline stage; None without interleaving.
    """
    layers = _layers(settings, config)
    stage = groups.pp.rank()
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=stage)
    return TransformerBlockSubmodules(
        layer_specs=layers[first : first + count],
        layer_norm=_backend(settings, config).layer_norm(),
    )


def prediction_spec(
    settings: Settings,
    config: ModelConfig,
    groups: ProcessGroupCollection,
    vp_stage: int | None = None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """Return the spec of multi-token prediction if this stage holds it, else None.

    Arguments are those of `block_spec`.
    """
    if settings.model.mtp_num_layers is None:
        return None
    return get_gpt_mtp_block_spec_for_backend(
        config,
        _layers(settings, config)[-1],
        _backend(settings, config),
        vp_stage=vp_stage,
        pp_rank=groups.pp.rank(),
    )


def _backend(settings: Settings, config: ModelConfig) -> Any:
    """Return the provider of modules outside FP8 layers."""
    if uses_transformer_engine(settings):
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return LocalProvider(settings, config, None)


def _layers(settings: Settings, config: ModelConfig) -> list[ModuleSpec]:
    """Return the specs of all layers of the model."""
    kinds = list(zip(derived.moe_layers(settings), derived.fp8_layers(settings), strict=True))
    if uses_transformer_engine(settings):
        layer = {kind: _transformer_engine_layer(settings, config, *kind) for kind in kinds}
        if settings.data.bidirectional_prefix:  # Transformer Engine reads no mask otherwise
            for spec in layer.values():
                spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.arbitrary
    else:
        plain = LocalProvider(settings, config, None)
        numerics = fp8_numerics(settings.precision, fp8_on_tensor_cores(settings))
        reduced = LocalProvider(settings, config, numerics)
        extra = settings.moe.moe_sequential_ffn_hidden_size
        layer = {
            (experts, fp8): _local_layer(reduced if fp8 else plain, config, experts, extra)
            for experts, fp8 in kinds
        }
    return [layer[kind] for kind in kinds]
