"""Patches of megatron-core 0.16.1: bugs and kernels on every device, and assumptions of CUDA.

The entry point calls `adapt_host` once, before it creates process groups or a model. Importing this
module changes nothing. Each patch set is a function whose docstring names the lines of
megatron-core that need it. Only megatron-core is patched, except for the functions of
``torch.cuda`` in cuda_functions.py.
"""

from collections.abc import Callable, Collection

import torch

from moetron.moe.host.cuda_constants import CUDA_CONSTANTS
from moetron.moe.host.cuda_functions import CUDA_FUNCTIONS
from moetron.moe.host.host_behaviour import HOST_BEHAVIOUR
from moetron.moe.host.kernel_hooks import HOOKS
from moetron.moe.host.megatron_fixes import FIXES
from moetron.moe.host.patching import Patch

Adaptation = Callable[[], list[Patch]]

EVERYWHERE: dict[str, Adaptation] = {fix.__name__: fix for fix in FIXES}
"""Bugs of megatron-core: patched with CUDA too."""
WITHOUT_CUDA: dict[str, Adaptation] = {
    adaptation.__name__: adaptation
    for adaptation in (*CUDA_FUNCTIONS, *HOST_BEHAVIOUR, *CUDA_CONSTANTS)
}
ADAPTATIONS = EVERYWHERE | WITHOUT_CUDA

_undo: dict[str, list[Patch]] = {}


def adapt_host(skip: Collection[str] = ()) -> None:
    """Apply the patch sets that this device needs and that are not applied yet.

    Args:
        skip: names in `ADAPTATIONS` to leave out (tests show what breaks without each).
    """
    needed = HOOKS | (EVERYWHERE if torch.cuda.is_available() else ADAPTATIONS)
    for name, adaptation in needed.items():
        if name not in skip and name not in _undo:
            _undo[name] = [patch.apply() for patch in adaptation()]


def restore_host(names: Collection[str] = (*ADAPTATIONS, *HOOKS)) -> None:
    """Undo patch sets (all by default)."""
    for name in names:
        for patch in reversed(_undo.pop(name, [])):
            patch.apply()
