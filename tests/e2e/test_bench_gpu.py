"""The GPU bench on this machine, in a tiny shape: everything but what only CUDA has."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moetron.moe.config import machine
from tests.bench.gpu.kernel_kinds import Kernel, busy_ms, by_kind, kind_of
from tests.bench.gpu.result_files import with_ratios
from tests.bench.gpu.variants import EACH_FLAG, Variant, settings_of

ROOT = Path(__file__).parents[2]


def bench(folder: Path, *argv: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.bench_gpu", "--smoke", "--out", str(folder), *argv],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,  # 12 s of a quiet core
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_kind_of_program_is_measured(tmp_path: Path) -> None:
    """Ours, megatron-core and transformers; a variant that fails, and one that needs a GPU."""
    bench(
        tmp_path,
        *("--variant", "broken=--num-experts 7 --moe-router-topk 9", "--profile", "local"),
        *("--only", "^(megatron-core|transformers|local|te-experts-te|broken)$"),
    )
    found = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in found["rows"]}
    assert "ConfigError" in rows["broken"]["error"]
    assert "Transformer Engine" in rows["te-experts-te"]["error"]
    for name in ("megatron-core", "transformers", "local"):
        # ln 256 = 5.545: two steps of a small learning rate change it by less than 0.1
        assert rows[name]["loss"] == pytest.approx(5.545, abs=0.1), name
        assert rows[name]["tokens_per_s"] > 0
    ours = rows["local"]
    assert rows["megatron-core"]["parameters"] != ours["parameters"]  # QK-norms per head
    assert ours["over_megatron"] == ours["tokens_per_s"] / rows["megatron-core"]["tokens_per_s"]
    table = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "| broken | ConfigError" in table and "| x megatron |" in table
    assert "Host operations" in (tmp_path / "profile_local.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", EACH_FLAG)
def test_flags_of_each_variant_are_accepted(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On a machine with a GPU and Transformer Engine; a flag that is refused says so there only."""
    monkeypatch.setattr(machine, "expected_device", lambda _: "cuda")
    monkeypatch.setattr(machine, "transformer_engine_is_installed", lambda: True)
    settings = settings_of(Variant(name, EACH_FLAG[name]), 5, [])
    base = settings_of(Variant("base", EACH_FLAG[name.partition(" ")[0]]), 5, [])
    assert (settings == base) == (" " not in name)


def test_a_flag_is_compared_with_its_base() -> None:
    def row(name: str, rate: float, device_ms: float) -> dict[str, Any]:
        return {"name": name, "kind": "ours", "tokens_per_s": rate, "device_ms": device_ms}

    failed = {"name": "te --b", "kind": "ours", "error": "ran out of memory"}
    rows = [row("te", 100.0, 20.0), row("te --a", 110.0, 18.5), failed, row("other --a", 1.0, 1.0)]
    base, found, error, other = with_ratios(rows)
    assert found["over_base"] == 1.1 and found["device_less_base_ms"] == -1.5
    assert not any("over_base" in each for each in (base, error, other))


def test_losses_of_two_precisions_are_compared(tmp_path: Path) -> None:
    flags = ("--variant", "fp32=--transformer-impl local --fp32")
    lines = bench(tmp_path, *flags, "--loss-steps", "30", "local", "fp32").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["local", "fp32"]
    losses = json.loads((tmp_path / "losses.json").read_text(encoding="utf-8"))
    assert losses["local"] != losses["fp32"] and losses["local"][-1] < losses["local"][0] - 0.3


def test_device_time_counts_overlapping_kernels_once() -> None:
    kernels = [
        Kernel("a_gemm_kernel", 0, 4_000_000),
        Kernel("other", 2_000_000, 3_000_000),
        Kernel("vectorized_elementwise_kernel", 3_000_000, 5_000_000),
        Kernel("Memcpy HtoD", 8_000_000, 9_000_000),
    ]
    assert busy_ms(kernels) == 6
    assert by_kind(kernels)["gemm"] == 4


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob", "attention"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_TNT", "gemm"),
        ("cutlass::device_kernel<GemmUniversal<GroupProblemShape<Shape<int>>>>", "grouped gemm"),
        ("vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "add"),
        ("Memcpy HtoD (Pinned -> Device)", "copy, fill, cat"),
    ],
)
def test_kernels_have_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind
