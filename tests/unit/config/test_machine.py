"""Detection of drivers, hidden GPUs and Transformer Engine on simulated machines."""

from pathlib import Path

import pytest

from moetron.common.errors import ConfigError
from moetron.moe.config import machine
from moetron.moe.config.command import load


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Simulate a machine without a driver."""
    monkeypatch.setattr(machine, "_PROC", tmp_path / "version")
    monkeypatch.setattr(machine, "_DEVICE_FOLDER", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def _nvidia_smi(folder: Path, says: str, code: int) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    program.chmod(0o755)


def test_no_driver() -> None:
    assert machine.nvidia_driver() is None
    assert machine.expected_device("auto") == "cpu"


def test_a_driver_is_found_in_proc_dev_or_nvidia_smi(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()  # without a device
    _nvidia_smi(tmp_path, "No devices were found", 6)
    assert machine.nvidia_driver() is None
    _nvidia_smi(tmp_path, "GPU 0: NVIDIA H100 (UUID: GPU-1)", 0)
    assert machine.nvidia_driver() == str(tmp_path / "nvidia-smi")
    (tmp_path / "nvidia0").touch()
    assert machine.nvidia_driver() == str(tmp_path / "nvidia0")
    (tmp_path / "version").touch()
    assert machine.nvidia_driver() == str(tmp_path / "version")
    assert machine.expected_device("auto") == machine.expected_device("cuda") == "cuda"
    assert machine.expected_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("value", "is_hidden"),
    [
        *((value, True) for value in ("", " ", "-1", "-1,0", "NoDevFiles")),
        *((value, False) for value in ("0", "2,-1", "GPU-8932f937", "MIG-x/1/2")),
    ],
)
def test_hidden_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str, is_hidden: bool
) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert machine.hidden_gpus() == (f"CUDA_VISIBLE_DEVICES={value}" if is_hidden else None)
    assert machine.expected_device("auto") == ("cpu" if is_hidden else "cuda")


@pytest.mark.parametrize("hidden", [True, False])
def test_device_cuda_without_one_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hidden: bool
) -> None:
    if hidden:
        (tmp_path / "nvidia0").touch()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    recipe = Path(__file__).parents[3] / "examples" / "olmoe_1b_7b" / "tiny.yaml"
    with pytest.raises(ConfigError) as caught:
        load(["--config", str(recipe), "--mock-data", "--device", "cuda"])
    why = "CUDA_VISIBLE_DEVICES=" if hidden else "there is no NVIDIA driver"
    assert [line for line in caught.value.problems if f"no CUDA device here ({why})" in line]
