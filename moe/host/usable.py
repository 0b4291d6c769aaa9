"""Tests of whether CUDA and Transformer Engine are usable.

megatron-core imports Transformer Engine when it is imported, and handles only an ImportError (in
places, a ModuleNotFoundError) as its absence. An installation without its libraries (OSError,
RuntimeError) or without a visible GPU would end every run, and a partial one would be half used.
`guard_imports` runs before megatron-core's first import (moe/__init__.py) and turns all of these
into a ModuleNotFoundError. This module imports torch lazily.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from moetron.moe.config.machine import hidden_gpus, nvidia_driver

_TE = "transformer_engine"
_TE_PACKAGE = f"{_TE}.pytorch"


@dataclass(frozen=True)
class CudaFault:
    """Reason why CUDA is unusable."""

    reason: str
    is_broken: bool
    """There is a driver and no GPU is hidden, so CUDA should be usable."""


@functools.cache
def cuda_fault() -> CudaFault | None:
    """Return why CUDA is unusable, or None; start no CUDA context.

    Cached: torch reports its reason only the first time.
    """
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        present = torch.cuda.is_available()
    if present:
        return None
    hidden, driver = hidden_gpus(), nvidia_driver()
    if hidden is not None:
        return CudaFault(f"{hidden} hides every GPU", is_broken=False)
    if driver is None:
        return CudaFault("there is no NVIDIA driver", is_broken=False)
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
    elif caught:
        reason = " ".join(str(caught[-1].message).split())
    else:
        reason = f"torch {torch.__version__} for CUDA {torch.version.cuda} finds no device"
    return CudaFault(f"{reason} (driver found: {driver})", is_broken=True)


def transformer_engine_fault() -> str | None:
    """Import Transformer Engine; return why it is unusable, or None."""
    cuda = cuda_fault()
    if cuda is not None:
        return f"it needs a GPU, and {cuda.reason}"
    try:
        importlib.import_module(_TE_PACKAGE)
    except Exception as error:
        return _reason(error)
    return None


def guard_imports() -> None:
    """Allow imports of Transformer Engine only if it works; idempotent."""
    if not any(isinstance(finder, _Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Guard())


def _reason(error: Exception) -> str:
    """Return an error in one line; for an error of the guard, its original reason."""
    if isinstance(error, _BlockedError):
        return error.reason
    if isinstance(error, ModuleNotFoundError) and error.name == _TE:
        return "it is not installed"
    return f"its import fails: {type(error).__name__}: {' '.join(str(error).split())}"


class _BlockedError(ModuleNotFoundError):  # megatron-core's random.py handles no other
    def __init__(self, reason: str) -> None:
        super().__init__(f"{_TE} cannot be used: {reason}", name=_TE)
        self.reason = reason


class _Guard(importlib.abc.MetaPathFinder):
    """Finder of Transformer Engine that loads it through a `_Trial`."""

    def __init__(self) -> None:
        self.fault: str | None = None
        """Reason of a failed trial, which runs once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TE:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Trial(spec.loader, self)
                return spec
        return None


class _Trial(importlib.abc.Loader):
    """Loader of the package and its torch part that cleans up if either fails."""

    def __init__(self, loader: Any, guard: _Guard) -> None:
        self._loader = loader
        self._guard = guard

    def __getattr__(self, name: str) -> Any:
        """Delegate other attributes to the original loader."""
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        cuda = cuda_fault()
        if cuda is not None:
            raise _BlockedError(f"it needs a GPU, and {cuda.reason}")
        if self._guard.fault is not None:
            raise _BlockedError(self._guard.fault)
        try:
            self._loader.exec_module(module)
            importlib.import_module(_TE_PACKAGE)
        except Exception as error:
            self._guard.fault = _reason(error)
            for name in [name for name in sys.modules if name.startswith(f"{_TE}.")]:
                del sys.modules[name]
            raise _BlockedError(self._guard.fault) from error
