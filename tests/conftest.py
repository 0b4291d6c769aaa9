"""What every test starts from."""

import pytest

import moetron.moe  # noqa: F401  (guards megatron-core's import of Transformer Engine)


@pytest.fixture(autouse=True)
def no_switches_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core leaves these set for the process in which it built a model."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)
