"""Counter of what would make the host wait for a GPU, on a CPU.

A mode sees every call of a torch function. Tensors that a copy to the host has returned are marked,
with all that is computed from them: reading those costs nothing.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[3]
READS = {
    *("item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__int__", "__float__"),
    *("__index__", "__contains__", "equal", "allclose", "is_nonzero"),
}
SIZES = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"}
"""Functions whose result has a shape that depends on values."""
SENDS = {"tensor", "as_tensor", "new_tensor"}
"""Functions that copy a list to the device, if one is given."""
INNER = {"aten::_local_scalar_dense", *(f"aten::{name}" for name in SIZES)}
"""What functions of torch itself do in place of those above, for an argument that is a tensor."""


class HostTensor(torch.Tensor):
    """Tensor that was copied to the host, or computed from such a one."""


class _Inner(TorchDispatchMode):
    def __init__(self, count: Callable[[str], None]) -> None:
        super().__init__()
        self._count = count

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, kwargs = func.name().split(".")[0], kwargs or {}
        if name in INNER or (name == "aten::_to_copy" and _blocks(args[0], kwargs)):
            self._count(name)
        return func(*args, **kwargs)


def _blocks(tensor: torch.Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a copy to another device (of a test: meta) makes the host wait."""
    device = kwargs.get("device") or tensor.device
    return device.type != tensor.device.type and not kwargs.get("non_blocking", False)


class HostReads(TorchFunctionMode):
    """Context that counts waits of the host by function and place; see `found`."""

    def __init__(self, ignored: Sequence[str] = ()) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._ignored = tuple(ignored)
        self._known = False  # whether the current function is counted, or free
        self._inner = _Inner(self._count_inner)

    def __enter__(self) -> "HostReads":
        super().__enter__()
        self._inner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        super().__exit__(*error)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        is_free = any(isinstance(each, HostTensor) for each in args)
        if not is_free and self._waits(name, args, kwargs):
            self._count(name)
        before, self._known = self._known, is_free or self._waits(name, args, kwargs)
        try:
            result = func(*args, **kwargs)
        finally:
            self._known = before
        return result.as_subclass(HostTensor) if name == "cpu" else result

    def _waits(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if name in READS or name in SIZES:
            return True
        if name in SENDS:
            return kwargs.get("device") is not None
        if name == "__setitem__" and isinstance(args[1], torch.Tensor):
            return args[1].dtype == torch.bool and isinstance(args[2], torch.Tensor)  # or a fill
        if name in ("__getitem__", "__setitem__", "index_put_", "index_put"):
            index = args[1] if isinstance(args[1], tuple | list) else (args[1],)
            return any(
                isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in index
            )
        if name == "where":
            return len(args) + len(kwargs) == 1
        return name == "repeat_interleave" and "output_size" not in kwargs

    def _count_inner(self, name: str) -> None:
        if not self._known:
            self._count(name)

    def _count(self, name: str) -> None:
        place = _caller()
        if not place.startswith(self._ignored):
            self.found[f"{place}: {name}"] += 1


def _caller() -> str:
    """Return the innermost place outside torch and this module."""
    for frame in reversed(traceback.extract_stack()):
        path = frame.filename
        if path != __file__ and "/torch/" not in path:
            break
    short = path.split("site-packages/")[-1].removeprefix(f"{ROOT}/")
    return f"{short}:{frame.lineno} {frame.line}"
