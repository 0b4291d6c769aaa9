"""Kernels of norms, attention and loss compile for an H100, at OLMoE's and other shapes."""

from typing import Any

import pytest

from tests.unit.kernels.compiler import compile_for_h100

pytest.importorskip("triton")
BF16, FP32, I64 = "*bf16", "*fp32", "*i64"
INTEGERS = ("token_stride", "group_stride", "tokens", "samples", "length")
HEADS: dict[str, dict[str, Any]] = {  # of the joint kernel: full width, per head, without a norm
    "full": {"NORMED": True, "FULL": True, "ALL_HEADS": 16, "PER_GROUP": 1, "HEADS": 16},
    "head": {"NORMED": True, "FULL": False, "ALL_HEADS": 40, "PER_GROUP": 5, "HEADS": 32},
    "none": {"NORMED": False, "FULL": False, "ALL_HEADS": 6, "PER_GROUP": 1, "HEADS": 8},
}


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_cross_entropy(dtype: str) -> None:
    from moetron.moe.kernels import cross_entropy_triton as kernels

    shared = {"logits": dtype, "labels": I64, "log_z": FP32, "row_stride": "i32", "first": "i32"}
    constants = {"COLUMNS": 50304, "BLOCK": 4096}
    compile_for_h100(kernels.forward_kernel, {**shared, "label_logit": FP32}, constants, 8)
    grads = {"result": dtype, "grad_loss": FP32, "grad_log_z": FP32}
    compile_for_h100(kernels.backward_kernel, {**shared, **grads}, constants, 8)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_queries_and_keys(heads: str, interleaved: bool) -> None:
    from moetron.moe.kernels import query_key_triton as kernels

    constants = {"WIDTH": 96, "ROTATED": 64, "INTERLEAVED": interleaved, "CHANNELS": 128}
    constants |= HEADS[heads]
    forward = dict.fromkeys(("token_stride", "group_stride", "samples", "length"), "i32")
    forward |= {"source": BF16, "target": BF16, "weight": BF16, "table": FP32, "epsilon": "fp32"}
    compile_for_h100(kernels.forward_kernel, forward, constants, 4)
    backward = dict.fromkeys((*INTEGERS, "grad_s", "grad_b", "grad_h"), "i32")
    backward |= {"grad": BF16, "result": BF16, "source": BF16, "weight": BF16}
    backward |= {"weight_grad": FP32, "table": FP32, "epsilon": "fp32"}
    compile_for_h100(kernels.backward_kernel, backward, constants | {"STEPS": 16}, 8)


@pytest.mark.parametrize("source_interleaved", [False, True])
def test_rotary(source_interleaved: bool) -> None:
    from moetron.moe.kernels import rotary_triton as kernels

    types = dict.fromkeys(("stride_s", "stride_b", "stride_h"), "i32")
    types |= dict.fromkeys(("samples", "heads", "length"), "i32")
    types |= {"source": BF16, "target": BF16, "table": FP32, "sign": "fp32"}
    step, gap = (2, 1) if source_interleaved else (1, 32)
    constants = {"WIDTH": 96, "ROTATED": 64, "HEADS": 64, "PAIRS": 32, "REST": 32}
    constants |= {"SOURCE_STEP": step, "SOURCE_GAP": gap, "ANGLE_STEP": 1}
    constants |= {"TARGET_STEP": 1, "TARGET_GAP": 32}
    compile_for_h100(kernels.rotary_kernel, types, constants, 4)
