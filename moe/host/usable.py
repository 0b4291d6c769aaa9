"""What of the machine can be used, found by trying: CUDA, and Transformer Engine.

megatron-core imports Transformer Engine while it is itself imported, and takes nothing but an
ImportError (in places, a ModuleNotFoundError) for its absence. An installation without its
libraries (OSError, RuntimeError) or without a visible GPU would end every run, and one of which
only a part imports would be half used. `guard_imports` comes before megatron-core's first import
(moe/__init__.py) and makes each of these a ModuleNotFoundError.
Nothing here imports torch before it is asked.
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
    """Why CUDA cannot be used."""

    reason: str
    is_broken: bool
    """A driver is there and no GPU is hidden: CUDA should be usable."""


@functools.cache
def cuda_fault() -> CudaFault | None:
    """Why CUDA cannot be used, None where it can; starts no CUDA context.

    Asked once: torch tells its reason only the first time.
    """
    import torch

    with warnings.catch_warnings(record=True) as said:
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
    elif said:
        reason = " ".join(str(said[-1].message).split())
    else:
        reason = f"torch {torch.__version__} for CUDA {torch.version.cuda} finds no device"
    return CudaFault(f"{reason} (driver found: {driver})", is_broken=True)


def transformer_engine_fault() -> str | None:
    """Why Transformer Engine cannot be used, None where it can; imports it."""
    cuda = cuda_fault()
    if cuda is not None:
        return f"it needs a GPU, and {cuda.reason}"
    try:
        importlib.import_module(_TE_PACKAGE)
    except Exception as error:
        return _told(error)
    return None


def guard_imports() -> None:
    """Let Transformer Engine be imported only where it works; done once for a process."""
    if not any(isinstance(finder, _Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Guard())


def _told(error: Exception) -> str:
    """One line of an error; that of the original where the guard raised this one."""
    if isinstance(error, _BlockedError):
        return error.reason
    if isinstance(error, ModuleNotFoundError) and error.name == _TE:
        return "it is not installed"
    return f"its import fails: {type(error).__name__}: {' '.join(str(error).split())}"


class _BlockedError(ModuleNotFoundError):  # megatron-core's random.py takes no other
    def __init__(self, reason: str) -> None:
        super().__init__(f"{_TE} cannot be used: {reason}", name=_TE)
        self.reason = reason


class _Guard(importlib.abc.MetaPathFinder):
    """Finds Transformer Engine as the other finders do, and lets a `_Trial` load it."""

    def __init__(self) -> None:
        self.fault: str | None = None
        """Why the trial failed; it is made once."""

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
    """Loads the package and its part for torch, or raises and leaves nothing behind."""

    def __init__(self, loader: Any, guard: _Guard) -> None:
        self._loader = loader
        self._guard = guard

    def __getattr__(self, name: str) -> Any:
        """What else importlib and inspect ask of a loader."""
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
            self._guard.fault = _told(error)
            for name in [name for name in sys.modules if name.startswith(f"{_TE}.")]:
                del sys.modules[name]
            raise _BlockedError(self._guard.fault) from error
