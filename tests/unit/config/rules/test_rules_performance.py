"""Rules on fused operations, the implementation of experts and determinism."""

from typing import Any

import pytest

from moetron.moe.config import bridge
from moetron.moe.megatron.version_differences import captured_modules
from tests.unit.config.config_cases import found, make
from tests.unit.host.stand_ins import pretend_kernels

GPU: dict[str, Any] = {"device": "cuda", "te": True}
FP8 = {**GPU, "bf16": True, "fp8_format": "hybrid"}
CROSS_ENTROPY = {"cross_entropy_loss_fusion": True}
SCALED = {**FP8, "fp8_recipe": "tensorwise", "moe_experts_impl": "grouped_mm"}
OFFLOAD = {
    **GPU,
    "bf16": True,
    "use_distributed_optimizer": True,
    "use_precision_aware_optimizer": True,
    "optimizer_cpu_offload": True,
}
GRAPHS = {**GPU, "bf16": True, "cuda_graph_impl": "transformer_engine"}
PADDING = {"moe_router_padding_for_quantization": True}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"moe_permute_fusion": True}, "--moe-permute-fusion needs Transformer Engine on a GPU"),
        ({"moe_router_fusion": True}, "--moe-router-fusion needs Transformer Engine on a GPU"),
        (
            {**GPU, "te": False, "moe_router_fusion": True},
            "--moe-router-fusion needs Transformer Engine on a GPU",
        ),
        (
            {**GPU, "moe_permute_fusion": True, "num_experts": None},
            "--moe-permute-fusion needs --num-experts",
        ),
        (
            {**GPU, "moe_router_fusion": True, "moe_router_type": "noisy_topk"},
            "--moe-router-fusion fuses plain top-k, not --moe-router-type noisy_topk",
        ),
        (
            {
                **GPU,
                "moe_router_fusion": True,
                "moe_router_load_balancing_type": "sinkhorn",
                "moe_aux_loss_coeff": 0.0,
            },
            "fuses plain top-k, not --moe-router-load-balancing-type sinkhorn",
        ),
        (
            {**GPU, "moe_router_fusion": True, "moe_router_dtype": "fp64"},
            "--moe-router-fusion has no --moe-router-dtype fp64",
        ),
        (
            {
                **GPU,
                "moe_router_fusion": True,
                "moe_router_score_function": "sigmoid",
                "moe_aux_loss_coeff": 0.1,
                "moe_aux_loss_first_choice_only": True,
            },
            "does not normalise the scores of a balance loss that counts one expert",
        ),
        (CROSS_ENTROPY, "--cross-entropy-loss-fusion needs a CUDA device"),
        ({**GPU, **CROSS_ENTROPY}, "native rounds gradients to bf16: use --bf16"),
        (
            {**GPU, **CROSS_ENTROPY, "te": False, "cross_entropy_fusion_impl": "te"},
            "--cross-entropy-fusion-impl te needs Transformer Engine",
        ),
        (
            {**GPU, **CROSS_ENTROPY, "bf16": True, "deterministic_mode": True},
            "--cross-entropy-loss-fusion is incompatible with --deterministic-mode",
        ),
        ({**GPU, "cross_entropy_fusion_impl": "te"}, "needs --cross-entropy-loss-fusion: add it"),
        ({**GPU, **PADDING}, "needs --fp8-format with Transformer Engine's layers"),
        ({**FP8, **PADDING, "device": "cpu"}, "needs --fp8-format with Transformer Engine's"),
        (
            {**FP8, **PADDING, "moe_token_dispatcher_type": "allgather"},
            "-for-quantization needs --moe-token-dispatcher-type alltoall",
        ),
        (
            {
                **FP8,
                **PADDING,
                "moe_expert_capacity_factor": 1.0,
                "moe_pad_expert_input_to_capacity": True,
            },
            "--moe-pad-expert-input-to-capacity both pad",
        ),
        ({**FP8, **PADDING, "num_experts": None}, "-for-quantization needs --num-experts"),
        ({"moe_experts_impl": "te"}, "--moe-experts-impl te needs Transformer Engine's layers"),
        (
            {**GPU, "moe_experts_impl": "te", "transformer_impl": "local"},
            "--moe-experts-impl te needs Transformer Engine's layers",
        ),
        (
            {"moe_experts_impl": "grouped_mm", "num_experts": None},
            "--moe-experts-impl grouped_mm needs --num-experts",
        ),
        (
            {"moe_experts_impl": "grouped_mm", "moe_grouped_gemm": False},
            "--moe-experts-impl grouped_mm needs --moe-grouped-gemm",
        ),
        (
            {"moe_experts_impl": "grouped_mm", "moe_ffn_hidden_size": 12},
            "--moe-experts-impl grouped_mm: --hidden-size and --moe-ffn-hidden-size of a rank",
        ),
        (
            {**FP8, "moe_experts_impl": "grouped_mm"},
            "grouped_mm and --fp8-format hybrid needs --fp8-recipe tensorwise, not delayed",
        ),
        (
            {**SCALED, "bf16": False},
            "--moe-experts-impl grouped_mm and --fp8-format hybrid needs --bf16",
        ),
        ({**SCALED, "moe_ffn_hidden_size": 24}, "must be multiples of 16"),
        (
            {**OFFLOAD, "use_precision_aware_optimizer": False},
            "--optimizer-cpu-offload needs --use-precision-aware-optimizer",
        ),
        ({"optimizer_offload_fraction": 0.5}, "0.5 needs --optimizer-cpu-offload: add it"),
        ({**OFFLOAD, "optimizer_offload_fraction": 1.5}, "use a number in (0, 1]"),
        ({**OFFLOAD, "exp_avg_dtype": "bf16"}, "--exp-avg-dtype bf16: --optimizer-cpu-offload"),
        ({"cuda_graph_scope": ["attn"]}, "needs --cuda-graph-impl transformer_engine: add it"),
        ({"cuda_graph_warmup_steps": 5}, "needs --cuda-graph-impl transformer_engine: add it"),
        ({**GRAPHS, "cuda_graph_impl": "local"}, "local is not supported: use transformer_engine"),
        ({**GRAPHS, "te": False}, "needs Transformer Engine's layers on a GPU"),
        ({**GRAPHS, "transformer_impl": "local"}, "needs Transformer Engine's layers on a GPU"),
        (
            {**GRAPHS, "cuda_graph_scope": ["attn", "moe_router"]},
            "scope moe_router: a replay would",
        ),
        ({**GRAPHS, "cuda_graph_scope": ["moe"]}, "--cuda-graph-scope moe: it includes the router"),
        ({**GRAPHS, "cuda_graph_scope": ["full_iteration"]}, "the host decides in every step"),
        ({**GRAPHS, "cuda_graph_scope": ["ffn"]}, "--cuda-graph-scope ffn: unknown: use attn or"),
        ({**GRAPHS, "cuda_graph_scope": ["mlp"]}, "captures dense layers, and there are none"),
        ({**GRAPHS, "bf16": False}, "needs --bf16: megatron-core captures bf16 inputs"),
        (
            {**GRAPHS, "hidden_dropout": 0.1},
            "transformer_engine is not supported with --hidden-dropout 0.1: drop one",
        ),
        ({**GRAPHS, "fp8_format": "hybrid"}, "is not supported with --fp8-format hybrid"),
        ({**GRAPHS, "mtp_num_layers": 1}, "is not supported with --mtp-num-layers 1"),
    ],
)
def test_a_rule_is_reported_alone(changes: dict[str, Any], expected: str) -> None:
    problems = found(**changes)
    assert len(problems) == 1 and expected in problems[0], problems


@pytest.mark.parametrize(
    "changes",
    [
        {**GPU, "moe_permute_fusion": True, "moe_router_fusion": True},
        {**GPU, "moe_router_fusion": True, "transformer_impl": "local"},
        {**GPU, **CROSS_ENTROPY, "cross_entropy_fusion_impl": "te"},
        {**GPU, **CROSS_ENTROPY, "te": False, "bf16": True},
        {**FP8, **PADDING},
        {**GPU, "moe_experts_impl": "te"},
        SCALED,
        {**SCALED, "te": False, "moe_ffn_hidden_size": 24, "fp8_recipe": "delayed"},
        {**GPU, "moe_experts_impl": "grouped_mm"},
        {"moe_experts_impl": "grouped_mm"},
        {"deterministic_mode": True},
        {**OFFLOAD, "optimizer_offload_fraction": 0.5},
        GRAPHS,
        {**GRAPHS, "cuda_graph_scope": ["attn"], "cuda_graph_warmup_steps": 1},
        {**GRAPHS, "cuda_graph_scope": ["attn", "mlp"], "moe_layer_freq": [0, 1, 1, 1]},
    ],
)
def test_allowed(changes: dict[str, Any]) -> None:
    assert found(**changes) == []


def test_recomputed_activations_need_experts_of_transformer_engine() -> None:
    recomputed = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    assert not found(**GPU, **recomputed)
    (problem,) = found(**GPU, **recomputed, moe_experts_impl="grouped_mm")
    assert "moe_act needs Transformer Engine's grouped experts" in problem


@pytest.mark.parametrize(
    ("name", "wrong", "first"),
    [
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1", "0"),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0", ":4096:8"),
        ("NCCL_ALGO", "NVLS", "Ring"),
    ],
)
def test_environment_of_determinism(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: str, first: str
) -> None:
    monkeypatch.setenv(name, wrong)
    assert not found(device="cuda") and not found(deterministic_mode=True)
    (problem,) = found(device="cuda", deterministic_mode=True)
    assert f"{name}={wrong} in the environment" in problem and f"sets {first}" in problem
    monkeypatch.setenv(name, first)
    assert not found(device="cuda", deterministic_mode=True)


ON = {
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "apply_rope_fusion": True,
    "gradient_accumulation_fusion": True,
}
ALL = (*ON, "masked_softmax_fusion", "moe_permute_fusion", "moe_router_fusion",
       "cross_entropy_loss_fusion")  # fmt: skip


def fusions(te: bool, **changes: Any) -> dict[str, bool]:
    config = bridge.transformer_config(make(**changes), te)
    return {name: getattr(config, name) for name in ALL if getattr(config, name)}


def test_fusions_in_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-LM's defaults in Transformer Engine's layers, nothing in local ones."""
    pretend_kernels(monkeypatch)
    assert fusions(te=False) == {}
    assert fusions(te=True) == ON
    for flag, field in zip(
        ("bias_swiglu_fusion", "bias_dropout_fusion", "rope_fusion"), ON, strict=False
    ):
        assert fusions(te=True, **{flag: False}) == {k: v for k, v in ON.items() if k != field}
    assert "gradient_accumulation_fusion" not in fusions(
        te=True, gradient_accumulation_fusion=False
    )
    assert "bias_activation_fusion" not in fusions(te=True, ffn_type="geglu")
    assert "apply_rope_fusion" not in fusions(te=True, rope_type="yarn")
    assert "apply_rope_fusion" not in fusions(te=True, multi_latent_attention=True)
    chosen = dict.fromkeys(ALL[-3:], True)
    assert fusions(te=True, **chosen) == ON | chosen


def test_padding_reaches_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "megatron.core.transformer.transformer_config.is_te_min_version", lambda *_: True
    )
    pretend_kernels(monkeypatch)
    settings = make(bf16=True, fp8_format="hybrid", **PADDING)
    assert bridge.transformer_config(settings, True).moe_router_padding_for_quantization


def test_softmax_is_fused_only_by_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "_has_fused_softmax", lambda: True)
    assert fusions(te=False) == {"masked_softmax_fusion": True}
    assert fusions(te=False, masked_softmax_fusion=False) == {}


def test_graphs_reach_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty scope would capture whole layers, with their routers."""
    pretend_kernels(monkeypatch)
    graphs = {"bf16": True, "cuda_graph_impl": "transformer_engine", "cuda_graph_warmup_steps": 5}
    config = bridge.transformer_config(make(**graphs), True)
    assert config.cuda_graph_impl == "transformer_engine" and config.cuda_graph_warmup_steps == 5
    field, *_ = captured_modules([])
    assert [scope.name for scope in getattr(config, field)] == ["attn"]
    dense = {**graphs, "cuda_graph_scope": ["attn", "mlp"], "moe_layer_freq": [0, 1, 1, 1]}
    both = getattr(bridge.transformer_config(make(**dense), True), field)
    assert [scope.name for scope in both] == ["attn", "mlp"]
    assert bridge.transformer_config(make(), True).cuda_graph_impl == "none"
