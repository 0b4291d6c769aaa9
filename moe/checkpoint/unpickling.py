"""Unpickle without executing anything that a pickle names: the only unpickling in Moetron.

A pickle can call any function of any module. torch.distributed.checkpoint stores the index of a
checkpoint's tensors as a pickle, and layers of Transformer Engine store their FP8 state as one.
Here every name that such a pickle may use is listed with its module and mapped to an inert class
made for this one read: nothing of torch, Python or Moetron is called or changed. The result is data
for `index_reader` to check. See SECURITY.md.
"""

import copyreg
import io
import math
import pickle
from collections.abc import Iterable, Mapping
from typing import Any

DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)
_STORAGES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16"},
    **{"BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32"},
    **{"ByteStorage": "uint8", "BoolStorage": "bool"},
}
_METADATA = "torch.distributed.checkpoint.metadata"
_RECIPE = "transformer_engine.common.recipe"
Names = Mapping[tuple[str, str], Any]
"""(module, name) of a pickle -> its replacement."""


class _Fixed(type):
    """Metaclass of classes that a pickle cannot change (its BUILD instruction sets attributes)."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"sets {cls.__name__}.{name}")


class Record(metaclass=_Fixed):
    """Stand-in for an object, with the state from the pickle."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        """Store the state unchanged."""
        self.__dict__["state"] = state


class Call(metaclass=_Fixed):
    """Stand-in for a call or an object made from arguments, with the arguments."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        """Store the state unchanged."""
        self.__dict__["state"] = state


class _Storage(Call):
    """Stand-in for a tensor's storage, checked here: torch reads it unrestricted in a pickle."""

    def __init__(self, *arguments: Any) -> None:
        import torch  # seconds

        super().__init__(*arguments)
        (data,) = arguments
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class Dtype:
    """A dtype, by its name in torch."""

    def __init__(self, name: str) -> None:
        self.name = name


def index_names() -> Names:
    """Return the replacements for the names of an index; every call makes new classes."""
    records = (
        *((_METADATA, name) for name in ("Metadata", "StorageMeta", "MetadataIndex")),
        *((_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
        *((_METADATA, name) for name in ("TensorProperties", "ChunkStorageMetadata")),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    )
    calls = (
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # Python 3.13's home of the same class
    )
    return _stand_ins(records, calls)


def _layer_state_names() -> Names:
    """Return the replacements for names in the FP8 state of Transformer Engine (2.9 to 2.20).

    megatron-core derives its own class from the recipe of delayed scaling.
    """
    recipes = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
    parts = ("Format", "_FormatHelper", "MMParams", "QParams", "_OverrideLinearPrecision")
    records = [(_RECIPE, name) for name in recipes]
    records.append(("megatron.core.extensions.transformer_engine", "TEDelayedScaling"))
    calls = [(_RECIPE, name) for name in parts]
    calls += [("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")]
    storage = type("_load_from_bytes", (_Storage,), {})
    # megatron-core 0.19 replaces torch's function by its own, which pickles made there name.
    loaders = (
        ("torch.storage", "_load_from_bytes"),
        ("megatron.core.safe_globals", "safe_load_from_bytes"),
    )
    return {**_stand_ins(records, calls), **dict.fromkeys(loaders, storage)}


def _stand_ins(records: Iterable[tuple[str, str]], calls: Iterable[tuple[str, str]]) -> Names:
    return {
        **{key: _Fixed(key[1], (Record,), {}) for key in records},
        **{key: _Fixed(key[1], (Call,), {}) for key in calls},
        **{("torch", name): Dtype(name) for name in DTYPES},
    }


class _Unpickler(pickle.Unpickler):
    """Unpickler that finds names in one table; its base class rejects persistent ids."""

    def __init__(self, file: Any, names: Names) -> None:
        super().__init__(file)
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise pickle.UnpicklingError(f"refers to {module}.{name}")
        return self._names[module, name]


def load_inert(file: Any, names: Names) -> Any:
    """Unpickle ``file`` with only ``names``; raises any exception if it is not plain data."""
    if copyreg._extension_registry:  # type: ignore[attr-defined]
        # A number in a pickle stands for a registered function, and Python looks it up without
        # find_class once it was used. Moetron registers none.
        raise pickle.UnpicklingError("a package of this process has registered pickle extensions")
    return _Unpickler(file, names).load()


class _TensorUnpickler(_Unpickler):
    """Unpickler of the description of a tensor, whose storage is a persistent id."""

    def persistent_load(self, pid: Any) -> Any:
        return pid


def plain_tensor(data: bytes) -> tuple[str, tuple[int, ...]]:
    """Return the dtype's name and the shape that ``data.pkl`` of a file by ``torch.save`` tells.

    Raises:
        Exception: of any kind, unless it is one contiguous tensor that is all of its storage.
    """
    rebuild = _Fixed("_rebuild_tensor_v2", (Call,), {})
    names = {
        ("torch._utils", "_rebuild_tensor_v2"): rebuild,
        ("collections", "OrderedDict"): _Fixed("OrderedDict", (Call,), {}),
        **{("torch", name): Dtype(dtype) for name, dtype in _STORAGES.items()},
    }
    found = _TensorUnpickler(io.BytesIO(data), names).load()
    if type(found) is not rebuild:
        raise pickle.UnpicklingError("is not a tensor")
    (_, dtype, _, _, numel), offset, shape, stride, *_ = found.arguments
    expected = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if (offset, numel, list(stride)) != (0, math.prod(shape), expected):
        raise pickle.UnpicklingError("is a part of its storage, or in another order")
    return dtype.name, shape


def check_layer_state(data: bytes) -> None:
    """Raise an exception unless ``data`` is a pickle of only FP8 recipes and tensors.

    Transformer Engine then unpickles it itself; it finds only these names.
    """
    if not isinstance(load_inert(io.BytesIO(data), _layer_state_names()), dict):
        raise pickle.UnpicklingError("the state of a layer is not a dictionary")
