"""Compilation of kernels for an H100 on any machine: the interpreter does not check types."""

from typing import Any

import pytest

from moetron.moe.kernels.availability import is_interpreted, triton_is_installed


def compile_for_h100(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int
) -> None:
    """Compile a kernel to machine code, or skip without triton.

    Args:
        kernel: a function with ``triton.jit``.
        types: Triton's names of its arguments' types, such as ``*bf16`` or ``i32``.
        constants: its constexpr arguments.
        warps: of a program.
    """
    if is_interpreted() or not triton_is_installed():
        pytest.skip("needs triton, not its interpreter")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(names) == types.keys() | constants.keys()
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
    )
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    assert compiled.asm["cubin"]
