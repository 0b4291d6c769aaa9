"""Device and layers for each request on each machine, or one readable error."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moetron.common.errors import ConfigError, UserError
from moetron.moe.config.schema.settings import Settings
from moetron.moe.host import device
from tests.unit.host.stand_ins import BROKEN, pretend

CPU_NOW = ("no driver", "hidden")
BROKEN_CUDA = {"too old": "driver on your system is too old", "cpu build": "built without CUDA"}
TE = ("absent", *BROKEN, "fine")


@pytest.fixture(autouse=True)
def _forget_stand_ins() -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Simulate a machine for ``device``."""

    def machine(cuda: str, te: str = "absent", part: bool = False) -> None:
        pretend(monkeypatch, tmp_path, cuda, te, part)
        monkeypatch.setattr(device, "cuda_fault", device.cuda_fault.__wrapped__)
        monkeypatch.setattr(device, "transformer_engine_is_installed", lambda: te != "absent")

    return machine


def settings(
    wanted: str = "auto",
    impl: str = "auto",
    model: dict[str, Any] | None = None,
    **groups: dict[str, Any],
) -> Settings:
    shape = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 16}
    shape |= {"vocab_size": 100}
    return Settings.model_validate(
        {
            "model": {**shape, "transformer_impl": impl, **(model or {})},
            "moe": {"num_experts": 4, "moe_router_pre_softmax": True},
            "parallel": {"device": wanted},
            "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
            "learning_rate": {"lr": 1e-3},
            "data": {"mock_data": True},
            **groups,
        }
    )


@pytest.mark.parametrize("te", TE)
@pytest.mark.parametrize("cuda", CPU_NOW)
def test_on_a_cpu_layers_are_local(
    on: Any, caplog: pytest.LogCaptureFixture, cuda: str, te: str
) -> None:
    on(cuda, te)
    for wanted in ("auto", "cpu"):
        for impl in ("auto", "local"):
            chosen = settings(wanted, impl)
            assert device.prepare_device(chosen) == torch.device("cpu")
            assert not device.uses_transformer_engine(chosen)
        with pytest.raises(UserError, match="transformer_engine: it needs a GPU, and"):
            device.prepare_device(settings(wanted, "transformer_engine"))
    why = "no NVIDIA driver" if cuda == "no driver" else "CUDA_VISIBLE_DEVICES= hides every GPU"
    with pytest.raises(UserError, match=f"--device cuda: .*{why}"):
        device.prepare_device(settings("cuda"))
    notes = [record.getMessage() for record in caplog.records]
    assert notes == (
        [] if cuda == "no driver" else [f"--device auto: running on the CPU: {why}"] * 2
    )


@pytest.mark.parametrize("te", ["absent", "OSError", "fine"])
@pytest.mark.parametrize(("cuda", "reason"), BROKEN_CUDA.items())
def test_a_driver_without_usable_cuda_is_refused_unless_the_cpu_is_requested(
    on: Any, cuda: str, reason: str, te: str
) -> None:
    on(cuda, te)
    for impl in ("auto", "local", "transformer_engine"):
        with pytest.raises(UserError, match=f"--device auto: .*{reason}.*--device cpu"):
            device.prepare_device(settings("auto", impl))
        with pytest.raises(UserError, match=f"--device cuda: .*{reason}"):
            device.prepare_device(settings("cuda", impl))
    for impl in ("auto", "local"):
        assert device.prepare_device(settings("cpu", impl)) == torch.device("cpu")
    with pytest.raises(UserError, match=f"transformer_engine: it needs a GPU, and .*{reason}"):
        device.prepare_device(settings("cpu", "transformer_engine"))


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("te", ["absent", *BROKEN])
def test_on_a_gpu_without_a_usable_transformer_engine(
    on: Any, caplog: pytest.LogCaptureFixture, te: str, part: bool
) -> None:
    on("gpu", te, part)
    why = "it is not installed" if te == "absent" else f"its import fails: {te}: libcudnn.so.9"
    assert device.prepare_device(settings(impl="local")) == torch.device("cuda:0")
    assert not caplog.records
    assert device.prepare_device(settings()) == torch.device("cuda:0")
    assert not device.uses_transformer_engine(settings())
    (record,) = caplog.records
    assert "--transformer-impl auto: local layers" in record.getMessage()
    assert why in record.getMessage()
    with pytest.raises(UserError, match=f"--transformer-impl transformer_engine: {why}"):
        device.prepare_device(settings(impl="transformer_engine"))
    with pytest.raises(UserError, match="--device cpu: a CUDA device is visible"):
        device.prepare_device(settings("cpu"))


def test_on_a_gpu_with_transformer_engine(on: Any, caplog: pytest.LogCaptureFixture) -> None:
    on("gpu", "fine")
    for wanted in ("auto", "cuda"):
        for impl in ("auto", "transformer_engine"):
            assert device.prepare_device(settings(wanted, impl)) == torch.device("cuda:0")
            assert device.uses_transformer_engine(settings(wanted, impl))
        assert device.prepare_device(settings(wanted, "local")) == torch.device("cuda:0")
        assert not device.uses_transformer_engine(settings(wanted, "local"))
    assert not caplog.records


def test_auto_selects_local_layers_for_unsupported_models(
    on: Any, caplog: pytest.LogCaptureFixture
) -> None:
    on("gpu", "fine")
    openmoe = settings(model={"ffn_type": "double_gated"})
    assert device.prepare_device(openmoe) == torch.device("cuda:0")
    assert not device.uses_transformer_engine(openmoe)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith("layers do not support --ffn-type double_gated")
    with pytest.raises(
        UserError, match="do not support --ffn-type double_gated; use --transformer-impl auto"
    ):
        device.prepare_device(
            settings(impl="transformer_engine", model={"ffn_type": "double_gated"})
        )


def test_only_one_rank_logs_the_reason(
    on: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on("gpu")
    monkeypatch.setenv("RANK", "1")
    device.prepare_device(settings())
    assert not caplog.records


def test_settings_that_fit_only_the_expected_layers_are_refused(on: Any) -> None:
    """Recomputing expert activations needs Transformer Engine, which fails to import."""
    parallel = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    on("gpu", "OSError")
    with pytest.raises(ConfigError, match="moe_act needs Transformer Engine's grouped experts"):
        device.prepare_device(settings(parallel={"device": "auto", **parallel}))


def test_known_problems_are_not_reported_again(on: Any) -> None:
    """Settings checks run first; commands such as generation need not pass all of them."""
    batch = {"train_iters": 1, "micro_batch_size": 3, "global_batch_size": 4}
    on("gpu", "OSError")
    device.prepare_device(settings(training=batch))


def test_each_rank_has_the_gpu_of_its_number(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on("gpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.resolve_device("auto") == device.resolve_device("cuda") == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"LOCAL_RANK=2, but this machine has 2 .*--nproc-per-node"):
        device.resolve_device("auto")


def test_a_gpu_that_does_not_start(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML lists GPUs of a driver that torch cannot use (PYTORCH_NVML_BASED_CUDA_CHECK=1)."""

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040)")

    on("gpu")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UserError, match=r"CUDA does not start: .*too old \(found"):
        device.resolve_device("auto")


def test_backends() -> None:
    assert device.backend_for(torch.device("cpu")) == "gloo"
    assert device.backend_for(torch.device("cuda:0")) == "nccl"
