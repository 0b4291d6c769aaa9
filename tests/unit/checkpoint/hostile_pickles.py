"""Pickles that try to run code: each would make the file ``pwned`` in the current folder."""

import copyreg
import io
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

COMMAND = "touch pwned"
_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_EXTENSION = 240
_TAIL = b"."


def text(value: str) -> bytes:
    """Return the opcode that pushes a string."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def stack_global(module: str, name: str) -> bytes:
    """Return opcodes that push ``module.name``; dots in the name are followed (protocol 4)."""
    return text(module) + text(name) + b"\x93"


def call(function: bytes, *arguments: bytes) -> bytes:
    """Return opcodes that push the result of a call."""
    return function + b"(" + b"".join(arguments) + b"t" + b"R"


def _program(body: bytes) -> bytes:
    return b"\x80\x04" + body + _TAIL


def _named(module: str, name: str, *arguments: bytes) -> bytes:
    return _program(call(stack_global(module, name), *(arguments or (text(COMMAND),))))


class _Reduced:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.answer = function, arguments

    def __reduce__(self) -> Any:
        return self.answer


@contextmanager
def registered_extension() -> Iterator[None]:
    """Give ``os.system`` a number, which the pickle "extension registry" names."""
    copyreg.add_extension("os", "system", _EXTENSION)
    try:
        yield
    finally:
        copyreg.remove_extension("os", "system", _EXTENSION)


def _extension() -> bytes:
    return _program(call(b"\x82" + bytes([_EXTENSION]), text(COMMAND)))


def _new_object(opcode: bytes) -> bytes:
    arguments = text(COMMAND)
    shell = stack_global("subprocess", "Popen")
    if opcode == b"\x81":  # NEWOBJ
        return _program(shell + b"(" + arguments + b"t" + opcode)
    return _program(shell + b"(" + arguments + b"t" + b"}" + text("shell") + b"\x88s" + b"\x92")


def _built(state: bytes) -> bytes:
    """Return BUILD with ``state`` on a listed class, then a call of it."""
    kind = stack_global(_METADATA, "Metadata")
    return _program(kind + b"\x94" + state + b"b" + b"0" + b"h\x00" + b")R")


def hostile() -> dict[str, bytes]:
    """Return all hostile pickles by kind."""
    system = stack_global("os", "system")
    plain: dict[str, bytes] = {
        "reduce os.system": pickle.dumps(_Reduced(os.system, COMMAND), protocol=2),
        "reduce eval": pickle.dumps(_Reduced(eval, f"__import__('os').system('{COMMAND}')")),
        "reduce exec": pickle.dumps(_Reduced(exec, f"import os; os.system('{COMMAND}')")),
        "text protocol": b"cos\nsystem\n(S'touch pwned'\ntR.",
        "inst opcode": b"(S'touch pwned'\nios\nsystem\n.",
        "obj opcode": b"(cos\nsystem\nS'touch pwned'\no.",
        "newobj": _new_object(b"\x81"),
        "newobj_ex": _new_object(b"\x92"),
        "extension registry": _extension(),
        "persistent id, text": b"Pos.system\n.",
        "persistent id, binary": _program(text("os.system") + b"Q"),
        "dotted name in an allowed module": _named(_METADATA, "os.system"),
        "dotted name through a class": _named(_METADATA, "Metadata.__init__.__globals__"),
        "imported module of an allowed one": _named(
            "torch.distributed.checkpoint.filesystem", "os"
        ),
        "function of an allowed module": _named("torch.serialization", "load"),
        "globals of a function": _named("torch.serialization", "_get_layout.__globals__"),
        "method of an allowed class": _named("pathlib", "PosixPath.write_text"),
        "torch.load": _named("torch", "load"),
        "torch.hub": _named("torch.hub", "load"),
        "a dtype's method": _named("torch", "float32.__class__"),
        "getattr": _named("builtins", "getattr", system, text("__call__")),
        "import_module": _named("importlib", "import_module", text("os")),
        "attrgetter": _named("operator", "attrgetter", text("system")),
        "partial": _named("functools", "partial", system, text(COMMAND)),
        "copyreg": _named("copyreg", "_reconstructor"),
        "pickle in a pickle": _named("pickle", "loads", text("x")),
        "builtins.set and map": _named("builtins", "map", system, text(COMMAND)),
        "memo": _program(system + b"\x940" + b"h\x00(" + text(COMMAND) + b"tR"),
        "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"." + _TAIL,
        "build on a class": _built(b"N}" + text("__init__") + system + b"s\x86"),
        "build a class's setstate": _built(b"N}" + text("__setstate__") + system + b"s\x86"),
        "class in place of an object": _program(stack_global(_METADATA, "Metadata")),
        "list that holds itself": _program(b"]\x94h\x00a"),
        "nothing": b"",
        "number": pickle.dumps(7),
    }
    return plain


def hostile_layer_states() -> dict[str, bytes]:
    """Return hostile pickles in place of a layer's FP8 state."""
    inner = io.BytesIO()
    torch.save(_Reduced(os.system, COMMAND), inner)
    nested = call(
        stack_global("torch.storage", "_load_from_bytes"),
        b"B" + struct.pack("<I", len(inner.getvalue())) + inner.getvalue(),
    )
    return {
        "reduce os.system": pickle.dumps(_Reduced(os.system, COMMAND)),
        "a tensor's bytes": _program(nested),
        "not a dictionary": pickle.dumps([1]),
    }


def pwned(folder: Path) -> bool:
    """Return whether one of them ran."""
    return (folder / "pwned").exists()
